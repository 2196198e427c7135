"""Every shape of row becomes the example that the table in formats.py promises; every fault names its row."""

from typing import Any

import pytest

from rankrace.data.formats import (
    FORMATS,
    Conversation,
    Example,
    LabelledText,
    Message,
    PlainText,
    PromptCompletion,
    read_examples,
)
from rankrace.errors import RankraceError

TALK = (Message("user", "Hi"), Message("assistant", "Hello"))

SHAPES: list[tuple[str, dict[str, Any], Example]] = [
    ("prompt+completion", {"prompt": "2+2=", "completion": "4"}, PromptCompletion("2+2=", "4")),
    ("prompt+completion", {"prompt": "2+2=", "response": "4"}, PromptCompletion("2+2=", "4")),
    (
        "question+answer",
        {"question": "Why? ", "answer": " So."},
        PromptCompletion("Question: Why?\nAnswer:", " So."),
    ),
    (
        "question+answer",
        {"passage": "It rains.", "question": "Wet?", "answer": True},
        PromptCompletion("It rains.\n\nQuestion: Wet?\nAnswer:", " True"),
    ),
    (
        "question+answer",
        {"question": "Q?", "options": "A. x\nB. y", "answer": "B. y", "context": ""},
        PromptCompletion("Question: Q?\nA. x\nB. y\nAnswer:", " B. y"),
    ),
    (
        "question+answer",  # MedQA
        {"question": "Q?", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"},
        PromptCompletion("Question: Q?\nA. x\nB. y\nAnswer:", " B. y"),
    ),
    (
        "question+answer",
        {"question": "Q?", "options": ["x", "y"], "answer": "x"},
        PromptCompletion("Question: Q?\nA. x\nB. y\nAnswer:", " A. x"),
    ),
    (
        "squad",
        {"title": "T", "context": "C.", "question": "Q?", "answers": {"text": ["a", "b"]}},
        PromptCompletion("C.\n\nQuestion: Q?\nAnswer:", " a", group="T"),
    ),
    (
        "squad",
        {"context": "C.", "question": "Q?", "answers": {"text": [], "answer_start": []}},
        PromptCompletion("C.\n\nQuestion: Q?\nAnswer:", " unanswerable"),
    ),
    (
        "document+summary",
        {"document": "Long.", "summary": "S."},
        PromptCompletion("Long.\n\nSummary:", " S."),
    ),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, Conversation(TALK)),
    (
        "alpaca",
        {"instruction": "Translate", "input": "Bonjour", "output": "Hello"},
        Conversation((Message("user", "Translate\n\nBonjour"), Message("assistant", "Hello"))),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        Conversation(TALK),
    ),
    (
        "messages",  # ShareGPT
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        Conversation(TALK),
    ),
    ("text+label", {"text": "Good", "label": 1}, LabelledText("Good", None, "1")),
    ("text+label", {"sentence": "Good", "label": " pos "}, LabelledText("Good", None, "pos")),
    ("text+label", {"sentence1": "a", "sentence2": "b", "label": "x"}, LabelledText("a", "b", "x")),
    ("text+label", {"premise": "a", "hypothesis": "b", "label": 0}, LabelledText("a", "b", "0")),
    ("text+label", {"question1": "a", "question2": "b", "label": 0}, LabelledText("a", "b", "0")),
    ("text+label", {"question": "a", "sentence": "b", "label": 0}, LabelledText("a", "b", "0")),
    ("text+label", {"Quality": "1", "#1 String": "a", "#2 String": "b"}, LabelledText("a", "b", "1")),
    ("text", {"text": "Once upon a time", "id": 7}, PlainText("Once upon a time")),
]


@pytest.mark.parametrize(("name", "row", "expected"), SHAPES)
def test_each_shape(name: str, row: dict[str, Any], expected: Example) -> None:
    assert read_examples([row], "here") == (name, [expected])


def test_every_format_is_tested() -> None:
    assert {name for name, _, _ in SHAPES} == {shape.name for shape in FORMATS}


def test_group_column() -> None:
    rows = [{"text": "a", "doc": "x"}, {"text": "b", "doc": 3}]
    assert [example.group for example in read_examples(rows, "here", "doc")[1]] == ["x", "3"]
    squad = {"title": "T", "context": "C.", "question": "Q?", "answers": {"text": ["a"]}, "doc": "x"}
    assert read_examples([squad], "here", "doc")[1][0].group == "x"
    with pytest.raises(RankraceError, match=r"no column 'dok' .*text, doc"):
        read_examples(rows, "here", "dok")


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": "a", "completion": None}, "'completion' must be text and is missing"),
    ({"prompt": ["a"], "completion": "b"}, "'prompt' must be text and is of type list"),
    ({"prompt": "a"}, "there is no column completion or response"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_faulty_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RankraceError, match=f"here, row 2: {message}"):
        read_examples([{"prompt": "a", "completion": "b"}, row], "here")


TURN = {"role": "user", "content": "Hi"}
FIRST_ROW_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"text": "a", "label": 0.5}, "'label' is 0.5, a decimal number"),
    ({"text": "a", "label": None}, "'label' must be text and is missing"),
    ({"messages": []}, "must be a list of messages"),
    ({"messages": "Hi"}, "must be a list of messages"),
    ({"messages": [TURN]}, "no assistant message follows another"),
    ({"messages": [{"role": "assistant", "content": "Hello"}]}, "no assistant message follows another"),
    ({"messages": [TURN, "x"]}, r"message 2: a message must be \{role, content\} and is of type str"),
    ({"messages": [{"role": "boss", "content": "Hi"}]}, "message 1: the role 'boss' is not known"),
    ({"messages": [TURN, {"role": "assistant", "content": None}]}, "message 2: 'content' must be text"),
    ({"question": "Q", "options": {"A": "x"}, "answer": "y"}, "the answer 'y' is none of the options"),
    ({"question": "Q", "options": {"A": "x"}, "answer": "y", "answer_idx": "B"}, "none of the options"),
    ({"question": "Q", "options": 3, "answer": "y"}, "'options' must be text"),
    ({"question": "Q", "context": "C", "answers": ["x"]}, "'answers' must be"),
    ({"question": "Q", "context": "C", "answers": {"text": [" "]}}, "'answer' is empty"),
]


@pytest.mark.parametrize(("row", "message"), FIRST_ROW_FAULTS)
def test_faulty_values(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RankraceError, match=f"here, row 1.*{message}"):
        read_examples([row], "here")


def test_unknown_columns_are_listed_beside_the_known_shapes() -> None:
    with pytest.raises(RankraceError) as caught:
        read_examples([{"foo": 1, "bar": 2}], "here")
    assert "'foo', 'bar'" in caught.value.what
    assert "prompt + completion|response" in caught.value.fix


def test_no_rows() -> None:
    with pytest.raises(RankraceError, match="here has no rows"):
        read_examples([], "here")
