"""Only the choice: which rank for this model and these data, without a finished adapter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from peft import LoraConfig, TaskType
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankrace.bank import adapter_of, lora_config
from rankrace.config import RunConfig
from rankrace.data import encode_splits, make_encoder, read_splits, split_rows
from rankrace.data.checks import checked_data, preview_text
from rankrace.data.encoded import Task
from rankrace.data.hub import reach_hub
from rankrace.data.sources import SourceRows
from rankrace.errors import RankraceError
from rankrace.loading import open_session, task_of
from rankrace.options import checked
from rankrace.progress import Progress
from rankrace.record import decision_of, reason_of
from rankrace.report.text import doubts
from rankrace.select.objective import Point
from rankrace.session import Session, prepare
from rankrace.training.divergence import alarm_if_diverged
from rankrace.training.model import load_tokenizer, vocabulary_size

NOT_OF_A_SEARCH = {"data", "out", "resume", "save_every", "track", "device", "dtype", "quantize", "average"}
"""Options that mean nothing where model and rows are given as they are."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A chosen rank and what speaks for it."""

    rank: int
    reason: str
    curve: tuple[Point, ...]
    """Loss, paired standard error, penalty and objective of every rank that was measured."""
    interval: tuple[int, int] | None = None
    """The measured ranks between which the picks of 95% of the bootstrap samples of the held-out documents lie; not
    told where these are fewer than 20, or one rank was measured."""
    confident: bool
    edge: Literal["low", "high"] | None
    doubts: tuple[str, ...]
    """What to know before trusting the choice, in sentences."""
    learning_rate: float
    """Peak learning rate for this rank."""
    _config: LoraConfig

    def lora_config(self) -> LoraConfig:
        """Ready for `peft.get_peft_model`; the factors start fresh."""
        return LoraConfig(**self._arguments())

    def code(self) -> str:
        """The same as Python text."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"peft.LoraConfig({arguments})  # learning rate {self.learning_rate:.3g}"

    def _arguments(self) -> dict[str, Any]:
        c = self._config
        assert isinstance(c.target_modules, set | list)
        assert c.task_type is not None
        chosen = {
            "task_type": TaskType(c.task_type).value,
            "r": c.r,
            "lora_alpha": c.lora_alpha,
            "target_modules": sorted(c.target_modules),
        }
        if c.rank_pattern:
            chosen |= {"rank_pattern": c.rank_pattern, "alpha_pattern": c.alpha_pattern}
        if c.lora_dropout:
            chosen["lora_dropout"] = c.lora_dropout
        if c.fan_in_fan_out:
            chosen["fan_in_fan_out"] = True
        return chosen


def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[dict[str, Any]],
    validation: Sequence[dict[str, Any]] | None = None,
    *,
    task: Task = "causal",
    price: Callable[[int], float] | None = None,
    **options: Any,
) -> Selection:
    """Chooses the rank for a loaded model and rows in memory; the model comes back as it was.

    Args:
        train: rows in any of the known shapes, such as {"prompt": …, "completion": …}.
        validation: held-out rows; without them a part of `train` is held out.
        price: what a rank costs, in nats of validation loss, in place of the options' penalty.
        options: any field of RunConfig but those of files (data, out, resume, save_every, track), of loading the
            model (device, dtype, quantize) and of a run's end (average); layers that are in 4 bits already are
            trained as they are.

    Returns:
        The rank, why, the curve it was read off, and a ready LoraConfig.

    Raises:
        RankraceError: faults in the rows or the options.
    """
    without_use = sorted(options.keys() & NOT_OF_A_SEARCH)
    if without_use:
        raise RankraceError(
            f"search has no use for the option {without_use[0]!r}",
            why="model and rows are in memory already, and nothing is written",
            fix="leave it out",
        )
    priced = sorted(options.keys() & {"penalty", "penalty_weight", "kappa"})
    if price is not None and priced:
        raise RankraceError(
            f"the option {priced[0]} has no effect beside price",
            why="what a rank costs is said by price alone",
            fix="give one of the two",
        )
    config = checked({"model": model.name_or_path or "model", "data": "rows", **options})
    source = SourceRows(
        train=list(train),
        validation=None if validation is None else list(validation),
        train_where="train",
        validation_where="validation",
    )
    read = split_rows(source, config)
    data = encode_splits(read, make_encoder(config, tokenizer, task, read))
    outputs = model.config.num_labels
    if data.labels is not None and len(data.labels) != outputs:
        raise RankraceError(
            f"the rows have {len(data.labels)} labels ({', '.join(data.labels)}), the model {outputs}",
            why="its classifier has one output a label",
            fix=f"load the model with num_labels={len(data.labels)}",
        )
    data = checked_data(data, tokenizer, task, vocabulary_size(model))
    with lent(model), Progress() as progress:
        session = prepare(config, data, model, task, price)
        progress.note([*data.notes, *session.notes])
        return choose(session, progress)


@contextmanager
def lent(model: PreTrainedModel) -> Iterator[None]:
    """The model comes back as it was, whatever happens: modules, classes, forwards, modes, what trains, attention."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    modes = {name: module.training for name, module in modules.items()}
    classes = {name: type(module) for name, module in modules.items()}
    forwards = {name: vars(module)["forward"] for name, module in modules.items() if "forward" in vars(module)}
    trainable = {name: parameter.requires_grad for name, parameter in parameters.items()}
    attention = model.config._attn_implementation
    assert attention is not None, "Transformers sets an attention implementation on every model"
    try:
        yield
    finally:
        for name, module in modules.items():  # from the outside in
            parent, _, child = name.rpartition(".")
            if name:
                setattr(model.get_submodule(parent), child, module)
            module.training = modes[name]
            module.__class__ = classes[name]
            vars(module).pop("forward", None)  # a compiled one
            if name in forwards:
                module.forward = forwards[name]
        for name, parameter in parameters.items():
            parameter.requires_grad_(trainable[name])
        model.set_attn_implementation(attention)


def search_config(config: RunConfig) -> Selection:
    """The same from names: loads the model and the data that the configuration names; writes nothing."""
    with Progress() as progress:
        session, _ = open_session(config, progress)
        return choose(session, progress)


def choose(session: Session, progress: Progress) -> Selection:
    """Trains up to the decision."""
    trainer, run = session.trainer, session.search
    progress.start(trainer.total, 0, 0)
    for loss_K in run.run(only_choice=True):
        progress.say_new(trainer.notes)
        if progress.due(trainer.step):
            losses = loss_K.tolist()
            alarm_if_diverged(losses, trainer.step)
            progress.update(trainer.step, run.names, losses, trainer.tokens)
    look, bank, decision = run.state.looks[-1], trainer.bank, decision_of(session)
    return Selection(
        rank=look.verdict.pick,
        reason=reason_of(session),
        curve=look.verdict.points,
        interval=decision.interval,
        confident=decision.confident,
        edge=decision.edge,
        doubts=tuple(doubts(look.verdict.pick, decision, look.verdict.points[-1].rank)),
        learning_rate=run.setting(look.verdict.pick).lr,
        _config=lora_config(bank, adapter_of(bank, 0)),
    )


def preview_config(config: RunConfig, rows: int = 3) -> tuple[Text, list[str]]:
    """The first training rows with their supervised tokens marked, and what is to be said of the data.

    Raises:
        RankraceError: a fault that would spoil the training.
    """
    reach_hub(config.model)
    tokenizer = load_tokenizer(config.model)
    task = task_of(config)
    read = read_splits(config)
    data = checked_data(encode_splits(read, make_encoder(config, tokenizer, task, read)), tokenizer, task)
    return preview_text(data.train.examples, tokenizer, rows), data.notes
