"""The private step that a CUDA graph may hold: its kernels on the host, since what has to be right does not need a GPU.

PRIVIMAGE_TEST_DEVICE=cuda runs the same tests on one.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from privimage_fast import ops
from privimage_fast.ops import native

pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")

DEVICE = os.environ.get("PRIVIMAGE_TEST_DEVICE", "cpu")
KEY = bytes(range(32))
UPDATES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {}), ("sgd", {"momentum": 0.9, "weight_decay": 0.01}), ("adam", {"betas": (0.5, 0.9), "eps": 1e-4}),
    ("adamw", {"weight_decay": 0.1}),
]  # fmt: skip


def tensors(n: int, shift: int = 0) -> list[Tensor]:
    """param, grad_sum, exp_avg, exp_avg_sq, ema, grad_out; ``shift`` floats off the alignment of whole vectors."""
    generator = torch.Generator().manual_seed(n)
    state = [torch.randn(n + shift, generator=generator).to(DEVICE)[shift:] for _ in range(6)]
    state[3].abs_()
    return state


def constants(number: int, /, **more: Any) -> dict[str, Any]:
    given = {
        "noise_std": 0.5 + number, "denominator": 3.0, "key": KEY, "step": number, "rank": 2, "stream": 1, "lr": 0.1 / number,
        "optimizer_step": number, "ema_decay": 1 - 1 / (1 + number),
    }  # fmt: skip
    return {**given, **more}


@pytest.mark.parametrize(("optimizer", "options"), UPDATES)
@pytest.mark.parametrize(("n", "offset", "shift"), [(1, 0, 0), (1003, 0, 0), (1000, 24, 0), (999, 5, 0), (515, 0, 1)])
def test_has_the_bits_of_the_ordinary_step(optimizer: str, options: dict[str, Any], n: int, offset: int, shift: int) -> None:
    found, expected = tensors(n, shift), tensors(n, shift)
    step = ops.ArmedStep(
        *found[:5], optimizer=optimizer, momentum="momentum" in options, grad_out=found[5], offset=offset
    )  # fmt: skip
    for number in (1, 2, 7):
        for state in (found, expected):
            state[1].copy_(torch.linspace(-1, 1, n))
        step.arm(**constants(number, **options))
        step.launch()
        native.private_step_(
            *expected[:5], optimizer=optimizer, grad_out=expected[5], offset=offset, **constants(number, **options)
        )  # fmt: skip
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize(("optimizer", "options"), UPDATES)
@pytest.mark.parametrize("armed_before", [True, False])
def test_a_launch_that_was_not_armed_leaves_nothing_usable(optimizer: str, options: dict[str, Any], armed_before: bool) -> None:
    """A graph replayed without arming would add the noise of the last step again: NaN everywhere instead, no sum either."""
    state = tensors(1003)
    step = ops.ArmedStep(*state[:5], optimizer=optimizer, momentum="momentum" in options, grad_out=state[5])
    if armed_before:
        step.arm(**constants(3, **options))
        step.launch()
        assert all(t.isfinite().all() for t in state)
    state[1].fill_(5.0)
    step.launch()
    param, grad_sum, exp_avg, exp_avg_sq, ema, grad_out = state
    assert param.isnan().all() and ema.isnan().all() and grad_out.isnan().all() and (grad_sum == 0).all()
    if optimizer != "sgd":
        assert exp_avg.isnan().all() and exp_avg_sq.isnan().all()
    elif options:
        assert exp_avg.isnan().all()


def test_a_spent_step_holds_no_key() -> None:
    step = ops.ArmedStep(*tensors(100)[:5], optimizer="adam")
    held = step._armed
    assert (held == 0xFF).all()
    step.arm(**constants(1))
    assert bytes(held[:32].tolist()) == KEY
    step.launch()
    assert (held == 0xFF).all()


def test_arming_again_takes_the_later_step() -> None:
    found, expected = tensors(100), tensors(100)
    step = ops.ArmedStep(*found[:5], optimizer="adam")
    step.arm(**constants(1))
    step.arm(**constants(2))
    step.launch()
    native.private_step_(*expected[:5], optimizer="adam", **constants(2))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_arming_may_not_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, it would arm every replay with one step's key and number."""
    step = ops.ArmedStep(*tensors(100)[:5], optimizer="adam")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"ArmedStep\.arm is being captured in a CUDA graph"):
        step.arm(**constants(1))
    assert (step._armed == 0xFF).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": bytes(31)}, "length of key is 31"), ({"step": -1}, "step is -1"), ({"noise_std": -1.0}, "noise_std is -1.0"),
        ({"denominator": 0.0}, "denominator is 0.0"), ({"optimizer_step": 0}, "optimizer_step is 0"),
        ({"momentum": 0.5}, "momentum is 0.5, expected 0, as when it was made"),
    ],
)  # fmt: skip
def test_bad_constants_arm_nothing(change: dict[str, Any], message: str) -> None:
    step = ops.ArmedStep(*tensors(10)[:5], optimizer="sgd")
    with pytest.raises(ValueError, match=f"ArmedStep.arm: {message}"):
        step.arm(**constants(1, **change))
    assert (step._armed == 0xFF).all()


def test_bad_tensors_are_named() -> None:
    with pytest.raises(TypeError, match=r"ArmedStep: param has dtype torch\.float64, expected float32"):
        ops.ArmedStep(*(t.double() for t in tensors(4)[:5]), optimizer="adam")
    with pytest.raises(ValueError, match="ArmedStep: exp_avg is None"):
        ops.ArmedStep(torch.zeros(3), torch.zeros(3), None, None, None, optimizer="adam")
