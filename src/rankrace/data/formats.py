r"""The one form of a row: whatever shape a data set has, each row becomes one `Example`.

| shape             | columns                                                            | becomes          |
|-------------------|--------------------------------------------------------------------|------------------|
| messages          | messages: [{role, content}] or conversations: [{from, value}]      | Conversation     |
| prompt+completion | prompt, completion (or response)                                   | PromptCompletion |
| alpaca            | instruction, output (or response); input (or context) if any       | Conversation     |
| squad             | question, context, answers: {text: [...]}; title groups the rows   | PromptCompletion |
| question+answer   | question, answer; passage (or context), options, answer_idx if any | PromptCompletion |
| document+summary  | document (or article), summary (or highlights)                     | PromptCompletion |
| text+label        | text, sentence or a pair (sentence1+sentence2, premise+hypothesis, | LabelledText     |
|                   | question1+question2, question+sentence, text+text_pair); label     |                  |
| text              | text                                                               | PlainText        |

The first shape whose columns are all there wins; other columns are ignored. A question becomes

    {passage}\n\nQuestion: {question}\n{options, one a line}\\nAnswer:

without the parts that a row lacks, and its completion is a space and the answer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rankrace.data.rows import Row, kind_of
from rankrace.errors import RankraceError

UNANSWERABLE = "unanswerable"
"""The completion of a SQuAD 2.0 question without an answer."""


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and the text that shall follow it, joined as they are."""

    prompt: str
    completion: str
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The role is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order, with at least one assistant turn that follows another turn."""

    messages: tuple[Message, ...]
    group: str | None = None


@dataclass(frozen=True, slots=True)
class LabelledText:
    """A text, or a pair of texts, and its class."""

    text: str
    text_pair: str | None
    label: str
    group: str | None = None


@dataclass(frozen=True, slots=True)
class PlainText:
    """Text to be modelled as it is."""

    text: str
    group: str | None = None


Example = PromptCompletion | Conversation | LabelledText | PlainText


@dataclass(frozen=True, slots=True)
class Format:
    """A known shape: its columns (each with the names it may have) and how a row of it is read."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Row, str | None], Example]


def _messages(row: Row, group: str | None) -> Conversation:
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
    column, turns = row.value("messages", "conversations")
    if not isinstance(turns, list) or not turns:
        row.fault(f"'{column}' must be a list of messages and is {kind_of(turns)}, or empty.")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        place = f"{row.where}, message {number}"
        if not isinstance(turn, dict):
            Row({}, place).fault(f"a message must be {{role, content}} and is {kind_of(turn)}.")
        inner = Row(turn, place)
        role = inner.text("role", "from")
        role = roles.get(role, role)
        if role not in ("system", "user", "assistant", "tool"):
            inner.fault(f"the role '{role}' is not known.", "use system, user, assistant or tool.")
        messages.append(Message(role, inner.text("content", "value")))
    if all(message.role != "assistant" for message in messages[1:]):
        row.fault("no assistant message follows another message: there is nothing to learn.")
    return Conversation(tuple(messages), group)


def _prompt_completion(row: Row, group: str | None) -> PromptCompletion:
    return PromptCompletion(row.text("prompt"), row.text("completion", "response"), group)


def _alpaca(row: Row, group: str | None) -> Conversation:
    request = row.text("instruction")
    if row.has("input", "context"):
        request += "\n\n" + row.text("input" if row.has("input") else "context")
    return Conversation((Message("user", request), Message("assistant", row.text("output", "response"))), group)


def _options(row: Row) -> dict[str, str]:
    """Answer options by their letter, from {"A": ...} or [...]."""
    options = row.values["options"]
    if isinstance(options, list):
        options = {chr(ord("A") + i): option for i, option in enumerate(options)}
    if not isinstance(options, dict) or not all(isinstance(option, str) for option in options.values()):
        row.fault(f"'options' must be text, a list or a dict of texts and is {kind_of(options)}.")
    return options


def _question_prompt(row: Row, passage: str | None, options: str | None) -> str:
    question = f"Question: {row.text('question').strip()}\n"
    return (f"{passage.strip()}\n\n" if passage else "") + question + (f"{options}\n" if options else "") + "Answer:"


def _squad(row: Row, group: str | None) -> PromptCompletion:
    answers = row.values["answers"]
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list):
        row.fault(f"'answers' must be {{text: [...]}} and is {kind_of(answers)}.")
    answer = Row({"answer": answers["text"][0]}, row.where).text("answer") if answers["text"] else UNANSWERABLE
    if group is None and row.has("title"):
        group = row.name("title")
    return PromptCompletion(_question_prompt(row, row.text("context"), None), f" {answer.strip()}", group)


def _question_answer(row: Row, group: str | None) -> PromptCompletion:
    passage = row.text("passage" if row.has("passage") else "context") if row.has("passage", "context") else None
    answer, options = row.name("answer"), None
    if row.has("options"):
        if isinstance(row.values["options"], str):
            options = row.text("options").strip()
        else:
            by_letter = _options(row)
            options = "\n".join(f"{letter}. {option}" for letter, option in by_letter.items())
            letters = [letter for letter, option in by_letter.items() if answer in (letter, option.strip())]
            if row.has("answer_idx"):
                letters = [row.text("answer_idx")]
            if not letters or letters[0] not in by_letter:
                row.fault(f"the answer '{answer}' is none of the options.")
            answer = f"{letters[0]}. {by_letter[letters[0]].strip()}"
    return PromptCompletion(_question_prompt(row, passage, options), f" {answer}", group)


def _summary(row: Row, group: str | None) -> PromptCompletion:
    prompt = row.text("document", "article").strip() + "\n\nSummary:"
    return PromptCompletion(prompt, " " + row.text("summary", "highlights").strip(), group)


LABEL = ("label", "Quality")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("#1 String", "#2 String"),
    ("question", "sentence"),
    ("text", "text_pair"),
)


def _labelled_pair(first: str, second: str) -> Callable[[Row, str | None], LabelledText]:
    return lambda row, group: LabelledText(row.text(first), row.text(second), row.name(*LABEL), group)


def _labelled(row: Row, group: str | None) -> LabelledText:
    return LabelledText(row.text("text", "sentence"), None, row.name(*LABEL), group)


FORMATS = (
    Format("messages", (("messages", "conversations"),), _messages),
    Format("prompt+completion", (("prompt",), ("completion", "response")), _prompt_completion),
    Format("alpaca", (("instruction",), ("output", "response")), _alpaca),
    Format("squad", (("question",), ("context",), ("answers",)), _squad),
    Format("question+answer", (("question",), ("answer",)), _question_answer),
    Format("document+summary", (("document", "article"), ("summary", "highlights")), _summary),
    *(Format("text+label", ((a,), (b,), LABEL), _labelled_pair(a, b)) for a, b in PAIRS),
    Format("text+label", (("text", "sentence"), LABEL), _labelled),
    Format("text", (("text",),), lambda row, group: PlainText(row.text("text"), group)),
)


def find_format(columns: Iterable[str]) -> Format | None:
    """The first known shape whose columns are all among these."""
    seen = set(columns)
    return next((shape for shape in FORMATS if all(seen & set(names) for names in shape.needs)), None)


def detect(columns: Iterable[str], where: str) -> Format:
    """The shape that these columns have.

    Raises:
        RankraceError: it is none of the known ones.
    """
    columns = list(columns)
    shape = find_format(columns)
    if shape is None:
        known = "; ".join(" + ".join("|".join(names) for names in known.needs) for known in FORMATS)
        raise RankraceError(
            f"{where}: the columns {', '.join(map(repr, columns))} are none of the known shapes.",
            why="rankrace must know which text is the prompt and which is the answer.",
            fix=f"{near_miss(columns)}rename the columns to one of these: {known}.",
        )
    return shape


def near_miss(columns: Sequence[str]) -> str:
    """What to do first, where it is likely what is wrong; else nothing."""
    if len(columns) == 1 and (marks := [mark for mark in ";\t|" if mark in columns[0]]):
        return f"save the file with commas (its columns seem to be separated by {marks[0]!r}), or "
    plain = [column.strip().casefold() for column in columns]
    if find_format(plain):
        return f"write the columns as {', '.join(plain)}, or "
    return ""


def read_examples(
    rows: list[dict[str, Any]], where: str, group_column: str | None = None
) -> tuple[str, list[Example]]:
    """Read rows of one shape, detected from the first of them.

    Args:
        where: what the rows are called in messages: a file, or a data set and its split.
        group_column: the column that names a row's document.

    Raises:
        RankraceError: unknown columns, or a row (named by its number, from 1) that gives no example.
    """
    if not rows:
        raise RankraceError(f"{where} has no rows.", why="there is nothing to learn from.", fix="add rows to it.")
    shape = detect(rows[0], where)
    if group_column is not None and group_column not in rows[0]:
        raise RankraceError(
            f"{where} has no column '{group_column}' (seen: {', '.join(rows[0])}).",
            why="group_column keeps the rows of one document on one side of the split.",
            fix="name one of the columns seen, or leave group_column out.",
        )
    examples: list[Example] = []
    for number, values in enumerate(rows, start=1):
        row = Row(values, f"{where}, row {number}")
        examples.append(shape.read(row, row.name(group_column) if group_column else None))
    return shape.name, examples
