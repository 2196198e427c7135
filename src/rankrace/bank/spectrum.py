"""The singular values of a LoRA update, without ever forming the update.

ΔW = s·B A with B [D_out, R], A [R, D_in]. QR of both factors leaves an R×R core:
B = Q_B R_B, Aᵀ = Q_A R_A, so ΔW = Q_B (s·R_B R_Aᵀ) Q_Aᵀ, and the SVD of the core is that of ΔW.
Cost O((D_in + D_out) R²) instead of O(D_in D_out min(D_in, D_out)).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """ΔW = U diag(S) Vᵀ, singular values in descending order."""

    U_DR: Tensor
    """[D_out, R], orthonormal columns."""
    S_R: Tensor
    """[R]"""
    V_DR: Tensor
    """[D_in, R], orthonormal columns."""

    def truncated(self, rank: int, multiplier: float) -> tuple[Tensor, Tensor]:
        """The best rank-r approximation of ΔW (Eckart-Young) as LoRA factors.

        Returns A [r, D_in] and B [D_out, r] with `multiplier`·B A = U_r S_r V_rᵀ. √S goes into both, so that
        neither factor's gradient is scaled apart from the other's. Rank 0 is no update.
        """
        assert 0 <= rank <= self.S_R.numel(), f"rank {rank} of a spectrum of {self.S_R.numel()}"
        root_r = (self.S_R[:rank] / multiplier).sqrt()
        return (self.V_DR[:, :rank] * root_r).T.contiguous(), self.U_DR[:, :rank] * root_r


def spectrum(A_RD: Tensor, B_DR: Tensor, multiplier: float) -> Spectrum:
    """The SVD of `multiplier`·B A, computed in float64. Zero rows of A and columns of B are allowed."""
    return spectra({"": (A_RD, B_DR)}, multiplier)[""]


def spectra(factors: Mapping[str, tuple[Tensor, Tensor]], multiplier: float) -> dict[str, Spectrum]:
    """The same for many layers, A [R, D_in] and B [D_out, R] each; layers of one shape are taken together."""
    by_shape: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name, (A, B) in factors.items():
        by_shape.setdefault((A.shape, B.shape), []).append(name)
    found = {}
    for names in by_shape.values():
        Q_B, R_B = torch.linalg.qr(torch.stack([factors[n][1] for n in names]).double())
        Q_A, R_A = torch.linalg.qr(torch.stack([factors[n][0].T for n in names]).double())
        core_NRR = multiplier * R_B @ R_A.mT
        # On a GPU so small an SVD is slower than on the host.
        U, S, Vh = (t.to(core_NRR.device) for t in torch.linalg.svd(core_NRR.cpu()))
        U_NDR, V_NDR = Q_B @ U, Q_A @ Vh.mT
        for i, name in enumerate(names):
            found[name] = Spectrum(U_DR=U_NDR[i], S_R=S[i], V_DR=V_NDR[i])
    return {name: found[name] for name in factors}
