"""Every option of a run, checked when built. No logic lives here.

One option = one field = one command-line flag (`--batch-size`) = one YAML key (`batch_size`).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Rank = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Quantize = Literal["none", "nf4", "fp8"]
Rule = Literal["one_se", "two_se", "argmin"]


class RunConfig(BaseModel):
    """A fine-tuning run. The docstring line of each field is its help text.

    Raises:
        pydantic.ValidationError: a value that an option does not take. (The command and `rankrace.search` make a
            RankraceError of it, `options.checked`.)
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    # --- what to train on what
    model: str
    """A Hugging Face model name or a local folder."""
    data: str
    """A hub data set name, a folder, or a jsonl / json / csv / tsv / parquet file."""
    out: Path = Path("rankrace-out")
    """The output folder."""
    task: Literal["auto", "causal", "classification"] = "auto"
    """auto: classification for an encoder such as BERT, causal language modelling otherwise."""
    validation: str | None = None
    """A file with validation rows. Without one (and no split of that name), part of the data is held out."""
    validation_fraction: Fraction = 0.1
    """The share of the rows (whole documents) held out where there is no validation split."""
    validation_max: Annotated[int, Field(ge=1)] = 1000
    """At most this many validation examples. A look measures about half of them at most; all, if they are too few to
    halve."""
    train_max: Annotated[int, Field(ge=1)] | None = None
    """Train on at most this many rows, drawn by the seed."""
    group_column: str | None = None
    """The column that names a row's document; rows of one document never straddle the split."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """auto: the model's chat template for messages and alpaca rows, plain text for prompt+completion rows."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longer examples are cut to this many tokens (the prompt first, from its start)."""

    # --- which rank
    strategy: Literal["shrink", "race", "grid"] = "shrink"
    """shrink one wide adapter; race: cut it to several ranks that train on side by side; grid: from the start."""
    ranks: Annotated[tuple[Rank, ...], Field(min_length=1)] = (2, 4, 8, 16, 32)
    """Candidate ranks. shrink starts at twice the largest and may pick any integer up to the largest."""
    refine: bool = True
    """Search the integers between the grid points too."""
    prefer: Literal["quality", "balanced", "small"] = "balanced"
    """A smaller rank may lose 1%, 4% or 8% of what rank itself buys, or what the noise hides (see rule)."""
    penalty: Literal["log2", "parameters", "bytes"] = "log2"
    """log2: κ·G·log2(r). parameters, bytes: λ·p(r), p the adapter's parameters per base parameter, or bytes."""
    penalty_weight: Annotated[float, Field(ge=0)] = 0.0
    """λ, in nats, of the penalties parameters and bytes."""
    kappa: Annotated[float, Field(ge=0)] = 0.0
    """The share of the whole gain in loss that a doubling of the rank must buy."""
    rule: Literal["auto", Rule] = "auto"
    """one_se, two_se: the smallest rank whose objective is within one or two paired standard errors of the best;
    argmin: the best itself. auto: one_se to prefer quality, two_se otherwise."""
    lr_scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=8)] = (1.0,)
    """Learning rates to try first, as multiples of the rank's own (0.5,1,2): one more candidate each for a while."""
    twin: bool = False
    """Also train a second draw of the first candidate for a while: how much of a difference is chance."""
    layer_ranks: Literal["uniform", "pooled"] = "uniform"
    """pooled: shrink also tries ranks of their own for the layers, of as many parameters; kept if clearly better."""
    search_fraction: Fraction = 0.15
    """grid decides after this share of training; shrink when its pick is stable, at 0.30 at the latest, race at
    0.20. Where the smallest rank is not clearly behind by then, they wait: shrink until 0.60, race until 0.70."""

    # --- LoRA
    target_modules: (
        Literal["all-linear"] | Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    ) = "all-linear"
    """all-linear (all but the output head), or name endings such as q_proj,v_proj."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's α. The multiplier is α/r (or α/√r)."""
    scaling: Literal["lora", "rslora"] = "lora"
    """lora: multiplier α/r, the same α for every rank. rslora: α/√r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' inputs. All candidates get the same masks."""

    # --- optimisation
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate at the reference rank. Default: 5e-4·(2000/width)^0.78."""
    rank_lr: dict[Rank, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Learning rates of single ranks, overriding the rule (YAML only)."""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimiser steps, whatever the epochs."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples in one optimiser step."""
    micro_tokens: Annotated[int, Field(ge=1)] | None = None
    """At most this many tokens in a pass that trains, over all its candidates (no example is cut for it); up to four
    times as many in one that measures a small model on a GPU, which keeps little. Default: enough to fill the
    device."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning-rate decay after the warm-up, to zero at the end."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """The share of the steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Gradient norm limit of each candidate by itself."""
    average: Literal["on", "off"] = "on"
    """on: where rows are seen more than once, deliver the average of the weights since the choice instead of the last
    step's, if held-out examples say so by more than one paired standard error."""

    # --- running
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes initial factors, data order, split and dropout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute type. auto: bfloat16 on CUDA, float32 elsewhere. Factors are kept in at least float32."""
    quantize: Quantize = "none"
    """Keep the frozen base in fewer bits. nf4: a quarter of the memory. fp8: faster products on Hopper-class GPUs."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Fuse norms, rotary embeddings and activations (torch.compile). auto: on CUDA, where a long run repays it."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Launch a whole pass at once. auto: on CUDA, where launching its kernels one by one would take longer."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Keep only what enters each block, and run the block again for its gradient: a third more work, far less memory.
    auto: on CUDA, where the longest example would not fit otherwise."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps between checkpoints. Default: a twentieth of the run."""
    track: Literal["none", "tensorboard", "trackio", "wandb", "mlflow"] = "none"
    """Where else losses are followed, beside report and result.json. The package of that name is needed."""
    resume: bool = False
    """Continue the run in --out, or start it if there is none."""
