"""The bank: K LoRA candidates on every target layer of one frozen model.

Shapes: K candidates, P all parameters of one, R padded rank of a layer (a multiple of 8), D_in / D_out its widths.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from rankrace.bank.base import is_4bit
from rankrace.bank.candidates import Candidates, padded
from rankrace.bank.dropout import DropoutKeys, counter_seed
from rankrace.bank.flat import Flat
from rankrace.bank.head import BankHead
from rankrace.bank.inputs import input_sizes
from rankrace.bank.linear import BankLinear, BankSwitch, Siblings
from rankrace.bank.loaded import Lent, Loaded
from rankrace.bank.siblings import find_siblings
from rankrace.bank.targets import HEAD_NAMES, find_targets
from rankrace.bank.threads import one_thread
from rankrace.errors import RankraceError


class Bank:
    """Puts K candidates on a model's target layers; the model's own weights are frozen.

    Args:
        model: the base; its target layers are replaced by `BankLinear`, its classifier by `BankHead`.
        target_modules: "all-linear", or endings of layer names.
        seed: fixes the initial factors and the dropout masks.
        dropout: on the adapters' inputs, in training steps only.

    Raises:
        RankraceError: no layer has such a name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        seed: int = 0,
        dropout: float = 0.0,
    ) -> None:
        self.model = model
        self.seed = seed
        self.dropout = dropout
        model.requires_grad_(False)
        targets = find_targets(model, target_modules)
        self.switch = BankSwitch(keys=DropoutKeys(seed, len(targets), model.device))
        self.heads = {
            name: BankHead(module, self.switch)
            for name, module in model.named_children()
            if name in HEAD_NAMES and any(True for _ in module.parameters())
        }
        self.layers = {n: BankLinear(m, i, self.switch) for i, (n, m) in enumerate(targets.items())}
        for name, replacement in {**self.layers, **self.heads}.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
        self.siblings = {(name,): layer.siblings for name, layer in self.layers.items()}
        self._loaded: Loaded | None = None
        self._lent: Lent | None = None

    def find_siblings(self, run: Callable[[], Any]) -> None:
        """From now on layers that `run`, a pass of the base, calls with one tensor are computed together."""
        with self.off(), torch.no_grad():
            groups, places = find_siblings(self.layers, run)
        self.siblings = {}
        for names in groups:
            layers = [self.layers[n] for n in names]
            order = sorted(range(len(names)), key=lambda i: places[names[i]])
            siblings = Siblings(layers, self.switch, order)
            for layer in layers:
                layer.siblings = siblings
            self.siblings[names] = siblings
        if self._loaded is not None:
            self.install(self._loaded)

    def detach(self) -> None:
        """Puts the model's own modules back."""
        originals = {n: layer.base for n, layer in self.layers.items()}
        originals |= {n: head.original for n, head in self.heads.items()}
        for name, module in originals.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module)

    # --- which candidates there are

    def start(self, ranks: Sequence[int], multipliers: Sequence[float], draws: Sequence[int] | None = None) -> None:
        """Fresh candidates: A ~ U(±1/√D_in) as in PEFT, B = 0.

        Nested: a candidate of rank r gets the first r rows of what any larger one gets, alone or in company.

        Args:
            draws: which draw of A each gets, 0 by default; two draws of one rank show how much is chance.
        """
        self.check_ranks(ranks)
        K, R = len(ranks), padded(max(ranks))
        factors = {}
        for name, layer in self.layers.items():
            A_KRD = torch.zeros(K, R, layer.d_in, dtype=self.dtype, device=self.device)
            for draw in set(draws or (0,)):
                counters = (self.seed, layer.index) if draw == 0 else (self.seed, layer.index, draw)
                generator = torch.Generator().manual_seed(counter_seed(*counters))
                with one_thread():
                    widest_RD = torch.rand(max(ranks), layer.d_in, generator=generator, dtype=torch.float32)
                    widest_RD = widest_RD.mul_(2).sub_(1) / layer.d_in**0.5
                widest_RD = widest_RD.to(self.device, self.dtype)
                for k, r in enumerate(ranks):
                    if draws is None or draws[k] == draw:
                        A_KRD[k, :r] = widest_RD[:r]
            factors[name] = (A_KRD, A_KRD.new_zeros(K, layer.d_out, R))
        heads = {
            n: tuple(p.detach().to(self.dtype).expand(K, *p.shape).clone() for p in head.original.parameters())
            for n, head in self.heads.items()
        }
        self.load(Candidates(ranks=tuple(ranks), multipliers=tuple(multipliers), factors=factors, heads=heads))

    def load(self, candidates: Candidates) -> None:
        """Makes a copy of these the candidates; `self.candidates` then follows their training."""
        self.install(Loaded(candidates, self.model.dtype))

    def install(self, loaded: Loaded) -> None:
        """Points the layers at these candidates."""
        self._loaded = loaded
        self.compute_with(loaded)
        for name, layer in self.layers.items():
            layer.A_KRD, layer.B_KDR = (loaded.parameter(f"{name}.{ab}") for ab in "AB")
        for names, siblings in self.siblings.items():
            siblings.A_grad_KRD = loaded.gradients.joined([f"{name}.A" for name in names])

    def compute_with(self, running: Loaded | Lent) -> None:
        """What a forward pass reads."""
        self.switch.active = slice(0, len(running.ranks))
        for name, layer in self.layers.items():
            layer.compute_sB_KDR = running.compute.views[f"{name}.B"]
        for names, siblings in self.siblings.items():
            siblings.multiplier_K = running.multiplier_K
            siblings.compute_A_KRD = running.compute.joined([f"{name}.A" for name in names])
        for name, head in self.heads.items():
            head.stacked = nn.ParameterList([running.parameter(f"{name}.{i}") for i in range(len(head.names))])

    @property
    def loaded(self) -> Loaded:
        assert self._loaded is not None, "no candidates: see start and load"
        return self._loaded

    @property
    def candidates(self) -> Candidates:
        return self.loaded.candidates

    @property
    def values(self) -> Flat:
        """[K, P]: all that trains."""
        return self.loaded.values

    @property
    def gradients(self) -> Flat:
        return self.loaded.gradients

    @property
    def running(self) -> int:
        """How many candidates the next pass runs; the base alone counts as one."""
        return self.switch.count if self.switch.enabled else 1

    def refresh(self) -> None:
        """Brings what the products use up to date with the factors; to be called before each pass."""
        if self.switch.enabled:
            (self._lent or self.loaded).refresh()
        for siblings in self.siblings.values():
            siblings.forget()  # what a pass that failed half-way may have left

    @contextmanager
    def borrowed(self, candidates: Candidates) -> Iterator[None]:
        """Measures other candidates for a while, then puts the present ones back as they were."""
        try:
            self._lent = Lent(candidates, self.model.dtype)
            del candidates  # what was made for this goes, if nobody else wants it
            self.compute_with(self._lent)
            yield
        finally:
            self._lent = None
            self.compute_with(self.loaded)

    # --- how a pass runs

    @contextmanager
    def only(self, active: slice) -> Iterator[None]:
        """Runs these candidates alone: activations are then [active, …]."""
        before = self.switch.active
        self.switch.active = active
        try:
            yield
        finally:
            self.switch.active = before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Runs the plain base model, one row outermost."""
        self.switch.enabled = False
        try:
            yield
        finally:
            self.switch.enabled = True

    @contextmanager
    def training(self, step: int, micro: int) -> Iterator[None]:
        """Dropout on, with the masks of this step and micro-batch."""
        self.switch.dropout = self.dropout
        if self.dropout:
            self.switch.keys.renew(step, micro)
        try:
            yield
        finally:
            self.switch.dropout = 0.0

    # --- what it consists of

    def parameters(self) -> list[nn.Parameter]:
        """Every trainable tensor; each has the candidates outermost."""
        factors = [p for layer in self.layers.values() for p in (layer.A_KRD, layer.B_KDR)]
        return factors + [cast(nn.Parameter, p) for head in self.heads.values() for p in head.stacked]

    @property
    def costs(self) -> dict[str, int]:
        """The parameters of one rank more, D_in + D_out, in each layer."""
        return {name: layer.d_in + layer.d_out for name, layer in self.layers.items()}

    def trainable_parameters(self, ranks: int | Mapping[str, int]) -> int:
        """Σ over layers of r·(D_in + D_out), plus the heads; one rank for all layers, or one for each."""
        of = dict.fromkeys(self.layers, ranks) if isinstance(ranks, int) else ranks
        factors = sum(of[name] * cost for name, cost in self.costs.items())
        return factors + sum(p.numel() for head in self.heads.values() for p in head.original.parameters())

    def input_sizes(self, run: Callable[[], Any]) -> dict[str, float]:
        """Mean square of an entry of each layer's input while `run` passes examples through the plain base."""
        with self.off(), torch.no_grad():
            return input_sizes({name: layer.base for name, layer in self.layers.items()}, run)

    @property
    def base_parameters(self) -> int:
        """Of the model as it came, heads included; a packed weight counts as what it stands for."""
        added = {id(p) for p in self.parameters()}
        whole = {id(m.weight): m.in_features * m.out_features for m in self.model.modules() if is_4bit(m)}
        return sum(whole.get(id(p), p.numel()) for p in self.model.parameters() if id(p) not in added)

    @property
    def largest_rank(self) -> int:
        """Above the width of its smallest layer a rank buys nothing."""
        return min(min(layer.d_in, layer.d_out) for layer in self.layers.values())

    def check_ranks(self, ranks: Sequence[int]) -> None:
        for r in ranks:
            if not 1 <= r <= self.largest_rank:
                raise RankraceError(
                    f"rank {r} is outside 1 … {self.largest_rank}",
                    why="a LoRA rank is at least 1, and above the width of the smallest target layer it buys nothing",
                    fix=f"choose ranks between 1 and {self.largest_rank}, or other target modules",
                )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors: float32 masters, or float64 on a float64 model."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32
