"""Puts the parts of a run together: data and model → bank, trainer, strategy, search; and its checkpoints.

Shapes: N held-out examples.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel

from rankrace.bank import Bank, Candidates
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import FEW_DOCUMENTS, Encoded, Task
from rankrace.device import wait_for
from rankrace.errors import RankraceError
from rankrace.plan import LookPlan, measures_longer, resolved
from rankrace.select.build import make_strategy, penalty_of
from rankrace.select.ending import Ending, end
from rankrace.select.learning_rate import lr_for, multiplier
from rankrace.select.objective import Held, linear_penalty
from rankrace.select.search import Search, SearchState, Setting
from rankrace.select.statistics import LEAST_CLUSTERS
from rankrace.training.compiled import compile_blocks
from rankrace.training.loop import Measured, Recipe, Trainer
from rankrace.training.model import PackedModel
from rankrace.training.recompute import recompute_blocks
from rankrace.words import counted

FRESH_LEAST = 10
"""With fewer examples than this in either half, validation is not halved."""

QUANTIZED: dict[str, list[str]] = {
    kind: [
        f"Losses are those on the base in {kind.upper()}; on the 16-bit base, where the adapter is meant to be used "
        "too, they are a little other."
    ]
    for kind in ("nf4", "fp8")
} | {"none": []}
"""What a reader of the result should know."""
FP8_ON_A_HOST = ["On a CPU 8-bit products are slower than plain ones and save no memory: --quantize fp8 is for GPUs."]

_state = TypeAdapter(SearchState)


@dataclass(kw_only=True)
class Session:
    """A run, ready to go."""

    config: RunConfig
    """Resolved: nothing left to default."""
    data: Data
    trainer: Trainer[Bank]
    search: Search
    fresh: list[Encoded]
    """Held-out examples that choose nothing: the final figures are theirs."""
    base_fresh: Measured
    """The base model on them."""
    base_seconds: float
    """What it took to measure the base model, on these and on those that choose."""
    notes: list[str]
    chosen_N: list[float] = field(default_factory=list)
    """Loss of what was chosen on the examples that chose it, soon after; empty where nothing is compared with it."""

    def mark_choice(self) -> None:
        """For the ending's `rise`. In a single pass over the rows nothing is learnt by heart: nothing is measured."""
        if self.trainer.repeats and self.trainer.step < self.trainer.total:
            self.chosen_N = self.trainer.measure(self.search.examples).loss_KN[0].tolist()

    def end(self) -> Ending:
        """After the last step: the bank then holds what is delivered."""
        search, chosen_N = self.search, np.array(self.chosen_N) if self.chosen_N else None
        return end(self.trainer, search.examples, search.held.cluster_N, chosen_N)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint: factors, heads and optimiser."""
        return {**self.trainer.bank.candidates.tensors(), **self.trainer.tensors()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: everything that is not a tensor. There is no random state: see Trainer."""
        t, c = self.trainer, self.trainer.bank.candidates
        self.search.read_losses()
        return {
            "data": self.data.sha256,
            **t.state(),
            "lr": t.lr_K,
            "ranks": c.ranks,
            "layer_ranks": dict(c.layer_ranks),
            "multipliers": c.multipliers,
            "search": _state.dump_python(self.search.state, mode="json"),
            "chosen": self.chosen_N,
        }

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues exactly where `tensors` and `state` were taken.

        Raises:
            RankraceError: the data are not the same any more.
        """
        if state["data"] != self.data.sha256:
            raise RankraceError(
                f"the rows of {self.config.data} are not those that this run was started with",
                why="what was learnt so far came from other rows, and the order of the rest would be another",
                fix="put the old rows back, or start again in another --out",
            )
        t, bank = self.trainer, self.trainer.bank
        on_device = {n: x.to(bank.device) for n, x in tensors.items()}
        candidates = Candidates(
            ranks=tuple(state["ranks"]),
            multipliers=tuple(state["multipliers"]),
            factors={n: (on_device[f"{n}.A"], on_device[f"{n}.B"]) for n in bank.layers},
            heads={n: tuple(on_device[f"{n}.{i}"] for i in range(len(h.names))) for n, h in bank.heads.items()},
            layer_ranks={n: tuple(ranks) for n, ranks in state["layer_ranks"].items()},
        )
        t.start(candidates, state["lr"])
        t.restore(tensors, state)
        self.search.state = _state.validate_python(state["search"])
        self.chosen_N = state.get("chosen", [])  # older checkpoints have none


def ready(
    config: RunConfig, data: Data, hf_model: PreTrainedModel, task: Task
) -> tuple[RunConfig, Trainer[Bank], LookPlan]:
    """Attaches the bank, checks that the model can run packed, and decides what is decided before the first step."""
    bank = Bank(hf_model, target_modules=config.target_modules, seed=config.seed, dropout=config.dropout)
    bank.check_ranks(config.ranks)
    model = PackedModel(hf_model, bank, task)
    model.verify_on(data.train.examples)
    config = resolved(config, data, model, task)
    assert config.micro_tokens is not None
    if config.compile == "on":
        compile_blocks(bank)
    if config.recompute == "on":
        recompute_blocks(bank)  # after what it runs again is what it will be
    trainer = Trainer(model, data.train.examples, recipe_of(config, hf_model, config.micro_tokens))
    return config, trainer, LookPlan.of(config, data, trainer)


def prepare(
    config: RunConfig,
    data: Data,
    hf_model: PreTrainedModel,
    task: Task,
    penalty: Callable[[int], float] | None = None,
) -> Session:
    """Readies the loop, measures the base, and readies the strategy.

    Args:
        penalty: rank → nats, in place of the configuration's own.
    """
    config, trainer, plan = ready(config, data, hf_model, task)
    assert config.lr is not None
    lr, bank = config.lr, trainer.bank
    price = penalty_of(config, bank) if penalty is None else linear_penalty(1.0, penalty)
    strategy = make_strategy(config, trainer.total, bank, plan.fractions, price)
    looked, fresh, notes = divide(data.validation.examples, plan, config.seed)
    notes += plan.warnings(len(looked))
    wait_for(bank.device)
    began = time.perf_counter()
    with bank.off():
        base_looked, base_fresh = trainer.measure(looked), trainer.measure(fresh)
    base_seconds = time.perf_counter() - began
    held = Held(
        tokens_N=base_looked.tokens_N,
        cluster_N=np.array([e.group for e in looked]),
        base_N=base_looked.loss_KN[0],
    )

    def setting(rank: int) -> Setting:
        return Setting(
            multiplier=multiplier(rank, config.alpha, config.scaling),
            lr=lr_for(rank, lr, config.alpha, config.scaling, config.rank_lr),
        )

    slow = config.quantize == "fp8" and bank.device.type == "cpu"
    search = Search(trainer, strategy, looked, held, setting, follow=config.average == "on" and trainer.repeats)
    search.start()
    return Session(
        config=config,
        data=data,
        trainer=trainer,
        search=search,
        fresh=fresh,
        base_fresh=base_fresh,
        base_seconds=base_seconds,
        notes=notes + QUANTIZED[config.quantize] + (FP8_ON_A_HOST if slow else []),
    )


def recipe_of(config: RunConfig, model: PreTrainedModel, micro_tokens: int) -> Recipe:
    """How the configuration wants the steps to be taken."""
    return Recipe(
        epochs=config.epochs,
        max_steps=config.max_steps,
        batch_size=config.batch_size,
        micro_tokens=micro_tokens,
        schedule=config.schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        seed=config.seed,
        graphs=config.cuda_graphs == "on",
        longer=measures_longer(model, micro_tokens),
    )


def divide(examples: Sequence[Encoded], plan: LookPlan, seed: int) -> tuple[list[Encoded], list[Encoded], list[str]]:
    """Validation → examples that choose, and fresh ones that only report; each spread over many documents.

    Returns:
        Both, and notes. Whole documents are on either side; of fewer than FEW_DOCUMENTS, or uneven ones, each gives
        some examples to either side. Where either half would have fewer than FRESH_LEAST examples, it is all of them
        twice.
    """
    members: dict[int, list[Encoded]] = {}
    for e in examples:
        members.setdefault(e.group, []).append(e)
    order = np.random.Generator(np.random.Philox(seed)).permutation(sorted(members))
    documents = [members[g] for g in order]
    looked = min(plan.looked, len(examples) // 2)
    few = len(documents) < FEW_DOCUMENTS
    if not few:
        least = min(LEAST_CLUSTERS, len(documents) // 2)
        first = documents_for(documents[: -FEW_DOCUMENTS // 2], looked, least=least)
        rest = documents[first:]
        rest = rest[: documents_for(rest, plan.fresh, least=LEAST_CLUSTERS)]
        halves = spread(documents[:first], looked), spread(rest, plan.fresh)
        if min(map(len, halves)) >= FRESH_LEAST:
            return halves[0], halves[1], []
    if len(examples) >= 2 * FRESH_LEAST:
        begins = np.cumsum([0, *map(len, documents[:-1])])
        one, other = ([d[(b + side) % 2 :: 2] for b, d in zip(begins, documents, strict=True)] for side in range(2))
        note = (
            f"The validation set is of {counted(len(documents), 'document')}, too {'few' if few else 'uneven'} to "
            "halve: the examples that report are others than those that chose the rank, but of the same ones."
        )
        return spread(one, looked), spread(other, plan.fresh), [note]
    note = (
        f"The validation set is too small to halve: it has {counted(len(examples), 'example')}. Each look measures "
        "all of them, and so does the final loss: on the examples that chose the rank it is optimistic."
    )
    return list(examples), list(examples), [note]


def documents_for(documents: Sequence[Sequence[Encoded]], examples: int, *, least: int) -> int:
    """How many of them hold so many examples; not fewer than `least`, for an error's sake; or all."""
    held = np.cumsum([len(d) for d in documents])
    return min(len(documents), max(int(np.searchsorted(held, examples)) + 1, least))


def spread(documents: Sequence[Sequence[Encoded]], examples: int) -> list[Encoded]:
    """So many, the first of each document before the second of any."""
    turns = zip_longest(*documents)
    return [e for turn in turns for e in turn if e is not None][:examples]


def chosen_device(name: str) -> torch.device:
    """Raises RankraceError: there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RankraceError(
            f"the device {name!r} cannot be used: {str(error).splitlines()[0]}",
            why="the model and its adapters have to live there",
            fix="use --device auto, cpu, cuda or cuda:N",
        ) from error
    return device


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]
