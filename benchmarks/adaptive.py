"""Whole adaptive runs against the sweep: what each strategy chose, what that cost, and where it ended.

    python -m benchmarks.adaptive --model SMOLLM2_FOLDER --data DATA --units gsm8k:0,squad2:0
    python -m benchmarks.adaptive … --units gsm8k:0,…,gsm8k:9 --only-choice --out results/selection/choices

The same rows, seeds, steps and batches as benchmarks/sweep.py. Choices see its looked-at examples alone (and halve
them, as any run does); the end is measured on its fresh ones, to be compared with every arm of the sweep in pairs.

fixed      rank 16 by itself, as people train it: its last step, though its average is measured, too
shrink     the default; shrink-quality: with --prefer quality; shrink-one: with --rule one_se, once the default
shrink-lr  with --lr-scales, at those of the sweep
race       grid: as the paper has it
"""

from dataclasses import asdict, replace
from typing import Any

from benchmarks.study import Study, arguments, ended, run_units
from benchmarks.sweep import OTHER_RATES, RATES
from rankrace.data.encoded import EncodedSet
from rankrace.device import wait_for
from rankrace.record import decision_of, reason_of
from rankrace.select.build import rule_of
from rankrace.session import Session, prepare
from rankrace.training.loop import Measured

ARMS: dict[str, dict[str, Any]] = {
    "fixed": {"strategy": "grid", "ranks": (16,), "refine": False},
    "shrink": {},
    "shrink-quality": {"prefer": "quality"},
    "shrink-one": {"rule": "one_se"},
    "shrink-lr": {},
    "race": {"strategy": "race"},
    "grid": {"strategy": "grid"},
}
CHOICES = ("shrink", "shrink-quality")
"""Strategies whose choice alone is repeated over many seeds."""


def run(study: Study, arms: tuple[str, ...], only_choice: bool) -> dict[str, Any]:
    found, fresh = {}, None
    for name in arms:
        session = opened(study, name)
        trainer, search = session.trainer, session.search
        for _ in search.run(only_choice=only_choice):
            pass
        wait_for(trainer.bank.device)
        found[name] = chosen(session)
        if not only_choice:
            fresh, told = both_ends(session, study)
            found[name] |= told | ({"fresh": told.get("last", told["fresh"])} if name == "fixed" else {})
        trainer.bank.detach()
    record = study.record(fresh.tokens_N if fresh is not None else [])
    ends = [found[name]["fresh"]["loss"][0] if "fresh" in found[name] else found[name]["rank"] for name in arms]
    return {**record, "arms": found, "fresh": {"loss": ends}}


def opened(study: Study, name: str) -> Session:
    """The arm's run, ready to go; its choices see no fresh example."""
    options = dict(ARMS[name])
    if name == "shrink-lr":
        options["lr_scales"] = RATES.get(study.name, OTHER_RATES)
    config = type(study.config).model_validate({**study.config.model_dump(), **options})
    held = study.data.validation
    looked = EncodedSet(examples=study.looked, truncated=held.truncated, dropped=0, supervised_tokens=1)
    return prepare(config, replace(study.data, validation=looked), study.hf, "causal")


def both_ends(session: Session, study: Study) -> tuple[Measured, dict[str, Any]]:
    """What is delivered on the fresh examples; where rows came back also the last step and the average."""
    trainer = session.trainer
    last = trainer.measure(study.fresh)
    if trainer.average is None:
        return last, {"fresh": ended(last)}
    with trainer.averaged():
        average = trainer.measure(study.fresh)
    ending = session.end()
    fresh = average if ending.averaged else last
    return fresh, {"fresh": ended(fresh), "last": ended(last), "average": ended(average), "ending": asdict(ending)}


def chosen(session: Session) -> dict[str, Any]:
    """What the search decided, and its cost beside that of one training."""
    search, trainer = session.search, session.trainer
    verdict = search.state.looks[-1].verdict
    return {
        "rank": verdict.pick,
        "reason": reason_of(session),
        "decision": decision_of(session).model_dump(mode="json"),
        "curve": [[p.rank, round(p.loss, 6), round(p.se, 6), p.source] for p in verdict.points],
        "looked": len(search.examples),
        "measured": sum(max(len(look.verdict.points), len(look.rates)) for look in search.state.looks),
        "candidate_steps": sum(e.steps for e in search.state.entries) / trainer.total,
        "steps_s": trainer.seconds,
        "looks_s": search.state.look_seconds,
        "lr": search.setting(verdict.pick).lr,
        "rates": [[x.lr_scale, round(x.loss, 6), round(x.se, 6)] for look in search.state.looks for x in look.rates],
        "micro_tokens": session.config.micro_tokens,
        "rule": rule_of(session.config),
    }


def main() -> None:
    parser = arguments(__doc__, "results/selection/adaptive")
    parser.add_argument("--arms", help="some of the strategies; default: all, or those of --only-choice")
    parser.add_argument("--only-choice", action="store_true", help="stop once the rank is chosen")
    given = parser.parse_args()
    default = CHOICES if given.only_choice else tuple(ARMS)
    arms = tuple(given.arms.split(",")) if given.arms else default
    run_units(given, "benchmarks.adaptive", lambda study: run(study, arms, given.only_choice))


if __name__ == "__main__":
    main()
