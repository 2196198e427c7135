"""Many tensors in one piece of memory, so that an optimiser step is a dozen kernels and not thousands.

Shapes: K candidates (outermost everywhere), P trainable values of one candidate, padding included.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Flat:
    """Named tensors [K, …] as views into one [K, P]."""

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], K: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Zeros. `shapes` leave out the K."""
        sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self.all_KP = torch.zeros(K, sum(sizes.values()), dtype=dtype, device=device)
        self.views: dict[str, Tensor] = {}
        end = 0
        for name, size in sizes.items():
            begin, end = end, end + size
            self.views[name] = self.all_KP[:, begin:end].unflatten(1, tuple(shapes[name]))

    def joined(self, names: Sequence[str]) -> Tensor:
        """Neighbours of shapes [K, R, D] as one [K, ΣR, D], without a copy."""
        views = [self.views[name] for name in names]
        for one, next_ in pairwise(views):
            assert next_.storage_offset() == one.storage_offset() + one[0].numel(), f"{names} do not lie side by side"
        K, _, D = views[0].shape
        return views[0].as_strided((K, sum(v.shape[1] for v in views), D), views[0].stride())

    @staticmethod
    def like(tensors: Mapping[str, Tensor]) -> "Flat":
        """Zeros of the shapes of these tensors [K, …]."""
        first = next(iter(tensors.values()))
        shapes = {name: t.shape[1:] for name, t in tensors.items()}
        return Flat(shapes, first.shape[0], dtype=first.dtype, device=first.device)

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Flat":
        """A copy of these tensors [K, …]."""
        flat = Flat.like(tensors)
        for name, t in tensors.items():
            flat.views[name].copy_(t)
        return flat

    def kept(self, indices: Sequence[int], like: "Flat") -> "Flat":
        """These candidates only, cut to the shapes of `like` (a smaller padded rank)."""
        new = Flat.like(like.views)
        for name, view in new.views.items():
            cut = tuple(slice(0, n) for n in view.shape[1:])
            view.copy_(self.views[name][list(indices)][(slice(None), *cut)])
        return new
