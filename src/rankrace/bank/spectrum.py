"""The singular values of a LoRA update, without ever forming the update.

ΔW = s·B A with B [D_out, R], A [R, D_in]. An orthonormal basis of either factor's columns leaves an R×R core:
B = Q_B C_B, Aᵀ = Q_A C_A, so ΔW = Q_B (s·C_B C_Aᵀ) Q_Aᵀ, and the SVD of the core is that of ΔW.
Cost O((D_in + D_out) R²) instead of O(D_in D_out min(D_in, D_out)).

The bases come from the R×R Gram matrices: one large product for many layers, where a QR goes layer by layer. Squaring
costs half of float64's digits: what is below 1e-7 of a factor's largest singular value is taken for zero, and the
factors themselves are float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankrace.bank.threads import one_thread

LEAST = 1e-7
"""Of a factor's largest singular value: what float64 can still tell from zero after squaring."""
TOGETHER = 16
"""Layers at a time: as many copies of factors in float64."""


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
        """[D_out, rank], orthonormal columns (zero where S is)."""
        return self.B_DR.double() @ self.to_U_RR[:, :rank]

    def V(self, rank: int) -> Tensor:
        """[D_in, rank], orthonormal columns (zero where S is)."""
        return self.A_RD.T.double() @ self.to_V_RR[:, :rank]

    def truncated(self, rank: int, multiplier: float) -> tuple[Tensor, Tensor]:
        """The best rank-r approximation of ΔW (Eckart-Young) as LoRA factors.

        Returns A [r, D_in] and B [D_out, r] with `multiplier`·B A = U_r S_r V_rᵀ. √S goes into both, so that
        neither factor's gradient is scaled apart from the other's. Rank 0 is no update.
        """
        assert 0 <= rank <= self.S_R.numel(), f"rank {rank} of a spectrum of {self.S_R.numel()}"
        root_r = (self.S_R[:rank] / multiplier).sqrt()
        return (self.V(rank) * root_r).T.contiguous(), self.U(rank) * root_r


def spectrum(A_RD: Tensor, B_DR: Tensor, multiplier: float) -> Spectrum:
    """The SVD of `multiplier`·B A, computed in float64. Zero rows of A and columns of B are allowed."""
    return spectra({"": (A_RD, B_DR)}, multiplier)[""]


def spectra(factors: Mapping[str, tuple[Tensor, Tensor]], multiplier: float) -> dict[str, Spectrum]:
    """The same for many layers, A [R, D_in] and B [D_out, R] each; layers of one shape are taken together."""
    by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (A, B) in factors.items():
        by_shape.setdefault((A.shape, B.shape), []).append(name)
    found = {}
    for names in (alike[i : i + TOGETHER] for alike in by_shape.values() for i in range(0, len(alike), TOGETHER)):
        B_NDR = torch.stack([factors[n][1] for n in names]).double()
        A_NDR = torch.stack([factors[n][0].T for n in names]).double()
        # On a GPU decompositions so small are slower than on the host.
        grams = [(X.mT @ X).cpu() for X in (B_NDR, A_NDR)]
        with one_thread():
            (to_B, C_B), (to_A, C_A) = (basis(gram_NRR) for gram_NRR in grams)
            U_NRR, S_NR, Vh_NRR = torch.linalg.svd(multiplier * C_B @ C_A.mT)
            on_host = S_NR, to_B @ U_NRR, to_A @ Vh_NRR.mT
        S_NR, to_U_NRR, to_V_NRR = (x.to(B_NDR.device) for x in on_host)
        for i, name in enumerate(names):
            A_RD, B_DR = factors[name]
            found[name] = Spectrum(A_RD=A_RD, B_DR=B_DR, S_R=S_NR[i], to_U_RR=to_U_NRR[i], to_V_RR=to_V_NRR[i])
    return {name: found[name] for name in factors}


def basis(gram_NRR: Tensor) -> tuple[Tensor, Tensor]:
    """From XᵀX the matrices M and C, [N, R, R], with X = Q C and Q = X M, whose columns are orthonormal or zero."""
    D_NR, V_NRR = torch.linalg.eigh(gram_NRR)
    size_NR = D_NR.clamp(min=0).sqrt()
    size_NR = torch.where(size_NR > LEAST * size_NR[:, -1:], size_NR, 0.0)
    inverse_NR = torch.where(size_NR > 0, 1 / size_NR, 0.0)
    return V_NRR * inverse_NR[:, None], size_NR[:, :, None] * V_NRR.mT
