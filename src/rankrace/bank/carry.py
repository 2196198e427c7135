"""The optimiser's moments through a cut of the rank.

A cut writes s·B A = U S Vᵀ in the basis of its singular vectors: A' = T_A A and B' = B T_B with T_A = q Uᵀ B and
T_B = A V q, where q = s/√(S s'). With G the gradient of ΔW, ∂L/∂A = s Bᵀ G, so

    ∂L/∂A' = s' B'ᵀ G = (s'/s) T_Bᵀ ∂L/∂A    and    ∂L/∂B' = s' G A'ᵀ = (s'/s) ∂L/∂B T_Aᵀ.

Adam's mean is a sum of gradients and turns with them; its square turns with the squared entries of the map, as if the
gradients of different rows were uncorrelated. So nothing has to warm up again (docs/selection.md).

Shapes: K candidates, L layers of one shape, R and r a layer's ranks before and after, D its width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankrace.bank.candidates import Candidates
from rankrace.bank.spectrum import Spectrum, alike
from rankrace.bank.threads import one_thread

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
    new_mean, new_square = Moments(), Moments()
    s, factors = before.multipliers[k], before.tensors()
    ranks = {n: (before.ranks_in(n)[k], after.ranks_in(n)) for n in before.factors}
    with one_thread():
        for names in alike({n: (ranks[n], *pair) for n, pair in before.factors.items()}):
            R, cuts = ranks[names[0]]
            A_LRD, B_LDR = stacked(factors, names, k, R)
            spectra = [whole[n] for n in names]
            S_LR = torch.stack([one.S_R for one in spectra])
            UB_LRR = torch.stack([one.to_U_RR for one in spectra]).mT @ (B_LDR.mT @ B_LDR)
            AV_LRR = (A_LRD @ A_LRD.mT) @ torch.stack([one.to_V_RR for one in spectra])
            olds = [stacked(moment, names, k, R) for moment in (mean, square)]
            news = [[x.new_zeros(len(names), *x.shape) for x in after.factors[names[0]]] for _ in olds]
            for j, (r, new_s) in enumerate(zip(cuts, after.multipliers, strict=True)):
                # A direction without weight keeps nothing.
                q_Lr = torch.where(S_LR[:, :r] > 0, s / (S_LR[:, :r] * new_s).sqrt(), 0.0)
                to_A_LrR = new_s / s * (AV_LRR[:, :, :r] * q_Lr[:, None]).mT
                to_B_LRr = new_s / s * (q_Lr[:, :, None] * UB_LRR[:, :r]).mT
                for power, (old_A, old_B), (new_A, new_B) in zip((1, 2), olds, news, strict=True):
                    new_A[:, j, :r] = to_A_LrR**power @ old_A
                    new_B[:, j, :, :r] = old_B @ to_B_LRr**power
            for new, (A_LKRD, B_LKDR) in zip((new_mean, new_square), news, strict=True):
                new |= {f"{n}.A": A_KRD for n, A_KRD in zip(names, A_LKRD, strict=True)}
                new |= {f"{n}.B": B_KDR for n, B_KDR in zip(names, B_LKDR, strict=True)}
    for head, parameters in after.heads.items():
        for name in (f"{head}.{i}" for i in range(len(parameters))):
            for new, old in ((new_mean, mean), (new_square, square)):
                new[name] = old[name][[k] * len(after.ranks)]
    return new_mean, new_square


def stacked(tensors: Mapping[str, Tensor], names: Sequence[str], k: int, R: int) -> tuple[Tensor, Tensor]:
    """Of candidate k in these layers, in float64: [L, R, D_in] and [L, D_out, R]."""
    A_LRD = torch.stack([tensors[f"{n}.A"][k, :R] for n in names])
    return A_LRD.double(), torch.stack([tensors[f"{n}.B"][k, :, :R] for n in names]).double()
