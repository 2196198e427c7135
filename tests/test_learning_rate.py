"""lr(r) = lr·(s(r)·r / (s(16)·16))^-1/2."""

import pytest

from rankrace.config import RunConfig
from rankrace.methods.peft_lora import PeftLora
from rankrace.select.learning_rate import REFERENCE_RANK, Scaling, default_lr, lr_for, multiplier

RANKS = [1, 2, 3, 8, 12, 16, 49, 64, 1024]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("alpha", [8.0, 32.0])
def test_at_a_fixed_alpha_every_rank_has_the_same_rate(rank: int, alpha: float):
    assert lr_for(rank, 3e-4, alpha, "lora", {}) == pytest.approx(3e-4, rel=1e-12)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("alpha", [8.0, 32.0])
def test_with_rslora_it_falls_with_the_fourth_root(rank: int, alpha: float):
    assert lr_for(rank, 3e-4, alpha, "rslora", {}) == pytest.approx(3e-4 * (16 / rank) ** 0.25, rel=1e-12)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_the_reference_rank_gets_the_given_rate(scaling: Scaling):
    assert REFERENCE_RANK == 16
    assert lr_for(16, 3e-4, 32.0, scaling, {}) == 3e-4


def test_a_rate_given_for_a_rank_comes_first_and_is_for_that_rank_alone():
    override = {8: 1e-3}
    assert lr_for(8, 3e-4, 32.0, "rslora", override) == 1e-3
    assert lr_for(4, 3e-4, 32.0, "rslora", override) == pytest.approx(3e-4 * 2**0.5)


def test_multipliers():
    """As PEFT has them: lora_alpha / r, and lora_alpha / √r with use_rslora."""
    assert multiplier(8, 32.0, "lora") == 4.0
    assert multiplier(16, 32.0, "rslora") == 8.0


def test_the_default_rate_by_model_width():
    """5e-4 at width 2000, wider is slower; 1.3e-3 for SmolLM2-135M (576), 2.9e-4 for LLaMA 7B (4096)."""
    assert default_lr(2000) == 5e-4
    assert default_lr(576) == pytest.approx(1.32e-3, rel=0.01)
    assert default_lr(4096) == pytest.approx(2.86e-4, rel=0.01)
    assert default_lr(1000) / default_lr(2000) == pytest.approx(2**0.78)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_rslora_takes_one_rate_as_a_strategy_and_as_a_method(rank: int) -> None:
    """The default was found with α/r. With α/√r a step of the factors moves the update √r times as far."""
    lr = lr_for(rank, default_lr(576, "rslora"), 32.0, "rslora", {})
    assert lr == pytest.approx(default_lr(576) * rank**-0.25)
    assert PeftLora(name="x", rank=rank, rslora=True).default_lr(576, RunConfig(model="m", data="d")) == lr
