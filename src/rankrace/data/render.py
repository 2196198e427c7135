r"""An example → pieces of text, each supervised or not. For causal language modelling.

Plain text
    prompt+completion    {prompt}[{completion}][EOS]
    text+label           {text}\n{text_pair}\nLabel:[ {label}][EOS]
    text                 [{text}][EOS]
    a conversation       System: {content}\n\nUser: {content}\n\nAssistant:[ {content}][EOS]\n\nUser: ...
Chat template
    whatever the tokenizer's template says; supervised is each assistant turn from where the generation prompt
    ends up to and with the token that ends the turn.

In [brackets]: supervised. An assistant message that opens a conversation answers nothing and is context only.
"""

from dataclasses import dataclass
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from rankrace.data.formats import Conversation, Example, LabelledText, Message, PlainText, PromptCompletion
from rankrace.errors import RankraceError

Template = Literal["auto", "chat", "plain"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text. `end`: an EOS token follows, supervised, unless the text itself ends with one."""

    text: str
    supervised: bool
    end: bool = False


def uses_chat(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Does this example go through the tokenizer's chat template? Plain text never does."""
    if template == "auto":
        return isinstance(example, Conversation) and tokenizer.chat_template is not None
    return template == "chat" and not isinstance(example, PlainText)


def render(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase, where: str) -> list[Piece]:
    """The example's text in pieces.

    Raises:
        RankraceError: the chat template refuses the conversation or is not stable under prefixes.
    """
    if uses_chat(example, template, tokenizer):
        return _chat(_as_messages(example), tokenizer, where)
    match example:
        case PromptCompletion():
            return [Piece(example.prompt, False), Piece(example.completion, True, end=True)]
        case LabelledText():
            return [Piece(_question(example) + "\nLabel:", False), Piece(f" {example.label}", True, end=True)]
        case PlainText():
            return [Piece(example.text, True, end=True)]
        case Conversation():
            return _plain_conversation(example.messages)


def _question(example: LabelledText) -> str:
    return example.text if example.text_pair is None else f"{example.text}\n{example.text_pair}"


def _as_messages(example: Example) -> tuple[Message, ...]:
    match example:
        case Conversation():
            return example.messages
        case PromptCompletion():
            pair = (example.prompt.strip(), example.completion.strip())
        case LabelledText():
            pair = (_question(example), example.label)
        case PlainText():
            raise AssertionError("plain text has no turns")
    return Message("user", pair[0]), Message("assistant", pair[1])


def _plain_conversation(messages: tuple[Message, ...]) -> list[Piece]:
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        lead = ("\n\n" if number else "") + f"{message.role.capitalize()}:"
        if message.role == "assistant" and number:
            pieces += [Piece(lead, False), Piece(f" {message.content}", True, end=True)]
        else:
            pieces.append(Piece(f"{lead} {message.content}", False))
    return pieces


def _chat(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase, where: str) -> list[Piece]:
    turns = [{"role": message.role, "content": message.content} for message in messages]

    def text_of(first: int, *, prompt: bool = False) -> str:
        try:
            text = tokenizer.apply_chat_template(turns[:first], tokenize=False, add_generation_prompt=prompt)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise RankraceError(
                f"{where}: the model's chat template refuses the conversation: {error}.",
                why="templates may demand alternating roles or have no system role.",
                fix="change the messages, or render them without the template: --template plain.",
            ) from error
        assert isinstance(text, str)
        return text

    whole = text_of(len(turns))
    pieces: list[Piece] = []
    done = 0
    for number, message in enumerate(messages):
        if message.role != "assistant" or number == 0:
            continue
        prompt, answered = text_of(number, prompt=True), text_of(number + 1)
        if not (answered.startswith(prompt) and whole.startswith(answered)):
            raise RankraceError(
                f"{where}: the model's chat template rewrites earlier turns (at message {number + 1}).",
                why="the text before an answer in training must be what the model answers to in use.",
                fix="give one assistant message a row, the last one, or use --template plain.",
            )
        # White space after the token that ends a turn belongs to the template's layout, not to the answer.
        end = len(answered.rstrip())
        pieces += [Piece(whole[done : len(prompt)], False), Piece(whole[len(prompt) : end], True)]
        done = end
    last = pieces[-1]
    # What follows the last answer (a further user turn, white space) is not learned and not needed.
    return [*pieces[:-1], Piece(last.text, True, end=True)]
