"""A run from configuration to adapter: data → model → search and training → adapter, result, report.

rankrace.train(RunConfig(model="HuggingFaceTB/SmolLM2-135M", data="squad_v2", out="runs/squad"))
"""

import shlex
import time

from transformers import PreTrainedTokenizerBase

from rankrace.bank import adapter_of, save_adapter
from rankrace.config import RunConfig
from rankrace.device import wait_for
from rankrace.interrupt import Interrupted, Interrupts
from rankrace.loading import open_session
from rankrace.output import MAY_DIFFER, OutputFolder, writing
from rankrace.progress import Progress
from rankrace.record import Clock, describe, reason_of
from rankrace.report.card import write_card
from rankrace.report.page import write_report
from rankrace.result import Result
from rankrace.session import Session
from rankrace.track import Curves, check_tracker, tracked
from rankrace.training.checkpoint import load_checkpoint, newest_step, save_checkpoint, written_whole
from rankrace.training.divergence import alarm_if_diverged

SAVES = 20
"""Checkpoints of a run, unless save_every says otherwise."""


def train(config: RunConfig) -> Result:
    """Runs, or resumes, to the end.

    Returns:
        What result.json holds; of a run that was finished already what it held.

    Raises:
        RankraceError: something the user can put right; nothing half-written is left.
        Interrupted: Ctrl-C; the run was saved first. After a second one it goes on from its last checkpoint, if there
            is one.
    """
    check_tracker(config.track)
    folder = OutputFolder(config.out)
    finished = folder.check(config)
    started = folder.started()
    if started is not None:
        config = continued(started, config)
    with Progress() as progress:
        if finished is not None:
            progress.say(f"This run is finished: {folder.report}")
            return finished
        clock = Clock()
        session, tokenizer = open_session(config, progress)
        clock.evaluation = session.base_seconds
        folder.claim(session.config)
        found = load_checkpoint(folder.checkpoints)
        if found is not None:
            tensors, state = found
            session.restore(tensors, state["session"])
            progress.said = len(state["session"].get("notes", []))  # by the lives before
            clock.before = state["seconds"]
            clock.evaluation += state["evaluation_seconds"]  # the base was measured in each life
            progress.say(f"Resumed after step {session.trainer.step} of {session.trainer.total}.")
        with (
            Interrupts() as interrupts,
            tracked(session.config, session.search.state, session.trainer.step) as curves,
        ):
            try:
                drive(session, folder, clock, progress, interrupts, curves)
                result = finish(session, tokenizer, folder, clock, progress, interrupts)
                curves.end(result)
                return result
            except KeyboardInterrupt:
                raise stopped_at_once(folder, session.trainer.step) from None


def continued(started: RunConfig, now: RunConfig) -> RunConfig:
    """The run that is in the folder; of the options that may change half-way those that are given now."""
    values = dict(now)
    given = {key: values[key] for key in MAY_DIFFER & now.model_fields_set}
    return started.model_copy(update={**given, "out": now.out, "resume": True})


def stopped_at_once(folder: OutputFolder, step: int) -> Interrupted:
    """After a second Ctrl-C: what it says of saving is what is on disk."""
    saved = newest_step(folder.checkpoints)
    return Interrupted(resume_command(folder), None if 0 < saved == step else saved)


def resume_command(folder: OutputFolder) -> str:
    return shlex.join(["rankrace", "train", "--config", str(folder.config), "--out", str(folder.root), "--resume"])


def drive(
    session: Session,
    folder: OutputFolder,
    clock: Clock,
    progress: Progress,
    interrupts: Interrupts,
    curves: Curves,
) -> None:
    """Trains to the end; saves as it goes, and before it stops."""
    trainer, search = session.trainer, session.search
    every = session.config.save_every or max(1, trainer.total // SAVES)
    progress.start(trainer.total, trainer.step, trainer.tokens)
    decided = search.decided

    def save() -> None:
        state = {
            "session": session.state(),
            "seconds": clock.total,
            "evaluation_seconds": clock.evaluation,
        }
        save_checkpoint(folder.checkpoints, trainer.step, session.tensors(), state)
        curves.follow()

    for _ in search.run():
        progress.say_new(trainer.notes)
        if search.decided and not decided:
            decided = True
            progress.say(decision_line(session))
            wait_for(trainer.bank.device)
            began = time.perf_counter()
            session.mark_choice()
            clock.evaluation += time.perf_counter() - began
        if progress.due(trainer.step):
            losses = search.latest_losses()
            alarm_if_diverged(losses, trainer.step)
            progress.update(trainer.step, search.names, losses, trainer.tokens)
        asked = interrupts.asked  # read once: it may change at any moment
        if asked or trainer.step % every == 0 or trainer.step == trainer.total:
            save()
        if asked:
            break
    progress.say_new(trainer.notes)
    stop_if_asked(interrupts, folder)


def stop_if_asked(interrupts: Interrupts, folder: OutputFolder) -> None:
    """Raises Interrupted after a Ctrl-C."""
    if interrupts.asked:
        raise Interrupted(resume_command(folder))


def decision_line(session: Session) -> str:
    look = session.search.state.looks[-1]
    return f"Rank {look.verdict.pick}: {reason_of(session)}"


def finish(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    folder: OutputFolder,
    clock: Clock,
    progress: Progress,
    interrupts: Interrupts,
) -> Result:
    """Measures the finished adapter on fresh examples and writes everything; result.json comes last.

    Raises:
        Interrupted: Ctrl-C, before the last file; what is written already is written again.
    """
    progress.phase("measuring the adapter")
    wait_for(session.trainer.bank.device)
    began = time.perf_counter()
    ending = session.end()
    final = session.trainer.measure(session.fresh)
    clock.evaluation += time.perf_counter() - began
    alarm_if_diverged(final.mean_K.tolist(), session.trainer.step)
    stop_if_asked(interrupts, folder)
    result = describe(session, final, ending, clock)
    settings = session.config.model_dump(mode="json", exclude={"resume"})
    bank = session.trainer.bank
    with written_whole(folder.adapter) as partial:
        save_adapter(bank, adapter_of(bank, 0), partial)
        tokenizer.save_pretrained(partial)
        write_card(result, settings, partial / "README.md")
    stop_if_asked(interrupts, folder)
    with writing(folder.root):
        write_report(result, settings, folder.report)
        result.write(folder.result)
    return result
