"""From a configuration to a session: the data and the model that it names. What was found is said."""

import os

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankrace.bank import check_quantize
from rankrace.config import RunConfig
from rankrace.data import Data, encode_splits, make_encoder, read_splits
from rankrace.data.checks import checked_data
from rankrace.data.encoded import Task
from rankrace.data.hub import reach_hub
from rankrace.progress import Progress
from rankrace.session import Session, chosen_device, chosen_dtype, prepare
from rankrace.training.model import is_encoder, load_model, load_tokenizer, vocabulary_size


def open_session(config: RunConfig, progress: Progress) -> tuple[Session, PreTrainedTokenizerBase]:
    """Everything up to the first step; writes nothing."""
    data, model, tokenizer, task = load(config, progress)
    progress.phase("measuring the base model")
    session = prepare(config, data, model, task)
    progress.note(session.notes)
    return session, tokenizer


def load(config: RunConfig, progress: Progress) -> tuple[Data, PreTrainedModel, PreTrainedTokenizerBase, Task]:
    """Data and model, checked; what was found is said."""
    device = chosen_device(config.device)
    dtype = chosen_dtype(config.dtype, device)
    check_quantize(config.quantize, device, dtype)
    reach_hub(config.model)
    progress.phase("reading the data")
    task = task_of(config)
    read = read_splits(config)
    tokenizer = load_tokenizer(config.model)
    data = encode_splits(read, make_encoder(config, tokenizer, task, read))
    progress.phase("loading the model")
    name = anywhere(config.model)
    model = load_model(
        name, task, data.labels, device=device, dtype=dtype, seed=config.seed, quantize_to=config.quantize
    )
    data = checked_data(data, tokenizer, task, vocabulary_size(model))
    progress.note(data.notes)
    return data, model, tokenizer, task


def anywhere(model: str) -> str:
    """A name under which the model is found from every working directory: adapter, record and report keep it."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def task_of(config: RunConfig) -> Task:
    """The task asked for, or the one the model is made for."""
    if config.task != "auto":
        return config.task
    return "classification" if is_encoder(config.model) else "causal"
