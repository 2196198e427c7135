"""The optimiser's moments through a cut of the rank.

A cut writes s·B A = U S Vᵀ in the basis of its singular vectors: A' = T_A A and B' = B T_B with T_A = q Uᵀ B and
T_B = A V q, where q = s/√(S s'). With G the gradient of ΔW, ∂L/∂A = s Bᵀ G, so

    ∂L/∂A' = s' B'ᵀ G = (s'/s) T_Bᵀ ∂L/∂A    and    ∂L/∂B' = s' G A'ᵀ = (s'/s) ∂L/∂B T_Aᵀ.

Adam's mean is a sum of gradients and turns with them; its square turns with the squared entries of the map, as if the
gradients of different rows were uncorrelated. So nothing has to warm up again (docs/selection.md).

Shapes: K candidates, R and r a layer's ranks before and after, D its width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from rankrace.bank.candidates import Candidates
from rankrace.bank.spectrum import Spectrum

Moments = dict[str, Tensor]
"""Name, as in `Candidates.tensors`, → [K, …]."""


@torch.no_grad()
def carried(
    before: Candidates, k: int, whole: Mapping[str, Spectrum], after: Candidates, mean: Moments, square: Moments
) -> tuple[Moments, Moments]:
    """Adam's mean and square of candidate k for the candidates that were cut from it.

    Args:
        whole: `before.spectra(k)`.
        after: `before.truncations(k, …)`.
        mean, square: of `before`.
    """
    new_mean = {name: torch.zeros_like(t) for name, t in after.tensors().items()}
    new_square = {name: torch.zeros_like(t) for name, t in after.tensors().items()}
    s = before.multipliers[k]
    for layer, (A_KRD, B_KDR) in before.factors.items():
        R = before.ranks_in(layer)[k]
        spectrum, S_R = whole[layer], whole[layer].S_R
        UB_RR = spectrum.U(len(S_R)).T @ B_KDR[k, :, :R].double()
        AV_RR = A_KRD[k, :R].double() @ spectrum.V(len(S_R))
        for j, (r, new_s) in enumerate(zip(after.ranks_in(layer), after.multipliers, strict=True)):
            # A direction without weight keeps nothing.
            q_r = torch.where(S_R[:r] > 0, s / (S_R[:r] * new_s).sqrt(), 0.0)
            to_A_rR, to_B_Rr = new_s / s * (AV_RR[:, :r] * q_r).T, new_s / s * (q_r[:, None] * UB_RR[:r]).T
            for old, new, left, right in (
                (mean, new_mean, to_A_rR, to_B_Rr),
                (square, new_square, to_A_rR.square(), to_B_Rr.square()),
            ):
                new[f"{layer}.A"][j, :r] = (left @ old[f"{layer}.A"][k, :R].double()).to(A_KRD.dtype)
                new[f"{layer}.B"][j, :, :r] = (old[f"{layer}.B"][k, :, :R].double() @ right).to(A_KRD.dtype)
    for head, parameters in after.heads.items():
        for i in range(len(parameters)):
            name = f"{head}.{i}"
            new_mean[name][:], new_square[name][:] = mean[name][k], square[name][k]
    return new_mean, new_square
