"""`rankrace.search` on a loaded model and rows in memory: what it returns, and that the model comes back as it was.

The library is called as its users call it, `rankrace.search`; only tests that break into a run know more of it.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import rankrace
from rankrace.data.encoded import Task
from rankrace.training.loop import Trainer
from tinyfolder import PARITIES, SMALLEST_LAYER, SUMS, tiny_bert, tiny_llama

TASKS: tuple[Task, ...] = ("causal", "classification")
ROWS = {"causal": SUMS, "classification": PARITIES}
SHORT: dict[str, Any] = {"ranks": (2, 4), "max_steps": 8, "batch_size": 8}
LAYERS = {
    "causal": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "classification": {"query", "key", "value", "dense"},
}


@pytest.fixture(scope="module")
def folders(smollm2: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Task, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"causal": tiny_llama(folder / "llama", smollm2), "classification": tiny_bert(folder / "bert", minilm)}


def loaded(folder: Path, task: Task, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    auto = AutoModelForCausalLM if task == "causal" else AutoModelForSequenceClassification
    return auto.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)


def logits(model: PreTrainedModel) -> Tensor:
    """Always of the same tokens, without dropout; the model's modes are as before."""
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(5, 29).view(2, 12)).logits
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return found


@contextmanager
def comes_back(model: PreTrainedModel) -> Iterator[None]:
    """Everything that a caller could notice of a model is after the block as before, to the bit."""

    def modules() -> list[tuple[str, int, type[nn.Module], bool, int, int]]:
        return [
            (name, id(m), type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ]

    def parameters() -> list[tuple[str, int, bool, bool, torch.dtype]]:
        return [(name, id(p), p.requires_grad, p.grad is None, p.dtype) for name, p in model.named_parameters()]

    def values() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    before = modules(), parameters(), model.config._attn_implementation, model.config.to_dict()
    values_before, logits_before = values(), logits(model)
    yield
    assert (modules(), parameters(), model.config._attn_implementation, model.config.to_dict()) == before
    assert values().keys() == values_before.keys()
    for name, tensor in values().items():
        assert torch.equal(tensor, values_before[name]), name
    assert torch.equal(logits(model), logits_before)


@pytest.mark.parametrize("task", TASKS)
def test_what_is_chosen(
    task: Task, folders: dict[Task, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer = loaded(folders[task], task)
    with comes_back(model):
        choice = rankrace.search(model, tokenizer, ROWS[task], task=task, lr=1e-2, **SHORT)
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    assert isinstance(choice, rankrace.Selection)
    ranks = [point.rank for point in choice.curve]
    assert ranks == sorted(set(ranks))
    assert {2, 4} <= set(ranks) <= {1, 2, 3, 4}
    assert choice.rank in ranks
    assert re.search(rf"\b{choice.rank}\b", choice.reason)
    assert choice.edge in (None, "low", "high")
    assert choice.learning_rate > 0
    assert all(point.source == "truncated" and point.se >= 0 for point in choice.curve)
    assert isinstance(choice.confident, bool)
    assert choice.interval is None, "a handful of examples"
    assert sum(point.bootstrap or 0 for point in choice.curve) == pytest.approx(1)
    assert bool(choice.doubts) == (not choice.confident)


@pytest.mark.parametrize("task", TASKS)
def test_peft_takes_the_configuration(task: Task, folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders[task], task)
    choice = rankrace.search(model, tokenizer, ROWS[task], task=task, **SHORT)
    config = choice.lora_config()
    assert (config.r, config.lora_alpha) == (choice.rank, 32)
    assert config.target_modules == LAYERS[task]
    assert not config.inference_mode
    plain = logits(model)
    peft_model = peft.get_peft_model(model, config)
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".lora_" in name or ".classifier." in name for name in trainable)
    factors = [p.shape for name, p in peft_model.named_parameters() if ".lora_A." in name]
    assert {shape[0] for shape in factors} == {choice.rank}
    assert torch.equal(logits(model), plain), "fresh factors, which PEFT has put into the model, change nothing"
    again = eval(choice.code(), {"peft": peft})
    assert again.to_dict() == choice.lora_config().to_dict()


@pytest.mark.parametrize("task", TASKS)
def test_the_same_twice_and_with_options_heeded(task: Task, folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders[task], task)

    def choose(**options: Any) -> rankrace.Selection:
        return rankrace.search(model, tokenizer, ROWS[task], task=task, **{**SHORT, **options})

    first = choose()
    assert choose() == first
    assert choose(seed=1).curve != first.curve
    grid = choose(strategy="grid", refine=False)
    assert [(p.rank, p.source) for p in grid.curve] == [(2, "direct"), (4, "direct")]
    assert "after 50% of the training" in choose(strategy="grid", search_fraction=0.5).reason
    assert choose(ranks=[3], refine=False).rank <= 3
    assert choose(lr=0.5).learning_rate == pytest.approx(0.5, rel=0.5)


HEEDED: list[dict[str, Any]] = [
    {"schedule": "constant"}, {"warmup": 0.5}, {"weight_decay": 0.5}, {"clip": 0.01}, {"dropout": 0.4}, {"alpha": 4},
    {"scaling": "rslora"}, {"rank_lr": {8: 1e-2}}, {"batch_size": 4}, {"target_modules": ("q_proj",)},
    {"template": "chat"}, {"max_length": 8}, {"train_max": 20}, {"validation_max": 3}, {"validation_fraction": 0.3},
]  # fmt: skip


def test_every_option_of_training_has_an_effect(folders: dict[Task, Path]) -> None:
    """On what the candidates' losses are, to the last digit."""
    model, tokenizer = loaded(folders["causal"], "causal")
    rows = [*SUMS, *({"prompt": f"What, if I may ask, is {n} plus 1? It is", "completion": "!"} for n in range(9))]

    def curve(**options: Any) -> list[float]:
        choice = rankrace.search(model, tokenizer, rows, refine=False, **{**SHORT, **options})
        return [point.loss for point in choice.curve]

    plain = curve()
    assert [name for changed in HEEDED for name in changed if curve(**changed) == plain] == []


def test_the_configuration_is_that_of_the_options(folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders["causal"], "causal")
    options = {
        "ranks": (3,),
        "refine": False,
        "alpha": 12,
        "dropout": 0.2,
        "target_modules": ("q_proj", "self_attn.v_proj"),
    }
    choice = rankrace.search(model, tokenizer, SUMS, strategy="grid", max_steps=2, batch_size=8, **options)
    config = choice.lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12, 0.2)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert eval(choice.code(), {"peft": peft}).to_dict() == config.to_dict()
    options |= {"strategy": "grid", "max_steps": 2, "batch_size": 8, "scaling": "rslora"}
    rooted = rankrace.search(model, tokenizer, SUMS, **options).lora_config()
    assert rooted.lora_alpha == pytest.approx(12 * 3**0.5), "PEFT divides it by the rank, not by its root"


def test_argmin_chooses_the_lowest_loss(folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders["causal"], "causal")
    for strategy in ("shrink", "grid"):
        choice = rankrace.search(model, tokenizer, SUMS, strategy=strategy, rule="argmin", refine=False, **SHORT)
        assert choice.rank == min(choice.curve, key=lambda point: point.loss).rank
        assert len({point.loss for point in choice.curve}) == len(choice.curve)


def test_a_price_far_above_the_gain_chooses_the_smallest(folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders["causal"], "causal")
    choice = rankrace.search(model, tokenizer, SUMS, kappa=100.0, lr=1e-2, refine=False, **SHORT)
    assert choice.rank == choice.curve[0].rank == 1
    penalties = [point.penalty for point in choice.curve]
    assert penalties == sorted(set(penalties))


def test_a_price_of_ones_own(folders: dict[Task, Path]) -> None:
    """In nats, of any rank; it may forbid some."""
    model, tokenizer = loaded(folders["causal"], "causal")

    def choose(price: Callable[[int], float], **options: Any) -> rankrace.Selection:
        return rankrace.search(model, tokenizer, SUMS, price=price, lr=1e-2, refine=False, **{**SHORT, **options})

    with comes_back(model):
        linear = choose(lambda rank: 0.5 * rank)
    assert {p.rank: p.penalty for p in linear.curve} == {1: 0.5, 2: 1.0, 4: 2.0}
    assert [p.objective for p in linear.curve] == pytest.approx([p.loss + 0.5 * p.rank for p in linear.curve])
    assert linear.rank == 1
    fourfold = choose(lambda rank: 0.0 if rank == 4 else 9.0)
    assert (fourfold.rank, fourfold.edge) == (4, "high")
    only = choose(lambda rank: 0.0 if rank in (2, 4) else math.inf, strategy="race")
    assert only.rank in (2, 4)
    with pytest.raises(rankrace.RankraceError, match="kappa has no effect beside price"):
        choose(float, kappa=0.1)


def test_given_validation_rows_choose(folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders["causal"], "causal")
    choice = rankrace.search(model, tokenizer, SUMS[:24], SUMS[24:30], **SHORT)
    assert "measured on 6 held-out examples" in choice.reason


def test_errors_are_estimated_from_whole_documents(folders: dict[Task, Path]) -> None:
    """Twelve rows are twelve examples; of one document they say nothing about the spread."""
    model, tokenizer = loaded(folders["causal"], "causal")

    def curve(document: str) -> dict[int, tuple[float, float]]:
        rows = [{**row, "alone": str(n), "together": "one"} for n, row in enumerate(SUMS)]
        choice = rankrace.search(
            model, tokenizer, rows[:24], rows[24:], group_column=document, rule="argmin", refine=False,
            **{**SHORT, "max_steps": 2},  # too short to wait, as a curve of unknown errors would
        )  # fmt: skip
        return {point.rank: (point.loss, point.se) for point in choice.curve}

    with pytest.raises(rankrace.RankraceError, match="36 rows in 1 group cannot be split"):
        rankrace.search(model, tokenizer, [{**row, "together": "one"} for row in SUMS], group_column="together")
    alone, together = curve("alone"), curve("together")
    assert {rank: loss for rank, (loss, _) in alone.items()} == {rank: loss for rank, (loss, _) in together.items()}
    assert all(se > 0 for rank, (loss, se) in alone.items() if loss > min(alone.values())[0])
    assert all(math.isnan(se) for loss, se in together.values() if loss > min(together.values())[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("task", TASKS)
def test_a_model_in_use_comes_back(task: Task, attention: str, folders: dict[Task, Path]) -> None:
    """In the midst of someone's training: modes, frozen parts and gradients of their own."""
    model, tokenizer = loaded(folders[task], task, attn_implementation=attention)
    model.train()
    next(iter(model.base_model.children())).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    model(input_ids=torch.arange(5, 13).view(1, 8)).logits.logsumexp(-1).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert gradients
    assert model.config._attn_implementation == attention
    with comes_back(model):
        rankrace.search(model, tokenizer, ROWS[task], task=task, **SHORT)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])


@pytest.mark.parametrize("task", TASKS)
def test_a_model_comes_back_after_an_error(
    task: Task, folders: dict[Task, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded(folders[task], task)
    model.train()

    def search(**options: Any) -> None:
        rankrace.search(model, tokenizer, ROWS[task], task=task, **{**SHORT, **options})

    with comes_back(model):
        with pytest.raises(rankrace.RankraceError, match="is outside 1 …"):
            search(ranks=(2, 1000))
        with pytest.raises(rankrace.RankraceError, match="no linear layer named nothing"):
            search(target_modules=("nothing",))
        with pytest.raises(rankrace.RankraceError, match="diverged"):
            search(lr=1e30)
    take_step = Trainer.take_step

    def interrupted(self: Trainer, batch: Any) -> Tensor:
        if self.step == 1:
            raise KeyboardInterrupt
        return take_step(self, batch)

    monkeypatch.setattr(Trainer, "take_step", interrupted)
    with comes_back(model), pytest.raises(KeyboardInterrupt):
        search()


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"rank": 4}, ["there is no option 'rank'", "did you mean 'ranks'?"]),
    ({"batchsize": 4}, ["there is no option 'batchsize'", "did you mean 'batch_size'?"]),
    ({"epochs": "many"}, ["--epochs 'many'", "valid number"]),
    ({"ranks": ()}, ["--ranks ()"]),
    ({"ranks": (2, SMALLEST_LAYER + 1)}, [f"rank {SMALLEST_LAYER + 1} is outside 1 … {SMALLEST_LAYER}"]),
    *(({name: value}, [f"no use for the option '{name}'"]) for name, value in {
        "data": "rows.jsonl", "out": "out", "resume": True, "save_every": 3, "track": "wandb",
        "device": "cpu", "dtype": "float64",
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_options_that_are_refused(options: dict[str, Any], words: list[str], folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders["causal"], "causal")
    with comes_back(model), pytest.raises(rankrace.RankraceError) as caught:
        rankrace.search(model, tokenizer, SUMS, **options)
    for word in words:
        assert word in str(caught.value)


def test_rows_that_are_refused(folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders["causal"], "causal")
    for rows, said in (
        ([], "train has no rows"),
        ([{"frage": "?"}], "train: the columns 'frage'"),
        ([*SUMS, {"prompt": "1 plus", "completion": ""}], "train, row 37: 'completion' is empty"),
    ):
        with comes_back(model), pytest.raises(rankrace.RankraceError, match=said):
            rankrace.search(model, tokenizer, rows)
    with comes_back(model), pytest.raises(rankrace.RankraceError, match="validation has no rows"):
        rankrace.search(model, tokenizer, SUMS, [])


def test_a_classifier_with_another_number_of_classes(folders: dict[Task, Path]) -> None:
    model, tokenizer = loaded(folders["classification"], "classification", num_labels=3, ignore_mismatched_sizes=True)
    with comes_back(model), pytest.raises(rankrace.RankraceError, match=r"2 labels \(even, odd\), the model 3"):
        rankrace.search(model, tokenizer, PARITIES, task="classification")
