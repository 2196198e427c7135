"""The page of a run: one HTML file that needs nothing but a browser."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from rankrace.report import figures, text
from rankrace.report.canvas import NARROW, PALETTE, WIDE, Format
from rankrace.result import Look, Result, replace_text


def write_report(result: Result, config: dict[str, Any], path: Path) -> None:
    """Write the page to `path`, beside the folder `adapter`. `config` is the run's resolved configuration."""
    replace_text(path, render_report(result, config, adapter=str(path.parent / "adapter")))


def render_report(result: Result, config: dict[str, Any], *, adapter: str) -> str:
    """The page as HTML; `adapter` is the folder that its loading code names."""
    choice, how = text.reason_parts(result)
    several_looks = sum(len(figures.finite(look)) > 1 for look in result.looks) > 1
    return (
        text.templates(autoescape=True)
        .get_template("page.html.j2")
        .render(
            result=result,
            model_name=text.model_name(result),
            choice=choice,
            how=how,
            palette=PALETTE,
            rank_figure=_both(figures.loss_against_rank, result),
            step_figure=_both(figures.loss_against_step, result) if result.history else None,
            looks_figure=_both(figures.looks, result) if several_looks else None,
            looks=[_look_row(look) for look in result.looks if figures.finite(look)],
            costs=_costs(result),
            candidates=_candidate_rows(result),
            r16_share=text.r16_share(result),
            interval=text.interval(result.decision.interval),
            delivered=text.delivered(result),
            warnings=text.warnings(result),
            lora_config=text.lora_config_code(result, config),
            loading=text.loading_code(result, adapter),
            vllm=text.vllm_command(result, adapter),
            config_yaml=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        )
    )


def _both(draw: Callable[[Result, Format], str], result: Result) -> str:
    return draw(result, WIDE) + draw(result, NARROW)


def _look_row(look: Look) -> dict[str, Any]:
    rank, loss = min(figures.finite(look), key=lambda pair: pair[1])
    return {"step": look.step, "source": look.source, "compared": len(look.ranks), "best": rank, "loss": loss}


def _costs(result: Result) -> list[tuple[str, float, float]]:
    """(what, seconds, share of the total): the three parts add up to the total."""
    time = result.time
    training = max(0.0, time.total_s - time.search_s - time.evaluation_s)
    parts = [("Loading and training", training), ("Search", time.search_s), ("Evaluation", time.evaluation_s)]
    total = sum(seconds for _, seconds in parts) or 1.0
    return [(name, seconds, seconds / total) for name, seconds in parts]


def _candidate_rows(result: Result) -> list[dict[str, Any]]:
    """Each candidate with its last finite training loss."""
    last = {
        series.rank: next((loss for loss in reversed(series.losses) if loss is not None), None)
        for series in result.history
    }
    return [
        {
            "rank": candidate.rank,
            "status": candidate.status,
            "steps": candidate.steps,
            "loss": last.get(candidate.rank),
        }
        for candidate in sorted(result.candidates, key=lambda candidate: candidate.rank)
    ]
