"""Each fault that must never be trained on silently is raised; what may be meant is found."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rankrace.data.checks import SUPERVISED, check_encoded, preview_text
from rankrace.data.encode import Encoder, encode_all
from rankrace.data.encoded import Encoded, EncodedSet
from rankrace.data.formats import Conversation, Example, LabelledText, Message, PlainText, PromptCompletion
from rankrace.errors import RankraceError
from test_data_encode import llama_like


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerBase:
    return llama_like()


def rows(count: int, group: str | None = None) -> list[Example]:
    return [PromptCompletion(f"{i} + 1 =", f" {i + 1}", group) for i in range(count)]


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int = 64) -> EncodedSet:
    return encode_all(examples, Encoder(tokenizer, task="causal", max_length=max_length))


def changed(side: EncodedSet, **fields: object) -> EncodedSet:
    """The set with fields of its second example replaced."""
    examples = list(side.examples)
    examples[1] = replace(examples[1], **fields)
    return replace(side, examples=examples)


def test_a_sound_set_has_no_findings(llama: PreTrainedTokenizerBase) -> None:
    side = encode(rows(100), llama)
    assert check_encoded(side, side, tokenizer=llama, task="causal", vocab_size=len(llama)) == []


@pytest.mark.parametrize("at_fault", ["training", "validation"])
def test_an_example_without_a_target(llama: PreTrainedTokenizerBase, at_fault: str) -> None:
    sound = encode(rows(3), llama)
    nothing = np.zeros(len(sound.examples[1]), dtype=bool)
    only_first = nothing.copy()
    only_first[0] = True
    for supervised in (nothing, only_first):
        broken = changed(sound, supervised=supervised)
        sides = (broken, sound) if at_fault == "training" else (sound, broken)
        with pytest.raises(RankraceError, match=rf"1 {at_fault} examples have no supervised .*example 2\)"):
            check_encoded(*sides, tokenizer=llama, task="causal")


def test_no_eos_to_learn(llama: PreTrainedTokenizerBase) -> None:
    sound = encode(rows(3), llama)

    def without_eos(example: Encoded) -> Encoded:
        supervised = example.supervised & (example.input_ids != llama.eos_token_id)
        return replace(example, supervised=supervised)

    one_left = replace(sound, examples=[*map(without_eos, sound.examples[:2]), sound.examples[2]])
    check_encoded(one_left, sound, tokenizer=llama, task="causal")
    broken = replace(sound, examples=[without_eos(example) for example in sound.examples])
    with pytest.raises(RankraceError, match=r"no training example has its EOS token .*</s>"):
        check_encoded(broken, sound, tokenizer=llama, task="causal")


def test_two_bos(llama: PreTrainedTokenizerBase) -> None:
    tokenizer = llama_like()
    tokenizer.chat_template = (
        "{{ bos_token }}{{ bos_token }}" + "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    talk = Conversation((Message("user", "a"), Message("assistant", "b")))
    broken = encode([PlainText("ab"), talk], tokenizer)
    with pytest.raises(RankraceError, match=r"1 training examples begin with two BOS .*example 2\)"):
        check_encoded(broken, broken, tokenizer=tokenizer, task="causal")


def test_everything_cut(llama: PreTrainedTokenizerBase) -> None:
    sound, cut = encode(rows(3), llama), encode(rows(3), llama, max_length=8)
    with pytest.raises(RankraceError, match="every training example is cut to 8 tokens"):
        check_encoded(cut, sound, tokenizer=llama, task="causal")
    with pytest.raises(RankraceError, match="every validation example is cut to 8 tokens"):
        check_encoded(sound, cut, tokenizer=llama, task="causal")


def test_tokens_that_the_model_does_not_have(llama: PreTrainedTokenizerBase) -> None:
    side = encode(rows(3), llama)
    largest = max(int(example.input_ids.max()) for example in side.examples)
    check_encoded(side, side, tokenizer=llama, task="causal", vocab_size=largest + 1)
    with pytest.raises(RankraceError, match=f"has the token {largest}; the model has {largest} tokens"):
        check_encoded(side, side, tokenizer=llama, task="causal", vocab_size=largest)


def test_a_label_outside_the_set(llama: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(llama, task="classification", max_length=64, labels=("a", "b"))
    sound = encode_all([LabelledText(str(i), None, "ab"[i % 2]) for i in range(4)], encoder)
    check_encoded(sound, sound, tokenizer=llama, task="classification", labels=("a", "b"))
    for label in (2, -1):
        with pytest.raises(RankraceError, match=r"1 validation examples have a label outside .*example 2\)"):
            check_encoded(
                sound, changed(sound, label=label), tokenizer=llama, task="classification", labels=("a", "b")
            )


def test_findings(llama: PreTrainedTokenizerBase) -> None:
    few_documents = encode([*rows(60, "x"), *rows(60, "y")], llama)
    cut = encode([*rows(54), *[PromptCompletion(f"{'a' * 99}{i}", "b") for i in range(6)]], llama)
    found = check_encoded(cut, few_documents, tokenizer=llama, task="causal")
    assert [finding.what for finding in found] == [
        "10% of the training examples are cut.",
        "The validation examples come from 2 documents: standard errors will be rough.",
    ]
    found = check_encoded(few_documents, encode(rows(5), llama), tokenizer=llama, task="causal")
    assert [str(finding) for finding in found] == [
        "Only 5 validation examples: the choice of the rank will be uncertain. "
        "Hold out more with --validation-fraction or --validation."
    ]
    found = check_encoded(encode(rows(1), llama), encode(rows(120), llama), tokenizer=llama, task="causal")
    assert [str(finding) for finding in found] == [
        "Only 1 training example: so few are sooner learnt by heart than learnt from. "
        "Give more rows, hundreds if you can."
    ]


def test_preview_shows_every_token_once(smollm2: Path, llama: PreTrainedTokenizerBase) -> None:
    talk = Conversation((Message("user", "Ça va?"), Message("assistant", "Oui 🗼 [b]très[/b].")))
    for tokenizer in (llama, AutoTokenizer.from_pretrained(smollm2)):
        side = encode([talk, PromptCompletion("2 + 2 =", " yes 4"), PlainText("never shown")], tokenizer)
        text = preview_text(side.examples, tokenizer, 2)
        assert "never shown" not in text.plain
        for example in side.examples[:2]:
            assert f"example {example.row + 1}: {len(example)} tokens, {example.supervised.sum()} supervised" in text
            decoded = str(tokenizer.decode(example.input_ids.tolist()))
            assert decoded in text.plain.replace("⟦", "").replace("⟧", "")
        marked = [text.plain[span.start : span.end] for span in text.spans if span.style == SUPERVISED]
        end = tokenizer.eos_token
        space = " " if tokenizer is llama else ""
        assert marked == [f"⟦{space}Oui 🗼 [b]très[/b].{space}{end}⟧", f"⟦ yes 4{end}⟧"]


def test_preview_of_classes(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    encoder = Encoder(tokenizer, task="classification", max_length=8, labels=("a", "b"))
    text = preview_text([encoder.encode(LabelledText("some very long text " * 3, None, "b"))], tokenizer)
    assert text.plain.startswith("example 1: 8 tokens, class 1, cut\n[CLS] some very long")
