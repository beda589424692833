"""Each op against what the machine can do, and against the same in torch ops.

Convolutions: GFLOP/s of the per-sample weight gradient beside sgemm, measured in the same rounds, and oneDNN's batched weight
gradient in the faster layout. The step: noise, Adam and EMA over the parameters of a 4.0 M network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from cases import ResNet
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import Times, interleave, record, replay
from torch import Tensor, nn

from privimage_fast import ops

Calls = dict[str, Callable[[], object]]
ROWS = 16


@dataclass(frozen=True)
class Layer:
    """A convolution, or with ``size`` 0 a linear layer over ``positions``; at K the ROWS belong to ROWS/K samples."""

    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    stride: int = 1
    positions: int = 0
    multiplicity: int = 1

    def __str__(self) -> str:
        if self.positions:
            what = f"linear {self.inputs}→{self.outputs}, {self.positions} positions"
        else:
            what = f"{self.inputs}→{self.outputs}, {self.kernel}×{self.kernel}, {self.size}²" + ("/2" if self.stride == 2 else "")
        return f"{what}, K={self.multiplicity}"

    @property
    def flop(self) -> float:
        positions = self.positions or (self.size // self.stride) ** 2
        return 2.0 * ROWS * positions * self.inputs * self.outputs * self.kernel**2

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Input and output gradient."""
        if self.positions:
            return torch.randn(ROWS, self.positions, self.inputs), torch.randn(ROWS, self.positions, self.outputs)
        out = self.size // self.stride
        return torch.randn(ROWS, self.inputs, self.size, self.size), torch.randn(ROWS, self.outputs, out, out)

    def geometry(self) -> dict[str, Any]:
        return dict(
            kernel_size=(self.kernel,) * 2, stride=(self.stride,) * 2, padding=(self.kernel // 2,) * 2, dilation=(1, 1), groups=1,
            multiplicity=self.multiplicity,
        )  # fmt: skip


def _layers(*multiplicities: int) -> list[Layer]:
    shapes = [
        Layer(64, 64, 32), Layer(3, 64, 32), Layer(128, 64, 32), Layer(128, 128, 16), Layer(256, 128, 16), Layer(256, 256, 8),
        Layer(64, 64, 14), Layer(32, 32, 28), Layer(128, 128, 16, kernel=1), Layer(64, 128, 32, stride=2),
        Layer(192, 576, 0, kernel=1, positions=65), Layer(192, 768, 0, kernel=1, positions=65),
    ]  # fmt: skip
    return [Layer(**{**vars(s), "multiplicity": k}) for k in multiplicities for s in shapes]


FULL, SMOKE = _layers(1, 8), [Layer(3, 4, 6), Layer(4, 4, 0, kernel=1, positions=5, multiplicity=8)]
GRAM = [Layer(256, 256, 8), Layer(256, 128, 16), Layer(64, 64, 32), Layer(192, 768, 0, kernel=1, positions=65)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.getoption("--smoke")
    if "layer" in metafunc.fixturenames:
        metafunc.parametrize("layer", SMOKE if small else FULL, ids=str)
    if "gram_layer" in metafunc.fixturenames:
        metafunc.parametrize("gram_layer", SMOKE if small else GRAM, ids=str)


def _turns(calls: Calls, smoke: bool) -> Times:
    return interleave(calls, rounds=1 if smoke else 7, seconds=0 if smoke else 1.0, warmup=0 if smoke else 2)


@cache
def _sgemm() -> tuple[Callable[[], Tensor], float]:
    a, b = torch.randn(2, 768, 768)
    out = torch.empty(768, 768)
    return lambda: torch.mm(a, b, out=out), 2.0 * 768**3


def _onednn(layer: Layer, layout: torch.memory_format) -> Callable[[], object]:
    """The weight gradient of the whole batch, as autograd asks for it."""
    x, g = layer.tensors()
    if layer.positions:
        flat_x, flat_g = x.flatten(0, 1), g.flatten(0, 1)
        return lambda: flat_g.t() @ flat_x
    x, g = x.contiguous(memory_format=layout), g.contiguous(memory_format=layout)
    weight = torch.randn(layer.outputs, layer.inputs, layer.kernel, layer.kernel).contiguous(memory_format=layout)
    pad = [layer.kernel // 2] * 2
    return lambda: torch.ops.aten.convolution_backward(
        g, x, weight, None, [layer.stride] * 2, pad, [1, 1], False, [0, 0], 1, [False, True, False]
    )


def _ours(layer: Layer, layout: torch.memory_format, **options: Any) -> Callable[[], object]:
    x, g = layer.tensors()
    if layer.positions:
        return lambda: ops.linear_weight_grad(x, g, multiplicity=layer.multiplicity, **options)
    x, g = x.contiguous(memory_format=layout), g.contiguous(memory_format=layout)
    return lambda: ops.conv_weight_grad(x, g, **layer.geometry(), **options)


def _unfold(layer: Layer) -> Callable[[], object]:
    """Per-sample gradients as they are made elsewhere: unfold, then one batched product."""
    x, g = layer.tensors()
    k, samples = layer.multiplicity, ROWS // layer.multiplicity

    def call() -> object:
        if layer.positions:
            columns, rows = x, g.transpose(1, 2)
        else:
            columns = nn.functional.unfold(x, layer.kernel, padding=layer.kernel // 2, stride=layer.stride).transpose(1, 2)
            rows = g.flatten(2)
        weight = torch.bmm(rows, columns)
        return weight.view(samples, k, *weight.shape[1:]).sum(1) if k > 1 else weight

    return call


WEIGHT_GRADS = ("sgemm", "onednn", "onednn-channels-last", "ours", "ours-channels-last", "ours-norm-only", "unfold-bmm")


@cache
def _weight_grad_times(layer: Layer, smoke: bool) -> Times:
    contiguous, last = torch.contiguous_format, torch.channels_last
    return _turns(
        {
            "sgemm": _sgemm()[0], "onednn": _onednn(layer, contiguous), "onednn-channels-last": _onednn(layer, last),
            "ours": _ours(layer, contiguous), "ours-channels-last": _ours(layer, last),
            "ours-norm-only": _ours(layer, contiguous, store=False), "unfold-bmm": _unfold(layer),
        },
        smoke,
    )  # fmt: skip


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("subject", WEIGHT_GRADS)
def test_weight_grad(benchmark: BenchmarkFixture, layer: Layer, subject: str, smoke: bool) -> None:
    flop = _sgemm()[1] if subject == "sgemm" else layer.flop
    times = _weight_grad_times(layer, smoke)[subject]
    record(benchmark, f"weight_grad: {layer}", times, subject=subject, layer=str(layer), flop=flop)


@cache
def _gram_times(layer: Layer, smoke: bool) -> Times:
    x, g = layer.tensors()
    if layer.positions:
        gram = lambda: ops.linear_gram_norms(x, g, multiplicity=layer.multiplicity)  # noqa: E731
    else:
        gram = lambda: ops.conv_gram_norms(x, g, **layer.geometry())  # noqa: E731
    return _turns({"direct": _ours(layer, torch.contiguous_format, store=False), "gram": gram}, smoke)


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("subject", ["direct", "gram"])
def test_norm(benchmark: BenchmarkFixture, gram_layer: Layer, subject: str, smoke: bool) -> None:
    """The squared norms alone: from the weight gradient that is thrown away, or from pairs of positions."""
    record(benchmark, f"norm: {gram_layer}", _gram_times(gram_layer, smoke)[subject], subject=subject, layer=str(gram_layer))


def _shapes(smoke: bool) -> list[torch.Size]:
    """Of a real network, because torch pays for each tensor: 4.0 M parameters (UNet2DModel) where diffusers is installed."""
    if smoke:
        return [torch.Size((3, 5)), torch.Size((7,))]
    try:
        from cases import Case

        return [p.shape for p in Case("UNet2DModel 32×32").build().model.parameters()]
    except ImportError:
        return [p.shape for p in ResNet(38).parameters()]


STEPS = ("torch-fused", "torch-foreach", "torch-flat", "ours", "ours-no-noise", "copy")


@cache
def _step_times(smoke: bool) -> tuple[Times, int]:
    shapes = _shapes(smoke)
    sizes = [s.numel() for s in shapes]
    n, std, count, decay = sum(sizes), 1.3, 16.0, 0.999

    def torch_step(shapes: list[torch.Size], **kind: bool) -> Callable[[], None]:
        """As DP optimizers on torch do it: ordinary Mersenne Twister noise, no privacy against who guesses its state."""
        params = [nn.Parameter(torch.randn(s)) for s in shapes]
        sums, ema = [torch.randn(s) for s in shapes], [p.detach().clone() for p in params]
        optimizer = torch.optim.Adam(params, lr=1e-4, **kind)  # type: ignore[arg-type]

        def step() -> None:
            for p, s in zip(params, sums, strict=True):
                p.grad = torch.normal(0.0, std, s.shape).add_(s).div_(count)
            optimizer.step()
            torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - decay)

        return step

    def our_step(noise_std: float) -> Callable[[], None]:
        param, grad_sum, exp_avg, ema = torch.randn(4, n)
        exp_avg_sq, taken = torch.rand(n), [0]

        def step() -> None:
            taken[0] += 1
            ops.private_step_(
                param, grad_sum, exp_avg, exp_avg_sq, ema, noise_std=noise_std, denominator=count, key=bytes(32), step=taken[0],
                rank=0, stream=0, optimizer="adam", lr=1e-4, ema_decay=decay, optimizer_step=taken[0],
            )  # fmt: skip

        return step

    source, target = torch.randn(2, n)
    calls: Calls = {
        "torch-fused": torch_step(shapes, fused=True), "torch-foreach": torch_step(shapes, foreach=True),
        "torch-flat": torch_step([torch.Size((n,))], fused=True), "ours": our_step(std), "ours-no-noise": our_step(0.0),
        "copy": lambda: target.copy_(source),
    }  # fmt: skip
    return interleave(calls, rounds=2 if smoke else 15, seconds=0 if smoke else 8, warmup=2), n


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("subject", STEPS)
def test_noise_adam_ema(benchmark: BenchmarkFixture, subject: str, smoke: bool) -> None:
    times, n = _step_times(smoke)
    record(benchmark, f"noise + Adam + EMA, {n} parameters", times[subject], subject=subject, elements=n)


@cache
def _sum_times(smoke: bool) -> tuple[Times, int]:
    shapes = [s for s in _shapes(smoke) if len(s) > 1]
    samples = 2 if smoke else ROWS
    stored = [torch.randn(samples, *s) for s in shapes]
    for i, s in enumerate(stored):
        if s.dim() == 5:  # as conv_weight_grad leaves it
            stored[i] = s.movedim(2, -1).contiguous().movedim(-1, 2)
    outs, coef = [torch.zeros(s) for s in shapes], torch.rand(samples)
    size = sum(s.numel() for s in stored)
    source, target = torch.randn(2, size // 2)
    calls: Calls = {
        "copy": lambda: target.copy_(source),  # half is read, half is written: the bytes that the sum reads
        "ours": lambda: ops.weighted_sum_(outs, stored, coef),
        "torch": lambda: [o.add_(torch.tensordot(coef, s, 1)) for o, s in zip(outs, stored, strict=True)],
    }
    return _turns(calls, smoke), 4 * size


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("subject", ["copy", "ours", "torch"])
def test_weighted_sum(benchmark: BenchmarkFixture, subject: str, smoke: bool) -> None:
    """One read of all stored gradients, against a copy of as many bytes."""
    times, size = _sum_times(smoke)
    record(benchmark, "weighted sum", times[subject], subject=subject, bytes=size)
