"""What a trained model answers to the rows of a task: generated text, or the likeliest option."""
