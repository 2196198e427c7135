"""The trainable state of K LoRA candidates.

Shapes: K candidates, R padded rank of a layer (a multiple of 8), D_in / D_out its widths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rankrace.bank.spectrum import Spectrum, alike, spectra, truncated
from rankrace.bank.threads import one_thread


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The trainable state of K candidates: all that tells one from another."""

    ranks: tuple[int, ...]
    multipliers: tuple[float, ...]
    """s of ΔW = s·B A."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """Layer name → A [K, R, D_in], B [K, D_out, R]; zero beyond each candidate's rank."""
    heads: dict[str, tuple[Tensor, ...]]
    """Head name → its parameters, each [K, …]."""
    layer_ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layer name → the K ranks there, for layers where they are not `ranks`; 0 is no update. `ranks` then says what
    the parameters would buy if every layer got the same."""

    def ranks_in(self, layer: str) -> tuple[int, ...]:
        """Of all candidates in one layer."""
        return self.layer_ranks.get(layer, self.ranks)

    def ranks_of(self, k: int) -> dict[str, int]:
        """Of candidate k in all layers."""
        return {name: self.ranks_in(name)[k] for name in self.factors}

    def factors_of(self, k: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer name → candidate k's A [r, D_in] and B [D_out, r], without their padding."""
        return {n: (self.factors[n][0][k, :r], self.factors[n][1][k, :, :r]) for n, r in self.ranks_of(k).items()}

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name: every layer.A, then every layer.B, then the heads' head.0, head.1, …"""
        A = {f"{n}.A": pair[0] for n, pair in self.factors.items()}
        B = {f"{n}.B": pair[1] for n, pair in self.factors.items()}
        return A | B | {f"{n}.{i}": t for n, ts in self.heads.items() for i, t in enumerate(ts)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Candidates":
        """The same candidates with other tensors, named as by `tensors`."""
        return replace(
            self,
            factors={n: (tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in self.factors},
            heads={n: tuple(tensors[f"{n}.{i}"] for i in range(len(ts))) for n, ts in self.heads.items()},
        )

    def keep(self, indices: Sequence[int]) -> "Candidates":
        """Only these candidates, in this order, copied; R shrinks to what they need."""
        ranks, index = tuple(self.ranks[i] for i in indices), list(indices)
        layer_ranks = {n: tuple(self.ranks_in(n)[i] for i in indices) for n in self.factors}
        factors = {}
        for name, (A, B) in self.factors.items():
            R = padded(max(layer_ranks[name]))
            factors[name] = (A[index, :R].clone(), B[index, :, :R].clone())
        return Candidates(
            ranks=ranks,
            multipliers=tuple(self.multipliers[i] for i in indices),
            factors=factors,
            heads={n: tuple(p[index].clone() for p in ps) for n, ps in self.heads.items()},
            layer_ranks={n: rs for n, rs in layer_ranks.items() if rs != ranks},
        )

    def spectra(self, k: int) -> dict[str, Spectrum]:
        """The singular values and vectors of candidate k's update in each layer."""
        return spectra(self.factors_of(k), self.multipliers[k])

    def truncations(
        self,
        k: int,
        ranks: Sequence[int],
        multipliers: Sequence[float],
        whole: Mapping[str, Spectrum] | None = None,
        allocations: Sequence[Mapping[str, int] | None] | None = None,
    ) -> "Candidates":
        """Candidate k's update at several lower ranks: the best rank-r approximation of each layer's ΔW.

        Args:
            whole: its `spectra`, where they are known already.
            allocations: for each cut what every layer keeps (see `allocate`), or None: its rank everywhere.
        """
        K, ranks = len(ranks), tuple(ranks)
        whole = whole or self.spectra(k)
        cuts = list(zip(ranks, allocations or [None] * K, strict=True))
        kept = {n: tuple(r if a is None else a[n] for r, a in cuts) for n in self.factors}
        factors = {}
        with one_thread():
            for names in alike({n: (kept[n], whole[n].A_RD, whole[n].B_DR) for n in self.factors}):
                A, B = self.factors[names[0]]
                mine = kept[names[0]]
                A_LrD, B_LDr = truncated([whole[n] for n in names], max(mine))
                A_LKRD = A.new_zeros(len(names), K, padded(max(mine)), A.shape[2])
                B_LKDR = B.new_zeros(len(names), K, B.shape[1], padded(max(mine)))
                # A cut is the beginning of a wider one.
                for j, (r, s) in enumerate(zip(mine, multipliers, strict=True)):
                    torch.mul(A_LrD[:, :r], s**-0.5, out=A_LKRD[:, j, :r])
                    torch.mul(B_LDr[:, :, :r], s**-0.5, out=B_LKDR[:, j, :, :r])
                factors |= dict(zip(names, zip(A_LKRD, B_LKDR, strict=True), strict=True))
        factors = {name: factors[name] for name in self.factors}
        layer_ranks = {name: mine for name, mine in kept.items() if mine != ranks}
        heads = {n: tuple(p[[k] * K].clone() for p in ps) for n, ps in self.heads.items()}
        return Candidates(
            ranks=ranks, multipliers=tuple(multipliers), factors=factors, heads=heads, layer_ranks=layer_ranks
        )


def padded(rank: int) -> int:
    """The next multiple of 8: grouped and tensor-core products want 16-byte strides in bfloat16.

    At least 8, for products with no row at all are a case of their own in too many kernels.
    """
    return max(8, -(-rank // 8) * 8)
