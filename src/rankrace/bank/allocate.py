"""Which layers get how much of the rank, at the same number of parameters.

A singular value S_{l,i} of layer l's update changes the layer's output by w_l·S_{l,i}² in the mean square, and costs
c_l = D_in + D_out parameters. To keep the most of Σ w_l·S_{l,i}² within a budget is a knapsack. Each layer's values
descend, so that the best ones of all layers together are always the first ones of each.
"""

from collections.abc import Mapping

from rankrace.bank.spectrum import Spectrum


def allocate(
    spectra: Mapping[str, Spectrum],
    costs: Mapping[str, int],
    budget: int,
    weights: Mapping[str, float] | None = None,
    largest: int | None = None,
) -> dict[str, int]:
    """The rank of each layer: the singular values of most w_l·S²/c_l within the budget.

    What is left when the next value no longer fits goes, in the same order, to those of cheaper layers that still do.
    So the kept sum falls short of the best possible one by less than the first value that did not fit, and by nothing
    where all layers cost the same. Never more than the budget is spent; less where no layer has anything to add.

    Args:
        spectra: layer → its update's singular values, all finite; no layer gets more than it has non-zero ones.
        costs: layer → parameters of one rank (`Bank.costs`).
        budget: parameters; that of rank r in every layer is r·Σ costs.
        weights: layer → mean square of its input (`Bank.input_sizes`); None: all the same.
        largest: no layer gets more than this.

    Returns:
        Layer → rank, for every layer; 0 where its first value is not worth its cost.
    """
    ranks = dict.fromkeys(spectra, 0)
    worth = []
    for place, (name, found) in enumerate(spectra.items()):
        weight = 1.0 if weights is None else weights[name]
        for i, S in enumerate(found.S_R[:largest].tolist()):
            if S > 0 and weight > 0:
                # Equal ones go round all layers before any gets a second.
                worth.append((-weight * S**2 / costs[name], i, place, name))
    left = budget
    for _, _, _, name in sorted(worth):
        if costs[name] <= left:
            left -= costs[name]
            ranks[name] += 1
    return ranks
