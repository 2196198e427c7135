"""The command line. Each option of `train`, `search`, `preview` and `plan` is a field of RunConfig, and nothing else.

What a command finds goes to stdout, so that it can be piped; everything else goes to stderr.
"""

import inspect
import io
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml
from rich.console import Console

from rankrace._version import __version__
from rankrace.config import RunConfig
from rankrace.errors import RankraceError
from rankrace.options import checked

if TYPE_CHECKING:
    from rankrace.evaluate.command import Figure

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="LoRA fine-tuning in which nobody has to guess the rank.",
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False)

YAML_ONLY = {"rank_lr"}
OF_A_RUN = {"out", "resume", "save_every", "track", "average"}
"""Options of `train` alone; the others do not show them. `preview` and `plan` take them, so that they stand before
a run with its very options; from `search`, which trains, too, one would expect something of them."""
PANELS = {
    "model": "What to train on what",
    "strategy": "Which rank",
    "target_modules": "LoRA",
    "lr": "Optimisation",
    "seed": "Running",
}
"""Headings of the help, each at the field that opens it."""


def show_version(asked: bool) -> None:
    if asked:
        out.print(f"rankrace {__version__}")
        raise typer.Exit


@app.callback()
def whole(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before a command."""


def main() -> None:
    """Errors a user can mend end with code 2 and three lines; Ctrl-C with 130 and the command to go on."""
    from rankrace.interrupt import Interrupted

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where a terminal has no ± or →, no run shall end for it
            stream.reconfigure(errors="replace")
    on_one_line = not err.is_terminal
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="rankrace", standalone_mode=False)
    except typer.TyperException as error:
        misread = RankraceError(
            error.format_message(),
            why="the command line cannot be read",
            fix="see `rankrace --help`, and `rankrace COMMAND --help` for the options of a command",
        )
        err.print(f"error: {misread}", markup=False, soft_wrap=on_one_line)
        sys.exit(2)
    except RankraceError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=on_one_line)
        sys.exit(2)
    except Interrupted as stop:
        err.print(f"{stop.said}\n  {stop.resume}", markup=False, soft_wrap=True)
        sys.exit(130)
    if code == 130:  # Ctrl-C as Typer reports it
        err.print("Stopped.")
    if code:
        sys.exit(code)


def quieten() -> None:
    """Keeps what libraries say about themselves off the terminal, but for the progress of downloads."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    downloads = not are_progress_bars_disabled()
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)
    # Of torch, at the first backward pass on a GPU: it then sets the context, and all is well.
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS, but there was no current CUDA context")


def merged(config_file: Path | None, given: dict[str, Any]) -> RunConfig:
    """One configuration from a YAML file and the command line, which wins.

    Raises:
        RankraceError: an unreadable file, an unknown key (with the nearest known one) or a bad value.
    """
    values: dict[str, Any] = {}
    if config_file is not None:
        try:
            values = yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RankraceError(
                f"cannot read the configuration {config_file}: {' '.join(str(error).split())}",
                why="its options were to be used",
                fix="give a YAML file with one option a line, such as `ranks: [2, 4, 8]`",
            ) from error
        if not isinstance(values, dict):
            raise RankraceError(
                f"{config_file} does not hold options",
                why="a configuration is a mapping of option names to values",
                fix="write one `name: value` a line",
            )
        values = {str(k).replace("-", "_"): v for k, v in values.items()}
    values.update({name: value for name, value in given.items() if value is not None})
    return checked({name: split_list(name, value) for name, value in values.items()})


def with_options(command: Callable[[RunConfig], None]) -> Callable[..., None]:
    """Gives a command one flag for each field of RunConfig, and --config."""

    def wrapper(**given: Any) -> None:
        config_file = given.pop("config")
        config = merged(config_file, given)
        if command.__name__ == "search":
            refuse_of_a_run(given)
        quieten()
        command(config)

    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None, typer.Option("--config", help="A YAML file with any of these options.")
            ],
        )
    ]
    panel = ""
    for name, info in RunConfig.model_fields.items():
        panel = PANELS.get(name, panel)
        if name in YAML_ONLY:
            continue
        flag = "--" + name.replace("_", "-")
        switch = info.annotation is bool
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if switch else flag,
            help=(info.description or "") + ("" if info.is_required() else shown_default(info.default)),
            show_default=False,
            metavar=None if switch else shown_type(info.annotation),
            rich_help_panel=panel,
            hidden=name in OF_A_RUN and command.__name__ != "train",
        )
        # Numbers pass as text: RunConfig reads those of the command line and of YAML by the same rules.
        kind = Annotated[(bool if switch else str) | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    return wrapper


def refuse_of_a_run(given: dict[str, Any]) -> None:
    """Raises RankraceError for an option that a search has no use for; in a file, which may be that of a run, it may
    stand."""
    idle = sorted(name for name in OF_A_RUN if given.get(name) is not None)
    if idle:
        raise RankraceError(
            f"`rankrace search` has no use for --{idle[0].replace('_', '-')}",
            why="it prints its choice, and neither trains on from it nor writes or keeps anything",
            fix="leave it out, or redirect the output: rankrace search … > choice.txt; `rankrace train` writes a run",
        )


def shown_type(annotation: Any) -> str:
    """What an option takes, for the help: auto|cpu, INTEGER, 2,4,8 …"""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shown_type(inner[0])
    if origin in (Union, types.UnionType):
        return "|".join(shown_type(a) for a in inner if a is not type(None))
    if origin is Literal:
        return "|".join(inner)
    if origin is tuple:
        return f"{shown_type(inner[0])},…"
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def split_list(name: str, value: Any) -> Any:
    """2,4,8 → (2, 4, 8) for the options that take several values; the same text may stand in YAML."""
    if name in ("ranks", "lr_scales") and isinstance(value, str | int | float):
        return tuple(part.strip() for part in str(value).split(",") if part.strip())
    if name == "target_modules" and isinstance(value, str) and value != "all-linear":
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def shown_default(value: Any) -> str:
    """For the help; nothing where it is off or depends on the run."""
    if value is None or value is False:
        return ""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f" Default: {'on' if value is True else f'{value:g}' if isinstance(value, float) else value}."


@app.command()
@with_options
def train(config: RunConfig) -> None:
    """Choose the rank, train, and write adapter, result.json and report.html."""
    from rankrace.report.text import delivered, interval
    from rankrace.report.text import warnings as doubts_of
    from rankrace.run import train as run

    result = run(config)
    a, b = result.loss, result.accuracy
    unit = "token" if result.task == "causal" else "example"
    say("rank", str(result.rank))
    say("reason", result.reason)
    if what := interval(result.decision.interval):
        say("interval", f"the rule would pick {what}")
    for doubt in doubts_of(result):
        say("but", doubt)
    say("loss", f"{a.base:.4f} → {a.final:.4f} nats per {unit}")
    if b.base is not None and b.final is not None:
        whole = " of answers wholly right" if result.task == "causal" else ""
        say("accuracy", f"{b.base:.1%} → {b.final:.1%}{whole}")
    if what := delivered(result):
        say("delivered", what)
    say("parameters", f"{result.trainable_parameters:,}")
    say("time", f"{result.time.total_s:.0f} s, {result.time.search_s:.0f} s of it for the choice")
    say("adapter", str(config.out / "adapter"))
    say("report", str(config.out / "report.html"))


def say(name: str, text: str) -> None:
    """A line of the result; on a terminal a long one is wrapped beside its name."""
    line = f"{name:<11} {text}"
    if out.is_terminal:
        line = textwrap.fill(line, out.width, subsequent_indent=" " * 12, break_on_hyphens=False)
    out.print(line, markup=False)


@app.command()
@with_options
def search(config: RunConfig) -> None:
    """Only choose the rank; print it, the reason, and a ready peft.LoraConfig."""
    from rankrace.choose import search_config
    from rankrace.report.text import interval

    chosen = search_config(config)
    say("rank", str(chosen.rank))
    say("reason", chosen.reason)
    if what := interval(chosen.interval):
        say("interval", f"the rule would pick {what}")
    for doubt in chosen.doubts:
        say("but", doubt)
    out.print(chosen.code(), markup=False)


@app.command()
@with_options
def preview(config: RunConfig) -> None:
    """Show how rows become tokens and which are supervised; stop on faults."""
    from rankrace.choose import preview_config

    text, notes = preview_config(config)
    for note in notes:
        out.print(f"Note: {note}", markup=False)
    out.print(text)


@app.command()
@with_options
def plan(config: RunConfig) -> None:
    """Memory and time before the run: what it takes, whether it fits, and what would."""
    from rankrace.forecast import forecast
    from rankrace.progress import Progress, clock

    with Progress() as progress:
        f = forecast(config, progress)
    c, m, (K, T) = f.config, f.memory, f.largest

    def size(count: float) -> str:
        return f"{count / 2**30:8.2f} GiB"

    say("model", f"{f.parameters:,} parameters, {c.dtype} on {c.device}"
        + ("" if c.quantize == "none" else f", its layers in {c.quantize.upper()}"))  # fmt: skip
    say("candidates", f"{len(f.ranks)} of rank {', '.join(map(str, f.ranks))}")
    looks = "1 look" if f.looks == 1 else f"at most {f.looks} looks"
    say("steps", f"{f.steps:,} of {f.step_tokens:,.0f} tokens, {looks}")
    say("passes", f"at most {c.micro_tokens:,} tokens in training; the largest {T:,} × {K}; compile {c.compile}, "
        f"CUDA graphs {c.cuda_graphs}, recompute {c.recompute}")  # fmt: skip
    say("memory", f"{size(m.base)}  {'process and base model' if c.device == 'cpu' else 'base model'}")
    for part, name in (
        (m.workspace, "libraries"),
        (m.candidates, "candidates: factors, gradients, moments"),
        (m.training, "the largest pass: activations, logits"),
        (m.looking, "or a look: truncations, its largest pass"),
        (m.graphs, "CUDA graphs: looks beside their memory"),
    ):
        if part:
            say("", f"{size(part)}  {name}")
    say("peak", size(m.peak).strip())
    if f.remedy is None:
        say("fits", f"yes: {size(m.peak).strip()} of {size(m.capacity).strip()}")
    else:
        say("fits", f"no: {size(m.peak).strip()} of {size(m.capacity).strip()}; what would: {f.remedy}")
    if f.seconds is not None:
        say("step", f"{f.seconds.step:.2f} s")
        say("time", f"{clock(f.seconds.whole)}, {clock(f.seconds.looks)} of it for looks")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="OUT/adapter of a finished run.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Where the merged model goes: a new or an empty folder.")],
    model: Annotated[str | None, typer.Option(help="The base model, if it has moved.")] = None,
) -> None:
    """Merge an adapter into its 16-bit base model and verify the logits."""
    quieten()
    from rankrace.merge import merge as run
    from rankrace.progress import Progress

    with Progress() as progress:
        progress.phase("merging, and comparing the logits")
        merged = run(adapter, out_folder, model)
    out.print(
        f"merged into {out_folder}; largest difference of a logit: {merged.worst:.2g}, where the largest logit is "
        f"{merged.largest:.2g}: the rounding to 16 bits",
        markup=False,
    )
    out.print(
        f"load it without PEFT: transformers.{merged.loader}.from_pretrained({str(out_folder)!r})", markup=False
    )


@app.command(name="eval")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="OUT/adapter of a finished run, or any PEFT adapter.")],
    task: Annotated[str, typer.Option(help="squad2, sst2, … ; with lm-eval a task of its own or its YAML file.")],
    model: Annotated[str | None, typer.Option(help="The base model, if it has moved.")] = None,
    part: Annotated[str, typer.Option(help="test or validation.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many rows.")] = None,
    generated: Annotated[bool, typer.Option(help="Let the model write answers that it could choose.")] = False,
    base: Annotated[bool, typer.Option("--base", help="Its base beside it, and the difference.")] = False,
    evaluator: Annotated[str, typer.Option(help="rankrace or lm-eval.")] = "rankrace",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Draws the validation part, where the task has none.")] = 0,
) -> None:
    """Measure an adapter on a task: each metric ± its standard error over the rows, clustered by document."""
    quieten()
    from rankrace.evaluate.command import evaluate as run
    from rankrace.evaluate.command import one_of

    one_of("part", part, ("test", "validation"))
    one_of("evaluator", evaluator, ("rankrace", "lm-eval"))
    if evaluator == "lm-eval":
        from rankrace.evaluate.lm_eval import evaluate_with_lm_eval

        ours = {"base": base, "part": part != "test", "generated": generated, "seed": seed != 0}
        for option in (name for name, given in ours.items() if given):
            raise RankraceError(
                f"--{option} has no effect with --evaluator lm-eval",
                why="the harness's task says which rows are measured and how, and gives no more than means",
                fix="leave it out, or use --evaluator rankrace",
            )
        for name, value in evaluate_with_lm_eval(adapter, task, model=model, limit=limit, device=device).items():
            say(name, f"{value:.4f}")
        return
    found = run(
        adapter, task, model=model, part=part, limit=limit, generated=generated, with_base=base, device=device,
        seed=seed,
    )  # fmt: skip
    for name, metric in found.metrics.items():
        line = figure(metric.adapter)
        if metric.base is not None and metric.gain is not None:
            line += f", base {figure(metric.base)}, difference {figure(metric.gain, '+')}"
        say(name, line)
    say("rows", str(found.rows))


def figure(measured: "Figure", sign: str = "") -> str:
    """71.43 ± 2.10"""
    error = "" if measured.se is None else f" ± {measured.se:.2f}"
    return f"{measured.value:{sign}.2f}{error}"


bench = typer.Typer(help="Experiments: methods × tasks × seeds.")
app.add_typer(bench, name="bench")


@bench.command(name="run")
def bench_run(
    experiment: Annotated[Path, typer.Argument(help="A YAML file such as experiments/smoke.yaml.")],
    out_folder: Annotated[Path | None, typer.Option("--out", help="Results folder. Default: results/NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="Where its model lies, if not under its name.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these of its methods: lora-r8,shrink.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these of its tasks.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these of its seeds.")] = None,
    runner: Annotated[str, typer.Option(help="local or ray.")] = "local",
    slots: Annotated[int, typer.Option(min=0, help="Runs at once; 0: one after another in this process.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    memory_gib: Annotated[float, typer.Option(min=0, help="Free GPU memory that a further run wants (local).")] = 6.0,
    stop_after: Annotated[float | None, typer.Option(min=0, help="Minutes after which no run starts.")] = None,
    retry_failed: Annotated[bool, typer.Option(help="Run again what has failed.")] = False,
) -> None:
    """Run what is missing of an experiment; failures are recorded and do not stop the rest."""
    quieten()
    from rankrace.bench.run import run_experiment
    from rankrace.evaluate.command import one_of

    one_of("runner", runner, ("local", "ray"))
    folder = out_folder or Path("results") / experiment.stem
    done, failed, left = run_experiment(
        experiment, folder, model=model, methods=listed(methods), tasks=listed(tasks), seeds=listed(seeds),
        runner=runner, slots=slots, device=device, memory_gib=memory_gib, stop_after=stop_after, retry=retry_failed,
    )  # fmt: skip
    say("done", f"{done} runs now, {failed} of them failed, {left} are missing")
    say("records", str(folder / "runs"))


def listed(given: str | None) -> list[str] | None:
    return None if given is None else [name.strip() for name in given.split(",")]


@bench.command(name="table")
def bench_table(
    folder: Annotated[Path, typer.Argument(help="The results folder of `bench run`.")],
    times: Annotated[Path | None, typer.Option(help="Times from the same runs here, done again alone.")] = None,
) -> None:
    """Write table.md, .tex, .csv, .html, two figures and index.sqlite beside the records; print the first."""
    quieten()
    from rankrace.bench.render import markdown, write_all
    from rankrace.bench.store import Store
    from rankrace.bench.table import build

    store, again = Store(folder), None if times is None else Store(times)
    records, timed = store.existing(), None if again is None else again.existing()
    for path in [*store.broken, *(again.broken if again else [])]:
        err.print(f"Left out: {path} is no whole record", markup=False, soft_wrap=True)
    table = build(records, timed)
    store.index(records)
    write_all(table, folder)
    out.print(markdown(table), markup=False)


if __name__ == "__main__":
    main()
