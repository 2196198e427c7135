"""How long the examples of real data sets are, in tokens of SmolLM2: benchmarks/lengths.json.

    python -m benchmarks.lengths --model SMOLLM2_FOLDER --data DATA

512 training rows each, drawn by seed 0, with the prompts of rankrace's tasks. Where the training part is not among
the local files (SQuAD 2.0, MedMCQA) they are drawn from the part that is. With these lengths a machine without data
and without tokenizer can measure; `rows` is how many the real training set has.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rankrace.config import RunConfig
from rankrace.data import make_encoder, split_rows
from rankrace.data.encode import encode_all
from rankrace.data.files import Rows, read_file
from rankrace.data.sources import SourceRows
from rankrace.tasks import find_task
from rankrace.tasks.medqa import medmcqa_rows
from rankrace.training.model import load_tokenizer

FILE = Path(__file__).with_name("lengths.json")
DRAWN = 512
ROWS = {"sst2": 67_349, "rte": 2_490, "medmcqa": 182_822, "squad2": 130_319, "gsm8k": 7_473}
"""Of the whole training sets."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """One data set."""

    rows: int
    tokens: list[int]
    """Of each example."""
    supervised: list[int]
    """Of them, at each example's end."""


def read_lengths(name: str) -> Lengths:
    """From the committed file."""
    return Lengths(**json.loads(FILE.read_text())[name])


def training_rows(name: str, root: Path) -> Rows:
    if name == "medmcqa":
        return medmcqa_rows(read_file(root / "medmcqa" / "validation.jsonl"))
    return find_task(name).splits(root, 0).train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, for its tokenizer only")
    parser.add_argument("--data", required=True, type=Path, help="the folder with all tasks' files")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    found = {}
    for name, rows in ROWS.items():
        config = RunConfig(model=options.model, data=name, train_max=DRAWN)
        source = SourceRows(train=training_rows(name, options.data), validation=None, train_where=name,
                            validation_where=None)  # fmt: skip
        read = split_rows(source, config)
        examples = encode_all(read.train, make_encoder(config, tokenizer, "causal", read)).examples
        for e in examples:
            n = int(e.supervised.sum())
            assert e.supervised[len(e) - n :].all(), "targets are not at the end"
        of_name = Lengths(rows=rows, tokens=[len(e) for e in examples],
                          supervised=[int(e.supervised.sum()) for e in examples])  # fmt: skip
        found[name] = asdict(of_name)
        print(f"{name}: {np.mean(of_name.tokens):.0f} tokens, {np.mean(of_name.supervised):.1f} supervised")
    FILE.write_text("{\n" + ",\n".join(f'"{n}": {json.dumps(x)}' for n, x in found.items()) + "\n}\n")


if __name__ == "__main__":
    main()
