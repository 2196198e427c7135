"""Numbers and sentences shared by the page and the model card."""

import shlex
import textwrap
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rankrace.result import Decision, Result
from rankrace.select.reason import HOW
from rankrace.select.statistics import CLEARLY, clearly

MANY = 1000
"""Groups of examples, where an older record does not say how many there were."""


def count(number: float) -> str:
    """2433024 -> "2.43 M"; below ten thousand in full."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def loss_unit(result: Result) -> str:
    return "nats per example" if result.task == "classification" else "nats per supervised token"


def loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def templates(*, autoescape: bool) -> Environment:
    """The package's templates, with the number formats of this file as filters."""
    environment = Environment(
        loader=PackageLoader("rankrace.report"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(count=count, duration=duration, gibibytes=gibibytes, percent=percent, loss=loss)
    return environment


def model_name(result: Result) -> str:
    """Its name on the hub, or that of its folder."""
    path = Path(result.model)
    return path.name if path.is_absolute() else result.model


def reason_parts(result: Result) -> tuple[str, str]:
    """The choice and how it came about, two sentences."""
    choice, how, rest = result.reason.partition(HOW)
    if not how:
        return _sentence(choice), ""
    return _sentence(choice) + ".", _sentence(how.removeprefix("; ") + rest)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def r16_share(result: Result) -> str | None:
    """The adapter's size against one of rank 16 on the same layers; None where ranks differ by layer."""
    if result.rank_pattern:
        return None
    share = result.rank / 16
    return f"{share:.3g}× an r=16 adapter" if share > 1 else f"{percent(share)} of an r=16 adapter"


def delivered(result: Result) -> str | None:
    """What of the training the adapter holds, if that is not the plain end of it."""
    ending = result.ending
    if not ending.averaged:
        return None
    return (
        "the average of the weights since the choice (later steps count more), "
        f"{loss(ending.gain)} ± {loss(ending.gain_se)} nats below the last step's on the examples that chose the rank"
    )


def warnings(result: Result) -> list[str]:
    """What a reader must know before trusting the choice."""
    found = []
    # Each gain is on its own examples, and those differ: what is lost has to be more than chance.
    then, now = result.decision.gain, result.loss.base - result.loss.final
    error, far = result.loss.gain_se, f"{abs(now):.4f}"
    if error is not None:
        far += f" ± {error:.4f}"
    if then is not None and then > 0 and now + CLEARLY * (error or 0.0) < then / 2:
        found.append(
            f"Lost again: at {percent(result.decision.fraction)} of training the validation loss was {then:.4f} "
            "below the base model's, on the examples that chose the rank; at its end, on those of the report, it is "
            f"{far} {'below' if now >= 0 else 'above'}. Either the learning rate is too high for this rank "
            "or the training too long: lower --lr or --epochs."
        )
    elif now <= 0:
        found.append(
            f"No gain: the validation loss with the adapter is not below that of the base model ({far} above). "
            "Check the data with rankrace preview and the learning rate."
        )
    rise, error = result.decision.rise, result.decision.rise_se
    if rise is not None and error is not None and clearly(rise, error, result.decision.clusters or MANY):
        found.append(
            f"Overfitting: since the rank was chosen, at {percent(result.decision.fraction)} of training, the "
            f"validation loss has risen by {rise:.4f} ± {error:.4f} nats, on the examples that chose it. Fewer "
            "--epochs, a lower --lr or more rows would end lower."
        )
    found += doubts(result.rank, result.decision, max(point.rank for point in result.curve))
    lost = [candidate for candidate in result.candidates if candidate.status == "diverged"]
    if lost:
        verb = "was" if len(lost) == 1 else "were"
        *others, last = (candidate.name for candidate in lost)
        names = [", ".join(others), last] if others else [last]
        found.append(
            f"Diverged: {' and '.join(names)} {verb} removed when the loss or a gradient was no longer finite."
        )
    return found


def interval(found: tuple[int, int] | None) -> str | None:
    """What the choice owes to the draw of the held-out documents (`Decision.interval`); None where nobody knows."""
    if found is None:
        return None
    low, high = found
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    return f"{ranks} in 95% of bootstrap samples of the held-out examples"


def doubts(rank: int, decision: Decision, largest: int) -> list[str]:
    """The part of them that is about the choice alone.

    Args:
        largest: of the ranks that were measured.
    """
    found = []
    if decision.edge == "high":
        where = "the largest rank there was to choose"
        if rank < largest:
            where = f"near {largest}, {where}, which is still the best"
        found.append(
            f"Edge of the search: {rank} is {where}. A larger one may be better; add larger candidates with --ranks."
        )
    if decision.edge == "low" and rank > 1:
        found.append(
            f"Edge of the search: {rank} is the smallest rank there was to choose. A smaller one "
            "may do as well; add smaller candidates with --ranks."
        )
    if decision.capped:
        found.append(
            f"Decided at the limit: the choice had not settled by the last look, after "
            f"{percent(decision.fraction)} of training."
        )
    if not decision.confident and not found:  # either of the above is why
        end = "" if rank == 1 else " Another seed may choose another rank."
        found.append(f"Not confident: {decision.doubt or 'the paired errors do not bear this rank out'}.{end}")
    if decision.lr_edge is not None:
        end, more = ("largest", "larger") if decision.lr_edge == "high" else ("smallest", "smaller")
        found.append(
            f"Learning rate: the {end} that was tried was the best, {decision.lr_scale:g} times --lr. A {more} one "
            "may be better, and a rank chosen at a wrong one may be wrong; try more with --lr-scales."
        )
    return found


def lora_config_code(result: Result, config: dict[str, Any]) -> str:
    """A peft.LoraConfig that makes an adapter like the delivered one."""
    rslora = config.get("scaling") == "rslora"

    def alpha(rank: int) -> int | float:
        found = round(result.scaling * (rank**0.5 if rslora else rank), 6)
        return int(found) if found.is_integer() else found

    lines = [
        f"r={result.rank},",
        f"lora_alpha={alpha(result.rank)},",
        f"lora_dropout={config.get('dropout', 0.0)},",
    ]
    if rslora:
        lines.append("use_rslora=True,")
    named: dict[str, Any] = {"target_modules": result.target_modules}
    if result.rank_pattern:
        alphas = {name: alpha(r) for name, r in result.rank_pattern.items()}
        named = {"rank_pattern": result.rank_pattern, "alpha_pattern": alphas, **named}
    for name, value in named.items():
        lines += textwrap.wrap(
            f"{name}={value},", 84, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    lines.append('task_type="SEQ_CLS",' if result.task == "classification" else 'task_type="CAUSAL_LM",')
    body = textwrap.indent("\n".join(lines), "    ")
    return f"from peft import LoraConfig\n\nlora_config = LoraConfig(\n{body}\n)"


def loading_code(result: Result, adapter: str) -> str:
    """Python that loads the base and the adapter in the folder `adapter`."""
    kind = "SequenceClassification" if result.task == "classification" else "CausalLM"
    labels = f", id2label={dict(enumerate(result.labels))!r}" if result.labels else ""
    return (
        f"from peft import PeftModel\n"
        f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({adapter!r})\n"
        f"model = AutoModelFor{kind}.from_pretrained({result.model!r}{labels})\n"
        f"model = PeftModel.from_pretrained(model, {adapter!r})"
    )


def vllm_command(result: Result, adapter: str) -> str | None:
    """The command that serves the adapter; None for a task or rank that vLLM's LoRA does not serve."""
    if result.task != "causal" or result.vllm_max_lora_rank is None:
        return None
    return (
        f"vllm serve {shlex.quote(result.model)} --enable-lora \\\n"
        f"    --max-lora-rank {result.vllm_max_lora_rank} --lora-modules {shlex.quote('tuned=' + adapter)}"
    )
