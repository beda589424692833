"""Norms and sums are of full float32 precision whatever torch was told, and what it was told stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import privimage_fast as pf
from privimage_fast.dp import precision
from privimage_fast.dp.precision import full_precision

backends = torch.backends
pytestmark = pytest.mark.skipif(not hasattr(torch._C, "_set_fp32_precision_setter"), reason="torch before 2.9")
INHERITED = list(precision._INHERITED)
OPERATIONS = [key for keys in precision._OPERATIONS.values() for key in keys]


def own_settings() -> dict[tuple[str, str], str]:
    """What each setting is itself, apart from what it inherits."""
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    found = {}
    for key in INHERITED:
        found[key] = get(*key)
        put(*key, "none")
    found |= {key: get(*key) for key in OPERATIONS}
    for key in INHERITED:
        put(*key, found[key])
    return found


def old_settings() -> list[Any]:
    """What reading them gives, an error where they contradict the new ones."""
    found: list[Any] = []
    for read in (
        torch.get_float32_matmul_precision,
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append(RuntimeError)
    return found


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = own_settings()
    yield
    torch.set_float32_matmul_precision("highest")
    torch._C._set_cudnn_allow_tf32(True)
    for key, value in before.items():
        torch._C._set_fp32_precision_setter(*key, value)


def _set(of: Any, value: str) -> None:
    of.fp32_precision = value


def _all_of_mkldnn(value: str) -> None:
    torch._C._set_fp32_precision_setter("mkldnn", "all", value)


SETTINGS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "cuda.matmul tf32": lambda: _set(backends.cuda.matmul, "tf32"),
    "all tf32": lambda: _set(backends, "tf32"),
    "all of cudnn tf32": lambda: _set(backends.cudnn, "tf32"),
    "all of mkldnn bf16": lambda: _all_of_mkldnn("bf16"),
    "mkldnn.matmul bf16": lambda: _set(backends.mkldnn.matmul, "bf16"),
    "mkldnn.conv bf16": lambda: _set(backends.mkldnn.conv, "bf16"),
    "cudnn.conv ieee": lambda: _set(backends.cudnn.conv, "ieee"),
    "old: high": lambda: torch.set_float32_matmul_precision("high"),
    "old: medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old: cuda.matmul": lambda: setattr(backends.cuda.matmul, "allow_tf32", True),
    "old: no cudnn": lambda: setattr(backends.cudnn, "allow_tf32", False),
    "old: medium, new: conv": lambda: (torch.set_float32_matmul_precision("medium"), _set(backends.cudnn.conv, "ieee")),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_are_full_and_settings_as_before(setting: str, device: str) -> None:
    SETTINGS[setting]()
    before = own_settings(), old_settings()
    with pytest.raises(ZeroDivisionError), full_precision(torch.device(device)):
        for op in precision._OPERATIONS["cuda" if device == "cuda" else "mkldnn"]:
            assert torch._C._get_fp32_precision_getter(*op) in ("none", "ieee")
        with full_precision(torch.device(device)):  # once more: does not read what contradicts it
            pass
        if RuntimeError not in before[1] and device == "cuda":
            assert old_settings() == ["highest", False, False]
            with backends.cudnn.flags(deterministic=True):  # reads and writes the old one
                pass
        1 / 0  # noqa: B018
    assert (own_settings(), old_settings()) == before


# One layer each: the gradient that reaches it is the loss's, and so of full precision itself.
NETS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(8, 16, 3),
    "linear": lambda: nn.Linear(8, 24),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 24)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("net", NETS)
def test_a_step_has_the_same_gradients_under_every_setting(setting: str, net: str) -> None:
    torch.manual_seed(0)
    module, x = NETS[net](), torch.randn(8, 8, 8, 8)

    def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with full_precision(x.device):
            return module(x).square().flatten(1).sum(1)

    def gradients(strategy: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        grads, norms, _ = pf.clipped_grad(module, loss, (x,), max_grad_norm=1e-2, strategy=strategy)
        return grads, norms

    strategies = ("store", "gram", "norm-only") if net != "weight norm" else ("store",)
    expected = [gradients(strategy) for strategy in strategies]
    SETTINGS[setting]()
    before = own_settings()
    for strategy, (grads, norms) in zip(strategies, expected, strict=True):
        found = gradients(strategy)
        assert torch.allclose(found[1], norms, rtol=1e-6)
        for name, grad in grads.items():
            assert torch.allclose(found[0][name], grad, rtol=1e-5, atol=1e-8), name
    assert own_settings() == before
