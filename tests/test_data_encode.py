"""What is supervised, where EOS and BOS go and what truncation takes: with real tokenizers, and with a small
one that is built like LLaMA's (it adds BOS, and a space before a text)."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rankrace.data.encode import Encoder, encode_all, label_set
from rankrace.data.encoded import Encoded
from rankrace.data.formats import (
    Conversation,
    Example,
    LabelledText,
    Message,
    PlainText,
    PromptCompletion,
)
from rankrace.errors import RankraceError

LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no ' + m.role + ' role') }}{% endif %}{% endfor %}"
)


def llama_like() -> PreTrainedTokenizerBase:
    """One token a character (and one for a space with an 'y'), byte fallback, BOS, a space before a text."""
    characters = [chr(c) for c in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *characters, "▁y"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("▁", "y")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = LLAMA_CHAT
    return fast


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def bert(minilm: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerBase:
    return llama_like()


def causal(tokenizer: PreTrainedTokenizerBase, max_length: int = 1024, template: str = "auto") -> Encoder:
    assert template in ("auto", "chat", "plain")
    return Encoder(tokenizer, task="causal", max_length=max_length, template=template)


def answers(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The supervised runs as text."""
    runs: list[list[int]] = []
    for i in np.flatnonzero(encoded.supervised).tolist():
        if i == 0 or not encoded.supervised[i - 1]:
            runs.append([])
        runs[-1].append(int(encoded.input_ids[i]))
    return [str(tokenizer.decode(run)) for run in runs]


def whole(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(encoded.input_ids.tolist()))


TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Capital of France?"),
        Message("assistant", "Paris.\nIt is  lovely: 東京 🗼"),
        Message("user", "And of Italy?"),
        Message("assistant", "Rome."),
        Message("user", "Thanks!"),
    )
)


# --- what is supervised


def test_prompt_and_completion(smol: PreTrainedTokenizerBase) -> None:
    encoded = causal(smol).encode(PromptCompletion("The capital of France is", " Paris."))
    assert whole(encoded, smol) == "The capital of France is Paris.<|im_end|>"
    assert answers(encoded, smol) == [" Paris.<|im_end|>"]
    assert encoded.input_ids.dtype == np.int32
    assert encoded.label == -1


def test_a_border_inside_a_token_stays_where_it_is(smol: PreTrainedTokenizerBase) -> None:
    prompt, completion = "Once upon a ti", "me there was"
    assert smol.tokenize(prompt + completion) != smol.tokenize(prompt) + smol.tokenize(completion)
    encoded = causal(smol).encode(PromptCompletion(prompt, completion))
    assert encoded.input_ids[~encoded.supervised].tolist() == smol(prompt)["input_ids"]
    assert answers(encoded, smol) == ["me there was<|im_end|>"]


def test_plain_text_is_supervised_but_for_its_first_token(smol: PreTrainedTokenizerBase) -> None:
    encoded = causal(smol).encode(PlainText("Once upon a time"))
    assert whole(encoded, smol) == "Once upon a time<|im_end|>"
    assert answers(encoded, smol) == [" upon a time<|im_end|>"]


def test_labelled_text_as_a_causal_task(smol: PreTrainedTokenizerBase) -> None:
    encoded = causal(smol).encode(LabelledText("It rains.", "It is wet.", "yes"))
    assert whole(encoded, smol) == "It rains.\nIt is wet.\nLabel: yes<|im_end|>"
    assert answers(encoded, smol) == [" yes<|im_end|>"]


def test_chat_template_supervises_every_answer_and_the_token_that_ends_it(
    smol: PreTrainedTokenizerBase,
) -> None:
    encoded = causal(smol).encode(TALK)
    turns = [{"role": m.role, "content": m.content} for m in TALK.messages]
    rendered = str(smol.apply_chat_template(turns[:5], tokenize=False))
    assert answers(encoded, smol) == ["Paris.\nIt is  lovely: 東京 🗼<|im_end|>", "Rome.<|im_end|>"]
    assert whole(encoded, smol) == rendered.removesuffix("\n"), "what follows the last answer is left out"
    assert encoded.input_ids[-1] == smol.eos_token_id
    prompt = smol.apply_chat_template(turns[:2], add_generation_prompt=True, return_dict=True)
    assert isinstance(prompt, BatchEncoding)
    first = int(np.flatnonzero(encoded.supervised)[0])
    assert encoded.input_ids[:first].tolist() == prompt["input_ids"], "the prompt is that of model.generate"


def test_template_chat_renders_all_but_plain_text(smol: PreTrainedTokenizerBase) -> None:
    encoder = causal(smol, template="chat")
    encoded = encoder.encode(PromptCompletion("Hi ", " Hello"))
    assert answers(encoded, smol) == ["Hello<|im_end|>"]
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" in whole(encoded, smol)
    assert answers(encoder.encode(LabelledText("a", "b", "yes")), smol) == ["yes<|im_end|>"]
    assert whole(encoder.encode(PlainText("a")), smol) == "a<|im_end|>"


def test_plain_rendering_of_a_conversation(smol: PreTrainedTokenizerBase) -> None:
    encoded = causal(smol, template="plain").encode(TALK)
    text = (
        "System: Be brief.\n\nUser: Capital of France?\n\nAssistant: Paris.\nIt is  lovely: 東京 🗼<|im_end|>"
        "\n\nUser: And of Italy?\n\nAssistant: Rome.<|im_end|>\n\nUser: Thanks!"
    )
    assert whole(encoded, smol) == text
    assert answers(encoded, smol) == [" Paris.\nIt is  lovely: 東京 🗼<|im_end|>", " Rome.<|im_end|>"]


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_an_opening_assistant_message_is_context(smol: PreTrainedTokenizerBase, template: str) -> None:
    talk = Conversation((Message("assistant", "Welcome!"), *TALK.messages[1:3]))
    encoded = causal(smol, template=template).encode(talk)
    assert "Welcome!" in whole(encoded, smol)
    assert len(answers(encoded, smol)) == 1


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    tokenizer = llama_like()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    encoded = causal(tokenizer).encode(Conversation(TALK.messages[1:3]))
    assert answers(encoded, tokenizer) == ["Paris.\nIt is  lovely: 東京 🗼</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = llama_like()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    assert answers(causal(tokenizer).encode(Conversation(TALK.messages[1:3])), tokenizer)
    with pytest.raises(RankraceError, match=r"example 2: .*rewrites earlier turns \(at message 3\)"):
        causal(tokenizer).encode_batch([PlainText("a"), TALK])


def test_a_template_that_refuses_is_reported(llama: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RankraceError, match=r"example 1: .*refuses the conversation: no system role"):
        causal(llama).encode(TALK)


# --- BOS, EOS and the space before a text


def test_one_bos_if_the_tokenizer_adds_one(llama: PreTrainedTokenizerBase, smol: PreTrainedTokenizerBase) -> None:
    pair = Conversation(TALK.messages[1:5])
    rows: list[Example] = [PromptCompletion("a", "b"), PromptCompletion("<s>a", "b"), PlainText("a"), pair]
    for encoded in causal(llama).encode_batch(rows):
        assert encoded.input_ids[0] == llama.bos_token_id
        assert (encoded.input_ids == llama.bos_token_id).sum() == 1
        assert not encoded.supervised[0]
    assert smol.bos_token_id not in causal(smol).encode(PromptCompletion("a", "b")).input_ids


def test_eos_is_there_once(llama: PreTrainedTokenizerBase) -> None:
    rows: list[Example] = [PromptCompletion("a", "b"), PromptCompletion("a", "b</s>"), PlainText("ab")]
    for encoded in causal(llama).encode_batch(rows):
        assert (encoded.input_ids == llama.eos_token_id).sum() == 1
        assert encoded.input_ids[-1] == llama.eos_token_id
        assert encoded.supervised[-1]


def test_an_answer_gets_no_second_space(llama: PreTrainedTokenizerBase) -> None:
    """LLaMA's tokenizer puts a space before a text: not before one that goes on from a prompt."""
    assert llama.tokenize("yes") == llama.tokenize("yes", add_special_tokens=False) == ["▁y", "e", "s"]
    for completion in (" yes", "yes", "\nyes"):
        encoded = causal(llama).encode(PromptCompletion("sure?", completion))
        assert encoded.input_ids[:-1].tolist() == llama("sure?" + completion)["input_ids"]
        assert answers(encoded, llama) == [completion.removeprefix(" ") + "</s>"]
    talk = Conversation((Message("user", "sure?"), Message("assistant", "yes")))
    rendered = "<s>[INST] sure? [/INST] yes </s>"
    expected = llama(rendered, add_special_tokens=False)["input_ids"]
    assert causal(llama).encode(talk).input_ids.tolist() == expected


def test_a_tokenizer_without_eos_or_template_is_refused(bert: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RankraceError, match="no EOS token"):
        causal(bert)
    with pytest.raises(RankraceError, match="no chat template"):
        causal(bert, template="chat")


# --- truncation (of the LLaMA-like tokenizer's one token a character)


@pytest.mark.parametrize(
    ("max_length", "kept", "answer"),
    [
        (14, "abcdefgh0123</s>", "0123</s>"),
        (13, "bcdefgh0123</s>", "0123</s>"),
        (8, "gh0123</s>", "0123</s>"),
        (6, "0123</s>", "0123</s>"),
        (5, "0123", "0123"),
        (3, "01", "01"),
    ],
)
def test_the_prompt_loses_its_start_and_the_answer_its_end(
    llama: PreTrainedTokenizerBase, max_length: int, kept: str, answer: str
) -> None:
    encoded = causal(llama, max_length).encode(PromptCompletion("abcdefgh", "0123"))  # 15 tokens
    assert (len(encoded), encoded.truncated) == (max_length, True)
    assert whole(encoded, llama) == f"<s>{kept}"
    assert answers(encoded, llama) == [answer]


def test_nothing_is_cut_that_fits(llama: PreTrainedTokenizerBase) -> None:
    encoded = causal(llama, 15).encode(PromptCompletion("abcdefgh", "0123"))
    assert (len(encoded), encoded.truncated) == (15, False)


def test_later_turns_go_before_the_prompt(smol: PreTrainedTokenizerBase) -> None:
    full = causal(smol).encode(TALK)
    first_answer = int(np.flatnonzero(np.diff(full.supervised.astype(int)) == -1)[0]) + 1
    for max_length in (len(full) - 1, first_answer):
        cut = causal(smol, max_length).encode(TALK)
        assert cut.input_ids.tolist() == full.input_ids[:max_length].tolist()
        assert cut.supervised.tolist() == full.supervised[:max_length].tolist()
    shorter = causal(smol, first_answer - 5).encode(TALK)
    assert shorter.input_ids.tolist() == full.input_ids[5:first_answer].tolist()


def test_examples_without_a_target_left_are_dropped_and_counted(llama: PreTrainedTokenizerBase) -> None:
    rows: list[Example] = [PromptCompletion("a", "b"), PromptCompletion("a", "bc"), PlainText("d")]
    with pytest.raises(RankraceError, match="none of 3 examples has a target left when cut to 1 tokens"):
        encode_all(rows, causal(llama, 1))
    kept = encode_all(rows, causal(llama, 4))
    assert (len(kept), kept.truncated, kept.dropped) == (3, 2, 0)


def test_a_row_of_one_token_is_named(smol: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RankraceError, match="example 2 has no supervised token"):
        causal(smol).encode_batch([PlainText("a b"), PlainText("<|im_end|>")])


# --- sets


def test_a_batch_equals_single_examples(smol: PreTrainedTokenizerBase) -> None:
    rows: list[Example] = [
        PromptCompletion("a", "b"),
        TALK,
        PlainText("Once upon"),
        LabelledText("a", None, "x"),
    ]
    encoder = causal(smol, 24)
    together = encode_all(rows, encoder)
    for row, (one, alone) in enumerate(zip(together.examples, map(encoder.encode, rows), strict=True)):
        assert one.row == row
        assert one.input_ids.tolist() == alone.input_ids.tolist()
        assert one.supervised.tolist() == alone.supervised.tolist()
    assert together.supervised_tokens == sum(int(e.supervised.sum()) for e in together.examples)
    assert together.truncated == 1
    assert together.lengths.tolist() == [len(e) for e in together.examples]


def test_groups_are_numbers_shared_by_one_document(smol: PreTrainedTokenizerBase) -> None:
    documents = ["x", None, "y", "x", None]
    numbers = [e.group for e in causal(smol).encode_batch([PlainText(f"ab {i}", d) for i, d in enumerate(documents)])]
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 4


def test_copies_of_a_row_without_a_document_share_a_number(smol: PreTrainedTokenizerBase) -> None:
    """They are as good as one document: ten copies say no more of the spread than one."""
    rows = [PlainText("ab"), PlainText("cd"), PlainText("AB"), PlainText("ab", "x"), PlainText("ab")]
    numbers = [e.group for e in causal(smol).encode_batch(rows)]
    assert numbers[0] == numbers[2] == numbers[4]
    assert len(set(numbers)) == 3


# --- classification


def classifier(tokenizer: PreTrainedTokenizerBase, max_length: int = 64) -> Encoder:
    return Encoder(tokenizer, task="classification", max_length=max_length, labels=("no", "yes"))


def test_classification_takes_the_tokenizers_own_form(bert: PreTrainedTokenizerBase) -> None:
    encoded = classifier(bert).encode(LabelledText("It rains.", "Wet?", "yes"))
    reference = bert("It rains.", "Wet?")
    assert encoded.input_ids.tolist() == reference["input_ids"]
    assert encoded.token_types is not None
    assert encoded.token_types.tolist() == reference["token_type_ids"]
    assert encoded.label == 1
    assert not encoded.supervised.any()
    assert encode_all([LabelledText("a", None, "no")] * 3, classifier(bert)).supervised_tokens == 3


def test_classification_cuts_the_longer_text_first(bert: PreTrainedTokenizerBase) -> None:
    rows: list[Example] = [LabelledText("a " * 20, "b c", "no"), LabelledText("a", "b", "no")]
    found = encode_all(rows, classifier(bert, 10))
    assert whole(found.examples[0], bert) == "[CLS] a a a a a [SEP] b c [SEP]"
    assert [e.truncated for e in found.examples] == [True, False]
    assert found.truncated == 1


def test_nothing_is_longer_than_the_model_takes(bert: PreTrainedTokenizerBase) -> None:
    """BERT has no position for the 513th token."""
    found = encode_all([LabelledText("a " * 600, None, "no"), LabelledText("a", None, "no")], classifier(bert, 1024))
    assert [len(e) for e in found.examples] == [512, 3]
    assert found.truncated == 1


def test_classification_without_token_types() -> None:
    tokenizer = llama_like()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert classifier(tokenizer).encode(LabelledText("a", None, "no")).token_types is None


def test_classification_faults(bert: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RankraceError, match="needs rows with text and label columns"):
        encode_all([PlainText("a")], classifier(bert))
    with pytest.raises(RankraceError, match="example 2 has a label that no training row has: 'maybe'"):
        encode_all([LabelledText("a", None, "no"), LabelledText("a", None, "maybe")], classifier(bert))
    with pytest.raises(ValueError, match="needs the labels"):
        Encoder(bert, task="classification", max_length=8)


def test_label_set() -> None:
    def of(*labels: str) -> tuple[str, ...]:
        return label_set([LabelledText("a", None, label) for label in labels])

    assert of("b", "a", "b") == ("a", "b")
    assert of("10", "9", "-1") == ("-1", "9", "10")
    assert of("10", "9", "x") == ("10", "9", "x")
    with pytest.raises(RankraceError, match=r"two labels or more \(found: a\)"):
        of("a", "a")
    with pytest.raises(RankraceError, match=r"\(found: none\)"):
        label_set([PlainText("a")])
