"""Would an adapter's product pay inside the base's? Three ways, each at its best, for every layer of a block.

    python -m benchmarks.inside --shape 7b --tokens 3200 --ranks 8,16,64 --out benchmarks/results/inside-h200.json

    apart   y = h Bᵀ, then y += x Wᵀ in the base's product (β = 1): what the bank does
    inside  [x h] [W B]ᵀ, one product over D_in + R columns: x, h, W and B already lie where it wants them, which in a
            training they would have to be put into first. So what it wins here is the most that it could.
    alone   x Wᵀ: no adapter, the floor of both

There (h = x Aᵀ is the same in all and left out) and back (gx = gh A + g W). Each runs on for a while, in turns, and
its mean is taken: a burst is faster than a training, whose card is at the end of its power.

Shapes: T tokens, D_in / D_out the layer's widths, R rank.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.shapes import SHAPES, command, milliseconds, versions

WAYS = ("alone", "apart", "inside")
ROUNDS = 3


def layers_of(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(D_in, D_out) of a block's layers."""
    D, wide = config.hidden_size, config.intermediate_size
    head = D // config.num_attention_heads
    keys = head * config.num_key_value_heads
    square, narrow, up = (D, D), (D, keys), (D, wide)
    return {"q": square, "k": narrow, "v": narrow, "o": square, "gate": up, "up": up, "down": (wide, D)}


def ways(
    D_in: int, D_out: int, T: int, R: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """A product D_in → D_out and what joins it from R columns."""
    x_cat, W_cat = (torch.randn(rows, D_in + R, device=device, dtype=dtype) for rows in (T, D_out))
    # Rows of their own: a view into the wide ones would be slower to read.
    x, W, h, B = (t.contiguous() for t in (x_cat[:, :D_in], W_cat[:, :D_in], x_cat[:, D_in:], W_cat[:, D_in:]))
    y = torch.empty(T, D_out, device=device, dtype=dtype)

    def apart() -> Tensor:
        torch.mm(h, B.T, out=y)
        return y.addmm_(x, W.T)

    return {
        "alone": lambda: torch.mm(x, W.T, out=y),
        "apart": apart,
        "inside": lambda: torch.mm(x_cat, W_cat.T, out=y),
    }


def mean_ms(run: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Of one call, of as many as fill this time."""
    one = statistics.median(milliseconds(lambda _: run(), range(10), device))
    times = range(max(10, round(1e3 * seconds / one)))
    return statistics.mean(milliseconds(lambda _: run(), times, device))


def measured(
    shape: str, T: int, R: int, seconds: float, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Milliseconds of all layers of the model, there and back."""
    config, total = LlamaConfig(**SHAPES[shape]), dict.fromkeys(WAYS, 0.0)
    once = dict[tuple[int, int], dict[str, float]]()
    for D_in, D_out in layers_of(config).values():
        # Back is the same product with the widths exchanged.
        for widths in ((D_in, D_out), (D_out, D_in)):
            if widths not in once:
                each = ways(*widths, T, R, device, dtype)
                rounds = [[mean_ms(each[way], seconds, device) for way in WAYS] for _ in range(ROUNDS)]
                once[widths] = dict(zip(WAYS, map(statistics.median, zip(*rounds, strict=True)), strict=True))
            for way in WAYS:
                total[way] += config.num_hidden_layers * once[widths][way]
    return {way: round(ms, 3) for way, ms in total.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--tokens", type=int, default=3200, help="of a pass")
    parser.add_argument("--ranks", default="8,16,64")
    parser.add_argument("--seconds", type=float, default=0.3, help="that each product is repeated for, three times")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = torch.device(given.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ms = {}
    for R in (int(r) for r in given.ranks.split(",")):
        ms[str(R)] = measured(given.shape, given.tokens, R, given.seconds, device, dtype)
        print(f"rank {R}: {ms[str(R)]}", flush=True)
    said = {"command": command("benchmarks.inside", given.out), "versions": versions(device)}
    given.out.write_text(json.dumps({**said, "ms": ms}, indent=1) + "\n")


if __name__ == "__main__":
    main()
