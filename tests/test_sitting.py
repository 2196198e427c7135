"""A sitting's records come back whole, also those of a sitting that is cut off."""

import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import sitting

WRITE = "python -c \"from pathlib import Path; p = Path('{}'); p.parent.mkdir(parents=True); p.write_text('{}')\""


def sit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, workers: int, seconds: float) -> dict[str, str]:
    """File of the pack → its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.txt").write_text("\n".join(lines) + "\n")
    to = tmp_path / "a.tar.xz"
    arguments = f"sitting queue.txt --workers {workers} --seconds {seconds} --pack {to}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    sitting.main()
    with tarfile.open(to) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    files = (p for p in (tmp_path / "unpacked").rglob("*") if p.is_file())
    return {str(p.relative_to(tmp_path / "unpacked")): p.read_text() for p in files}


def test_new_records_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "results" / "old.json"
    old.parent.mkdir()
    old.write_text("old")
    time.sleep(0.05)
    monkeypatch.setenv("WHERE", "results/new/x.json")
    found = sit(
        tmp_path, monkeypatch, "# two", WRITE.format("results/a/a.json", "one"), WRITE.format("$WHERE", "two"),
        WRITE.format("results/b/b.partial", "half"), "python -c 'raise SystemExit(3)'", workers=2, seconds=60,
    )  # fmt: skip
    assert found == {"results/a/a.json": "one", "results/new/x.json": "two"}
    done = (tmp_path / "a.tar.xz.done").read_text().splitlines()
    assert sorted(line.split()[0] for line in done) == ["0", "0", "0", "3"]


def test_what_runs_when_the_time_is_up_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    found = sit(
        tmp_path, monkeypatch, WRITE.format("results/a/a.json", "one"), "python -c 'import time; time.sleep(60)'",
        WRITE.format("results/b/b.json", "never"), workers=1, seconds=3,
    )  # fmt: skip
    assert found == {"results/a/a.json": "one"}
    assert time.monotonic() - began < 30
    assert (tmp_path / "a.tar.xz.done").read_text().splitlines()[-1].startswith("stopped ")


def test_a_file_that_goes_while_it_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once cost a sitting its records: runs delete checkpoints all the time. Those are not packed, nor anything that
    is gone between the listing and its turn."""
    for name in ("runs/a.json", "runs/b.json", "runs/c.json", "work/a/state.json"):
        path = tmp_path / "results" / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    listed = sitting.records

    def and_gone(root: Path, since: float) -> list[Path]:
        found = listed(root, since)
        (tmp_path / "results/x/runs/b.json").unlink()
        return found

    monkeypatch.setattr(sitting, "records", and_gone)
    sitting.pack(tmp_path / "a.tar.xz", tmp_path, 0.0)
    with tarfile.open(tmp_path / "a.tar.xz") as archive:
        assert archive.getnames() == ["results/x/runs/a.json", "results/x/runs/c.json"]
