"""Examples → token ids, and which of them are targets.

Causal: the pieces of an example (see render.py) are tokenised one by one and joined, so the border between
a prompt and its answer is where it is in use: the prompt's tokens never depend on the answer. One BOS is put
in front if the tokenizer adds one and the text has none. Only answers are supervised, and the EOS after them.
The first token of an example follows nothing and is never a target.

An example longer than `max_length`, or than the tokenizer says that the model takes (512 tokens for BERT, which
has no positions beyond), is cut in this order until it fits: what follows the first answer, from the end; the
prompt, from its start (BOS stays); the first answer, from its end (its EOS is then gone).

Classification: the tokenizer's own form for a text or a pair, cut longest first; the target is the class.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from rankrace.data.encoded import NO_LABEL, Encoded, EncodedSet, Task
from rankrace.data.formats import Example, LabelledText
from rankrace.data.render import Piece, Template, render
from rankrace.data.split import group_key
from rankrace.errors import RankraceError
from rankrace.words import listed


def label_set(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels of the training rows, sorted (as numbers if all are whole numbers).

    Raises:
        RankraceError: rows without labels, or a single label.
    """
    labels = {example.label for example in examples if isinstance(example, LabelledText)}
    if len(labels) < 2:
        raise RankraceError(
            f"classification needs two labels or more (found: {', '.join(sorted(labels)) or 'none'}).",
            why="an encoder such as BERT is trained to tell classes apart, and with fewer there is nothing to tell.",
            fix="give rows with text and label columns, or for other rows a causal model such as a LLaMA.",
        )
    numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    return tuple(sorted(labels, key=int if numeric else None))


class Encoder:
    """Turns examples into tokens for one task. See the module's text for the rules."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: Task,
        max_length: int,
        template: Template = "auto",
        labels: tuple[str, ...] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.task: Task = task
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.template: Template = template
        self.labels = labels
        if task == "classification" and labels is None:
            raise ValueError("classification needs the labels")
        if template == "chat" and tokenizer.chat_template is None:
            raise RankraceError(
                "the model's tokenizer has no chat template.",
                why="--template chat renders every row with it.",
                fix="use --template plain, or the instruction-tuned variant of the model.",
            )
        if task == "causal" and tokenizer.eos_token_id is None:
            raise RankraceError(
                "the model's tokenizer has no EOS token.",
                why="a model that never sees one in training never stops.",
                fix="set eos_token in the model's tokenizer_config.json.",
            )
        self._eos = [tokenizer.eos_token_id]
        bare = self._tokenise(["a"])[0]
        full = tokenizer("a")["input_ids"]
        # What the tokenizer puts before a text: BOS, or nothing.
        self._lead: list[int] = full[: full.index(bare[0])]
        # SentencePiece tokenizers such as LLaMA's put a space before a text, even when the text goes on from
        # another one. Behind a line break they do not: such pieces are tokenised with one, then cut off.
        self._break, behind = self._tokenise(["\n", "\na"])
        size = len(self._break)
        self._adds_space = behind[:size] == self._break and behind[size:] != bare

    def encode(self, example: Example) -> Encoded:
        """One example as tokens, as row 0 of a set of its own."""
        return self.encode_batch([example])[0]

    def encode_batch(self, examples: Sequence[Example]) -> list[Encoded]:
        """Examples as tokens, in order. Those that truncation left without a target are among them.

        Raises:
            RankraceError: an example (named by its number, from 1) that cannot be encoded.
        """
        groups: dict[tuple[str, str], int] = {}
        numbers = [groups.setdefault(group_key(e), i) for i, e in enumerate(examples)]
        if self.task == "classification":
            return self._classification(examples, numbers)
        return self._causal(examples, numbers)

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return found["input_ids"]

    def _continue(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that go on from another text."""
        if not self._adds_space:
            return self._tokenise(texts)
        behind, size = self._tokenise(["\n" + text for text in texts]), len(self._break)
        return [
            ids[size:] if ids[:size] == self._break else self._tokenise([text])[0]
            for text, ids in zip(texts, behind, strict=True)
        ]

    def _causal(self, examples: Sequence[Example], groups: list[int]) -> list[Encoded]:
        rendered = [
            render(example, self.template, self.tokenizer, f"example {number}")
            for number, example in enumerate(examples, start=1)
        ]
        first = self._tokenise([pieces[0].text for pieces in rendered])
        rest = iter(self._continue([piece.text for pieces in rendered for piece in pieces[1:]]))
        encoded: list[Encoded] = []
        for row, pieces in enumerate(rendered):
            tokens = [first[row], *(next(rest) for _ in pieces[1:])]
            ids, supervised, answer = self._join(pieces, tokens)
            keep = self._cut(len(ids), answer)
            supervised = supervised[keep]
            supervised[0] = False
            truncated = len(keep) < len(ids)
            if not supervised.any() and not truncated:
                raise RankraceError(
                    f"example {row + 1} has no supervised token: {pieces[0].text[:60]!r}.",
                    why="it would teach nothing.",
                    fix="remove the row, or give it an answer that the tokenizer can write.",
                )
            encoded.append(
                Encoded(
                    input_ids=ids[keep],
                    supervised=supervised,
                    label=NO_LABEL,
                    group=groups[row],
                    row=row,
                    truncated=truncated,
                )
            )
        return encoded

    def _join(self, pieces: list[Piece], tokens: list[list[int]]) -> tuple[np.ndarray, np.ndarray, slice]:
        """All ids, which are supervised, and where the first answer is."""
        ids = [] if tokens[0][: len(self._lead)] == self._lead else list(self._lead)
        supervised = [False] * len(ids)
        answer: slice | None = None
        for piece, piece_ids in zip(pieces, tokens, strict=True):
            start = len(ids)
            ids += piece_ids
            if piece.end and ids[-1:] != self._eos:
                ids += self._eos
            supervised += [piece.supervised] * (len(ids) - start)
            if piece.supervised and answer is None:
                answer = slice(start, len(ids))
        assert answer is not None, "render gives every example an answer"
        return np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool), answer

    def _cut(self, length: int, answer: slice) -> np.ndarray:
        """Indices of the tokens that stay."""
        end = min(length, max(self.max_length, answer.stop))
        excess = max(0, end - self.max_length)
        lead = len(self._lead)
        begin = max(lead, min(lead + excess, answer.start))
        keep = np.concatenate([np.arange(lead), np.arange(begin, end)])
        return keep[: self.max_length]

    def _classification(self, examples: Sequence[Example], groups: list[int]) -> list[Encoded]:
        assert self.labels is not None
        index = {label: i for i, label in enumerate(self.labels)}
        labelled = [example for example in examples if isinstance(example, LabelledText)]
        if len(labelled) < len(examples):
            raise RankraceError(
                "classification needs rows with text and label columns.",
                why="these rows have no class.",
                fix="give labelled rows, or use --task causal with a causal model.",
            )
        unknown = next((row for row, example in enumerate(labelled) if example.label not in index), None)
        if unknown is not None:
            raise RankraceError(
                f"example {unknown + 1} has a label that no training row has: '{labelled[unknown].label}'.",
                why=f"the model knows the labels of the training rows only: {listed(self.labels)}.",
                fix="correct the label, or add training rows with it.",
            )
        whole = self._with_specials(labelled, None)
        long = [row for row, (ids, _) in enumerate(whole) if len(ids) > self.max_length]
        short = dict(zip(long, self._with_specials([labelled[row] for row in long], self.max_length), strict=True))
        encoded: list[Encoded] = []
        for row, example in enumerate(labelled):
            ids, types = short.get(row, whole[row])
            encoded.append(
                Encoded(
                    input_ids=np.array(ids, dtype=np.int32),
                    supervised=np.zeros(len(ids), dtype=bool),
                    label=index[example.label],
                    group=groups[row],
                    row=row,
                    truncated=row in short,
                    token_types=None if types is None else np.array(types, dtype=np.int32),
                )
            )
        return encoded

    def _with_specials(
        self, examples: list[LabelledText], max_length: int | None
    ) -> list[tuple[list[int], list[int] | None]]:
        """Token ids and token types in the tokenizer's own form for classification."""
        if not examples:
            return []
        pairs = [example.text_pair for example in examples if example.text_pair is not None]
        found = self.tokenizer(
            [example.text for example in examples],
            pairs or None,
            truncation=False if max_length is None else "longest_first",
            max_length=max_length,
            return_attention_mask=False,
            verbose=False,
        )
        types = found.get("token_type_ids") or [None] * len(examples)
        return list(zip(found["input_ids"], types, strict=True))


def encode_all(examples: Sequence[Example], encoder: Encoder) -> EncodedSet:
    """Encode one side of the split, without the examples that truncation left no target of.

    Raises:
        RankraceError: an example cannot be encoded, or none is left.
    """
    encoded = encoder.encode_batch(examples)
    if encoder.task == "causal":
        kept = [example for example in encoded if example.supervised.any()]
        targets = sum(int(example.supervised.sum()) for example in kept)
    else:
        kept, targets = encoded, len(encoded)
    if not kept:
        raise RankraceError(
            f"none of {len(encoded)} examples has a target left when cut to {encoder.max_length} tokens.",
            why="training on nothing gives a loss of zero and gradients that are not numbers.",
            fix="raise --max-length.",
        )
    return EncodedSet(
        examples=kept,
        truncated=sum(example.truncated for example in encoded),
        dropped=len(encoded) - len(kept),
        supervised_tokens=targets,
    )
