"""Held-out rows: no copies of training rows, whole documents, and whatever the order of the rows."""

import random

import pytest

from rankrace.data.formats import (
    Conversation,
    Example,
    LabelledText,
    Message,
    PlainText,
    PromptCompletion,
)
from rankrace.data.split import Splits, content_key, draw, split_examples
from rankrace.errors import RankraceError


def texts(count: int) -> list[Example]:
    return [PlainText(f"text {i}") for i in range(count)]


def documents(sizes: list[int]) -> list[Example]:
    return [PlainText(f"text {d} {i}", group=f"doc {d}") for d, size in enumerate(sizes) for i in range(size)]


def assert_disjoint(splits: Splits) -> None:
    train, validation = ({content_key(e) for e in side} for side in (splits.train, splits.validation))
    assert train
    assert validation
    assert not train & validation
    groups = {e.group for e in splits.train} & {e.group for e in splits.validation}
    assert groups <= {None}


def test_share_and_completeness() -> None:
    splits = split_examples(texts(200), None, 0.1, 1000, seed=3)
    assert_disjoint(splits)
    assert len(splits.validation) == 20
    assert sorted(splits.train + splits.validation, key=content_key) == sorted(texts(200), key=content_key)
    assert splits.train == sorted(splits.train, key=texts(200).index), "the order of the rows is kept"


def test_rows_held_out_are_measured_or_trained_on() -> None:
    splits = split_examples(texts(200), None, 0.5, 30, seed=0)
    assert (len(splits.train), len(splits.validation)) == (170, 30)


@pytest.mark.parametrize("seed", range(5))
def test_the_split_does_not_depend_on_the_order_of_the_rows(seed: int) -> None:
    rows = documents([1, 5, 2, 8, 3, 3, 9, 1, 4, 4]) + texts(30) + texts(10)
    shuffled = random.Random(seed).sample(rows, len(rows))
    one, other = (split_examples(side, None, 0.2, 10, seed=seed) for side in (rows, shuffled))
    assert_disjoint(one)
    for a, b in ((one.train, other.train), (one.validation, other.validation)):
        assert sorted(a, key=content_key) == sorted(b, key=content_key)


def test_seeds_give_other_splits() -> None:
    chosen = {
        tuple(content_key(e) for e in split_examples(texts(100), None, 0.1, 99, s).validation) for s in range(5)
    }
    assert len(chosen) == 5


@pytest.mark.parametrize("seed", range(5))
def test_copies_never_straddle(seed: int) -> None:
    copies: list[Example] = [PlainText(f"Text  {i}\n") for i in range(40)]
    splits = split_examples(texts(40) + copies, None, 0.3, 1000, seed=seed)
    assert_disjoint(splits)
    assert len(splits.validation) == 24
    assert splits.dropped_duplicates == 0


@pytest.mark.parametrize("seed", range(5))
def test_documents_stay_whole(seed: int) -> None:
    rows = documents([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    splits = split_examples(rows, None, 0.25, 1000, seed=seed)
    assert_disjoint(splits)
    assert len(splits.train) + len(splits.validation) == len(rows)
    assert 0 < len(splits.validation) <= round(0.25 * len(rows))


def test_a_drawn_document_leaves_the_training_rows_whole() -> None:
    splits = split_examples(documents([10, 10, 10, 10]), None, 0.5, 5, seed=0)
    assert_disjoint(splits)
    assert (len(splits.train), len(splits.validation)) == (20, 5)


def test_documents_larger_than_the_share_give_the_smallest() -> None:
    splits = split_examples(documents([50, 10, 40]), None, 0.05, 1000, seed=0)
    assert {e.group for e in splits.validation} == {"doc 1"}


def test_copies_in_other_documents_leave_the_validation_rows() -> None:
    rows = [PlainText(f"shared {i}", group=f"doc {d}") for d in range(2) for i in range(5)]
    with pytest.raises(RankraceError, match="every row that was held out is also a training row"):
        split_examples(rows, None, 0.5, 100, seed=0)
    own = [PlainText(f"own {d}", group=f"doc {d}") for d in range(2)]
    splits = split_examples(rows + own, None, 0.5, 100, seed=0)
    assert_disjoint(splits)
    assert (len(splits.validation), splits.dropped_duplicates) == (1, 5)


def test_given_validation_rows_lose_copies_of_training_rows() -> None:
    given: list[Example] = [PlainText("TEXT 3"), PlainText("new 1"), PlainText("new 2")]
    splits = split_examples(texts(10), given, 0.1, 1000, seed=0)
    assert splits.train == texts(10)
    assert splits.validation == given[1:]
    assert splits.dropped_duplicates == 1
    assert len(split_examples(texts(10), given, 0.1, 1, seed=0).validation) == 1
    with pytest.raises(RankraceError, match="validation rows are also among"):
        split_examples(texts(10), texts(5), 0.1, 1000, seed=0)


@pytest.mark.parametrize("seed", range(8))
def test_no_class_is_held_out_whole(seed: int) -> None:
    """Nobody could learn it, and the run would end with an error about a label that is right."""
    rows = [LabelledText(f"text {i}", None, "often") for i in range(30)]
    rows += [LabelledText(f"rare {i}", None, f"class {i // 2}") for i in range(24)]
    rows += [LabelledText("only one", None, "single")]
    splits = split_examples(rows, None, 0.4, 1000, seed)
    classes = [{e.label for e in side if isinstance(e, LabelledText)} for side in (splits.train, splits.validation)]
    assert classes[0] == {row.label for row in rows}
    assert len(classes[1]) > 5
    assert len(splits.validation) == 22
    assert_disjoint(splits)


def test_questions_with_two_answers_are_said_of_rows_held_out_too() -> None:
    rows = [PromptCompletion(f"question {i // 2}", f"answer {i}") for i in range(40)]
    (said,) = split_examples(rows, None, 0.2, 1000, seed=0).leaks
    assert "have the question or text of a training row, with another answer" in said
    assert split_examples(texts(40), None, 0.2, 1000, seed=0).leaks == ()


def test_too_few_groups() -> None:
    for rows in (texts(1), texts(1) * 10, documents([10])):
        with pytest.raises(RankraceError, match="cannot be split"):
            split_examples(rows, None, 0.1, 1000, seed=0)
    for fraction in (0.001, 0.999):
        assert_disjoint(split_examples(texts(2), None, fraction, 1000, seed=0))


def test_draw() -> None:
    drawn = draw(texts(50), 10, seed=1)
    assert drawn == [e for e in texts(50) if e in drawn], "the order of the rows is kept"
    assert len(drawn) == 10
    assert sorted(draw(texts(50)[::-1], 10, seed=1), key=content_key) == sorted(drawn, key=content_key)
    assert draw(texts(50), 10, seed=2) != drawn
    assert draw(texts(5), None, 0) == draw(texts(5), 5, 0) == texts(5)


def test_content_key_sees_every_part() -> None:
    messages = Message("user", "a"), Message("assistant", "b")
    different: list[Example] = [
        PromptCompletion("a", "b"),
        PromptCompletion("a", "c"),
        PromptCompletion("ab", ""),
        Conversation(messages),
        Conversation(messages[::-1]),
        LabelledText("a", None, "c"),
        LabelledText("a", "b", "c"),
        LabelledText("a", "b", "d"),
        PlainText("a"),
    ]
    assert len({content_key(example) for example in different}) == len(different)
    assert content_key(PlainText(" A\n b ")) == content_key(PlainText("a B", group="x"))


def test_what_given_validation_rows_share_with_training_rows_is_said() -> None:
    """No copies, but the same documents, or the same questions with other answers."""
    train: list[Example] = [
        PromptCompletion("Who wrote it?", "Ada", group="a"),
        PromptCompletion("When?", "1843", group="b"),
        LabelledText("good  film", None, "1"),
        Conversation((Message("user", "Hi"), Message("assistant", "Hello"))),
        PlainText("a text"),
    ]
    validation: list[Example] = [
        PromptCompletion("Where?", "London", group="a"),
        PromptCompletion("who wrote  it?", "Babbage"),
        LabelledText("Good film", None, "0"),
        Conversation((Message("user", "hi"), Message("assistant", "Good day"))),
        PlainText("another text"),
        PromptCompletion("Why?", "For a lecture", group="c"),
    ]
    splits = split_examples(train, validation, 0.1, 100, seed=0)
    assert len(splits.validation) == 6, "only told"
    of_documents, of_questions = splits.leaks
    assert of_documents.startswith("1 of the 6 validation rows are of documents of training rows:")
    assert of_questions.startswith(
        "3 of the 6 validation rows have the question or text of a training row, with another answer:"
    )
    assert split_examples(train, validation[-2:], 0.1, 100, seed=0).leaks == ()
    assert split_examples(documents([3, 3, 3, 3]), None, 0.3, 100, seed=0).leaks == ()
