"""The singular values of a LoRA update, without ever forming the update.

ΔW = s·B A with B [D_out, R], A [R, D_in]. An orthonormal basis of A's rows, Aᵀ = Q C, leaves the narrow matrix
ΔW Q = s·B Cᵀ [D_out, R], whose singular values are those of ΔW; and these come from its R×R Gram matrix:
(ΔW Q)ᵀ ΔW Q = W S² Wᵀ, V = Q W, U S = ΔW Q W. Cost O((D_in + D_out) R²) instead of O(D_in D_out min(D_in, D_out)).

The basis comes from a Gram matrix too: products and two decompositions of R×R a layer, where QR and SVD would take
long columns through the host one by one. Squaring costs half of float64's digits: a direction of A that is below
1e-7 of A's largest is taken for zero, whatever B makes of it, and so is a singular value below 1e-7 of the largest;
the factors themselves are float32. U S V' = ΔW Q W W' Q' holds to all digits.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankrace.bank.threads import in_threads, one_thread
from rankrace.errors import RankraceError

LEAST = 1e-7
"""Of the largest singular value: what float64 can still tell from zero after squaring."""
TOGETHER = 8
"""Layers that one thread decomposes at a time."""
BATCH_BYTES = 2**25
"""Of factors in float64, of layers of one shape that are multiplied at once: a small model has hundreds of layers,
whose products take longer to launch one by one than to compute."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """ΔW = U diag(S) Vᵀ, singular values in descending order.

    The singular vectors are the factors times R×R matrices, and made when they are asked for: in float64 those of all
    layers take twice the memory of the factors. So it holds until its factors train on.
    """

    A_RD: Tensor
    B_DR: Tensor
    """The factors themselves, not copies."""
    S_R: Tensor
    """[R]"""
    to_U_RR: Tensor
    to_V_RR: Tensor
    """U = B to_U and V = Aᵀ to_V."""

    def U(self, rank: int) -> Tensor:
        """[D_out, rank], columns of norm 1 (zero where S is), orthogonal but for those whose S is near `LEAST`."""
        return self.B_DR.double() @ self.to_U_RR[:, :rank]

    def V(self, rank: int) -> Tensor:
        """[D_in, rank], orthonormal columns (some may be zero where S is)."""
        return self.A_RD.T.double() @ self.to_V_RR[:, :rank]

    def truncated(self, rank: int, multiplier: float) -> tuple[Tensor, Tensor]:
        """The best rank-r approximation of ΔW (Eckart-Young) as LoRA factors.

        Returns A [r, D_in] and B [D_out, r] with `multiplier`·B A = U_r S_r V_rᵀ. √S goes into both, so that
        neither factor's gradient is scaled apart from the other's. Rank 0 is no update.
        """
        A_1rD, B_1Dr = truncated([self], rank)
        return A_1rD[0] * multiplier**-0.5, B_1Dr[0] * multiplier**-0.5


def truncated(layers: Sequence[Spectrum], rank: int) -> tuple[Tensor, Tensor]:
    """The same of L layers of one shape at a multiplier of 1: A [L, r, D_in] and B [L, D_out, r] in float64."""
    assert 0 <= rank <= layers[0].S_R.numel(), f"rank {rank} of a spectrum of {layers[0].S_R.numel()}"
    root_Lr = torch.stack([one.S_R[:rank] for one in layers]).sqrt()
    to_V_LRr = torch.stack([one.to_V_RR[:, :rank] for one in layers]) * root_Lr[:, None]
    A_LrD = to_V_LRr.mT @ torch.stack([one.A_RD for one in layers]).double()
    to_U_LRr = torch.stack([one.to_U_RR[:, :rank] for one in layers]) * root_Lr[:, None]
    return A_LrD, torch.stack([one.B_DR for one in layers]).double() @ to_U_LRr


def alike(layers: Mapping[str, tuple[Hashable, Tensor, Tensor]]) -> Iterator[list[str]]:
    """Names of layers whose two tensors have the same shapes, and that are equal in what stands before these: as many
    together as BATCH_BYTES hold."""
    found: dict[tuple[Hashable, torch.Size, torch.Size], list[str]] = {}
    for name, (same, A, B) in layers.items():
        found.setdefault((same, A.shape, B.shape), []).append(name)
    for (_, A_shape, B_shape), names in found.items():
        most = max(1, BATCH_BYTES // max(1, 8 * (A_shape.numel() + B_shape.numel())))
        yield from (names[i : i + most] for i in range(0, len(names), most))


def spectrum(A_RD: Tensor, B_DR: Tensor, multiplier: float) -> Spectrum:
    """The SVD of `multiplier`·B A, computed in float64. Zero rows of A and columns of B are allowed."""
    return spectra({"": (A_RD, B_DR)}, multiplier)[""]


def spectra(factors: Mapping[str, tuple[Tensor, Tensor]], multiplier: float) -> dict[str, Spectrum]:
    """The same for many layers, A [R, D_in] and B [D_out, R] each."""
    grams, by_rank = {}, dict[int, list[str]]()
    with one_thread():
        for names in alike({n: (None, A, B) for n, (A, B) in factors.items()}):
            A_LRD, B_LDR = (torch.stack([factors[n][i] for n in names]).double() for i in range(2))
            both = zip(A_LRD @ A_LRD.mT, multiplier**2 * (B_LDR.mT @ B_LDR), strict=True)
            grams |= dict(zip(names, both, strict=True))
    for name, (A, _) in factors.items():
        by_rank.setdefault(len(A), []).append(name)
    found = {}
    for names in by_rank.values():
        device = factors[names[0]][0].device
        # On a GPU decompositions so small are slower than on the host.
        A_grams_NRR, B_grams_NRR = (torch.stack([grams[n][i] for n in names]).cpu() for i in range(2))
        if not (A_grams_NRR.isfinite().all() and B_grams_NRR.isfinite().all()):
            raise RankraceError(
                "the singular values of an adapter cannot be told: it is not finite, or its square is not",
                why="a candidate that has diverged has no best approximation",
                fix="lower --lr",
            )
        parts = in_threads(decomposed, zip(A_grams_NRR.split(TOGETHER), B_grams_NRR.split(TOGETHER), strict=True))
        S_NR, to_U_NRR, to_V_NRR = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
        to_U_NRR *= multiplier
        for i, name in enumerate(names):
            A_RD, B_DR = factors[name]
            found[name] = Spectrum(A_RD=A_RD, B_DR=B_DR, S_R=S_NR[i], to_U_RR=to_U_NRR[i], to_V_RR=to_V_NRR[i])
    return {name: found[name] for name in factors}


def decomposed(grams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """From A Aᵀ and s² BᵀB [N, R, R]: S [N, R], to_U / s and to_V [N, R, R] of `Spectrum`."""
    A_gram_NRR, B_gram_NRR = grams
    D_NR, W_NRR = torch.linalg.eigh(A_gram_NRR)
    size_NR, inverse_NR = roots(D_NR)
    to_Q_NRR, C_NRR = W_NRR * inverse_NR[:, None], size_NR[:, :, None] * W_NRR.mT
    D_NR, W_NRR = torch.linalg.eigh(C_NRR @ B_gram_NRR @ C_NRR.mT)
    S_NR, inverse_NR = roots(D_NR)
    to_U_NRR, to_V_NRR = C_NRR.mT @ W_NRR * inverse_NR[:, None], to_Q_NRR @ W_NRR
    return S_NR.flip(-1), to_U_NRR.flip(-1), to_V_NRR.flip(-1)


def roots(D_NR: Tensor) -> tuple[Tensor, Tensor]:
    """√D and 1/√D of eigenvalues in ascending order, both zero for what cannot be told from zero."""
    root_NR = D_NR.clamp(min=0).sqrt()
    root_NR = torch.where(root_NR > LEAST * root_NR[:, -1:], root_NR, 0.0)
    return root_NR, torch.where(root_NR > 0, 1 / root_NR, 0.0)
