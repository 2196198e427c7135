"""Which rows are held out. The choice depends on the seed and on what the rows say, not on their order.

Rows of one group (a document) stay on one side. Rows without a group are grouped by what they say, so that
copies of a row never straddle the split.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from rankrace.data.formats import Conversation, Example, LabelledText, PlainText, PromptCompletion
from rankrace.errors import RankraceError
from rankrace.words import counted


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The two sides, rows in their original order."""

    train: list[Example]
    validation: list[Example]
    dropped_duplicates: int
    """Validation rows left out because the training rows hold a copy."""
    how: str
    """A sentence for the user: where the validation rows come from."""
    leaks: tuple[str, ...] = ()
    """What validation rows that were given share with training rows, beside copies; sentences for the user."""


def content_key(example: Example) -> str:
    """What a row says, in lower case and with single spaces: equal for copies of a row."""
    match example:
        case PromptCompletion():
            parts = (example.prompt, example.completion)
        case Conversation():
            parts = tuple(part for m in example.messages for part in (m.role, m.content))
        case LabelledText():
            parts = (example.text, example.text_pair or "", example.label)
        case PlainText():
            parts = (example.text,)
    return said(parts)


def question_key(example: Example) -> str | None:
    """A row without its answer; None where it has none."""
    match example:
        case PromptCompletion():
            parts = (example.prompt,)
        case Conversation():
            parts = tuple(part for m in example.messages[:-1] for part in (m.role, m.content))
        case LabelledText():
            parts = (example.text, example.text_pair or "")
        case PlainText():
            parts = ()
    return said(parts) if any(part.strip() for part in parts) else None


def said(parts: Sequence[str]) -> str:
    """In lower case and with single spaces."""
    return "\x1f".join(" ".join(part.split()).casefold() for part in parts)


def group_key(example: Example) -> tuple[str, str]:
    """Equal for rows of one document; of rows without one, for copies."""
    return ("text", content_key(example)) if example.group is None else ("group", example.group)


def _shuffle_key(seed: int, text: str) -> bytes:
    """A random but repeatable place in the order of all texts."""
    return blake2b(f"{seed}\x1f{text}".encode(errors="surrogatepass"), digest_size=16).digest()


def draw(examples: Sequence[Example], maximum: int | None, seed: int) -> list[Example]:
    """At most `maximum` of the rows, drawn by the seed, in their original order."""
    if maximum is None or len(examples) <= maximum:
        return list(examples)
    places = sorted(range(len(examples)), key=lambda i: _shuffle_key(seed, content_key(examples[i])))
    return [examples[i] for i in sorted(places[:maximum])]


def split_examples(
    train: Sequence[Example],
    validation: Sequence[Example] | None,
    fraction: float,
    maximum: int,
    seed: int,
) -> Splits:
    """Hold out validation rows, or clean the ones that are given.

    With `validation`: copies of training rows leave it, and at most `maximum` rows are drawn from the rest.
    Without: whole groups are held out in an order drawn by the seed, up to `fraction` of the rows (a group
    that would overshoot is passed over); at most `maximum` rows of them are drawn, and a held-out group with
    no row drawn goes back to the training rows.

    Raises:
        RankraceError: a side would be empty.
    """
    if validation is None:
        return _hold_out(train, fraction, maximum, seed)
    known = {content_key(example) for example in train}
    fresh = [example for example in validation if content_key(example) not in known]
    if not train or not fresh:
        raise RankraceError(
            f"all {len(validation)} validation rows are also among the {len(train)} training rows."
            if train and validation
            else f"there are {len(train)} training and {len(validation)} validation rows.",
            why="validation rows that are also training rows measure memory, so they are left out.",
            fix="give other validation rows, or none: then a part of the training rows is held out.",
        )
    drawn = draw(fresh, maximum, seed)
    how = f"{len(drawn):,} of {len(validation):,} given validation rows"
    dropped = len(validation) - len(fresh)
    return Splits(train=list(train), validation=drawn, dropped_duplicates=dropped, how=how, leaks=leaks(train, drawn))


def leaks(train: Sequence[Example], validation: Sequence[Example]) -> tuple[str, ...]:
    """What makes a validation loss better than that of new rows, though no row is a copy."""
    documents = {e.group for e in train if e.group is not None}
    questions = {key for e in train if (key := question_key(e)) is not None}
    found = {
        "are of documents of training rows": sum(e.group in documents for e in validation),
        "have the question or text of a training row, with another answer": sum(
            question_key(e) in questions for e in validation
        ),
    }
    return tuple(
        f"{count:,} of the {len(validation):,} validation rows {words}: what is learnt by heart there tells here, so "
        "their losses are not those of new rows."
        for words, count in found.items()
        if count
    )


def _hold_out(examples: Sequence[Example], fraction: float, maximum: int, seed: int) -> Splits:
    keys = [content_key(example) for example in examples]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        groups[group_key(example)].append(i)
    if len(groups) < 2:
        raise RankraceError(
            f"{counted(len(examples), 'row')} in {counted(len(groups), 'group')} cannot be split into training and "
            "validation.",
            why="rows of one document, and copies of one row, stay on one side.",
            fix="give more rows, another --group-column if there is one, or a file with --validation.",
        )
    order = sorted(groups, key=lambda group: _shuffle_key(seed, "\x1f".join(group)))
    wanted = max(1, min(round(fraction * len(examples)), len(examples) - 1))
    held_out: list[int] = []
    left = Counter(example.label for example in examples if isinstance(example, LabelledText))
    for group in order:
        members = groups[group]
        taken = Counter(row.label for i in members if isinstance(row := examples[i], LabelledText))
        # No class may go from the training rows: nobody could learn it.
        if len(held_out) + len(members) <= wanted and all(left[label] > n for label, n in taken.items()):
            held_out += members
            left -= taken
    if not held_out:  # every group is larger than the share wanted, or all there is of a class
        held_out = groups[min(order, key=lambda group: len(groups[group]))]

    held_out.sort(key=lambda i: _shuffle_key(seed, keys[i]))
    drawn = set(held_out[:maximum])
    measured = {i for members in groups.values() if not drawn.isdisjoint(members) for i in members}
    train = [example for i, example in enumerate(examples) if i not in measured]
    known = {keys[i] for i in range(len(examples)) if i not in measured}
    validation = [examples[i] for i in sorted(drawn) if keys[i] not in known]
    if not validation:
        raise RankraceError(
            "every row that was held out is also a training row.",
            why="the documents are copies of each other.",
            fix="remove the copies, or give a file with --validation.",
        )
    unit = "rows" if len(groups) == len(examples) else "whole groups of rows"
    return Splits(
        train=train,
        validation=validation,
        dropped_duplicates=len(drawn) - len(validation),
        how=f"{len(validation):,} of {len(examples):,} rows held out, as {unit}, by seed {seed}",
        leaks=leaks(train, validation),
    )
