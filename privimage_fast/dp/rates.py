"""What a device does a second, measured once a process with the ops themselves: the planner's costs.

On a CPU with the clock, on a GPU between CUDA events, and there once for each dtype: bfloat16 products are one matrix operation,
float32 ones three of half the rate.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from privimage_fast import ops
from privimage_fast.dp.rules import ConvRule, LinearRule, MatrixRule

# (call, device) → seconds that one call takes.
Timer = Callable[[Callable[[], object], torch.device], float]


@dataclass(frozen=True)
class Rates:
    """Operations a second of per-sample weight gradients, of the clipped sum of deferred ones (``_sum``), and of Gram norms;
    bytes of memory a second.

    ``call`` is what a call takes however small. The rest is how kernels cut their work: sides of a product are filled up to
    ``tile``, positions to ``depth``; ``unfolds``: Gram matrices of a convolution are those of the unfolded input.
    """

    conv3: float  # 3×3 convolutions of stride 1, which may have an algorithm of their own
    conv3_norm: float  # the norm alone, which is not taken by that algorithm
    conv3_sum: float
    conv: float  # all other convolutions
    conv_sum: float
    linear: float
    linear_sum: float
    gram: float
    bytes: float
    call: float = 0.0
    tile: int = 1
    depth: int = 1
    unfolds: bool = False


@dataclass(frozen=True)
class Trial:
    """What is timed: a convolution of ``size``² positions, a linear layer, and a copy, of sizes that a model might have."""

    samples: int
    multiplicity: int
    channels: int
    size: int
    positions: int
    features: int
    copied: int  # floats; more than caches hold


# Some fifty milliseconds. A GPU is given enough to fill it for a tenth of a millisecond, against launches of some microseconds.
CPU_TRIAL = Trial(samples=4, multiplicity=1, channels=64, size=16, positions=128, features=256, copied=2**21)
CUDA_TRIAL = Trial(samples=64, multiplicity=8, channels=128, size=16, positions=64, features=512, copied=2**25)


def clock_seconds(call: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def event_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Between two events on the device's current stream, with nothing before them: a call's time on the host shows too."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure_rates(device: torch.device, dtype: torch.dtype, trial: Trial, timer: Timer) -> Rates:
    """Times every kind of work on inputs of ``dtype``; the best of five calls each, after one to warm up."""
    rows, k = trial.samples * trial.multiplicity, trial.multiplicity
    random = torch.Generator(device).manual_seed(0)  # the user's generators stay as they are
    factors = torch.full((trial.samples,), 0.5, device=device)

    def data(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, device=device).to(dtype)

    def seconds(call: Callable[[], object]) -> float:
        timer(call, device)
        return max(min(timer(call, device) for _ in range(5)), 1e-7)

    def summed(rule: MatrixRule, x: Tensor, g: Tensor) -> Callable[[], object]:
        if rule.clipped_sum(x, g, factors, k) is not None:
            return lambda: rule.clipped_sum(x, g, factors, k)
        return lambda: rule.weighted_weight_grad(x, g)

    found: dict[str, float] = {}

    def measure(kind: str, rule: MatrixRule, x: Tensor, g: Tensor) -> None:
        operations = 2.0 * rows * rule.positions(x, g) * rule.weight_numel()
        found[kind] = operations / seconds(lambda: rule.per_sample(x, g, (), k, {}))
        found[f"{kind}_sum"] = operations / seconds(summed(rule, x, g))
        if kind == "conv3":
            found["conv3_norm"] = operations / seconds(lambda: rule.weight_norms(x, g, k, "norm-only"))

    channels, size = trial.channels, trial.size
    x, weight = data(rows, size, size, channels).movedim(-1, 1), torch.ones(channels, channels, 3, 3, device=device)
    if device.type == "cpu":
        x = x.contiguous()
    for kind, stride in (("conv3", 1), ("conv", 2)):
        options = {"stride": [stride] * 2, "padding": [1, 1], "dilation": [1, 1], "groups": 1, "channel_dim": 1}
        measure(
            kind,
            ConvRule("conv2d", {"weight": "w"}, weight, None, options),
            x,
            x[..., : size // stride, : size // stride].clone(),
        )
    x = data(rows, trial.positions, trial.features)
    weight = torch.ones(trial.features, trial.features, device=device)
    linear = LinearRule("linear", {"weight": "w"}, weight, None, {"channel_dim": -1})
    measure("linear", linear, x, x)
    tile, depth = ops.tile_of(x)
    gram = 2.0 * trial.samples * pairs(k * trial.positions, tile) * 2 * trial.features
    found["gram"] = gram / seconds(lambda: linear.weight_norms(x, x, k, "gram"))
    big, least = torch.ones(trial.copied, device=device), data(1, 1, 1)
    return Rates(
        **found,
        bytes=8.0 * trial.copied / seconds(big.clone),
        call=seconds(lambda: linear.weight_norms(least, least, 1, "norm-only")) if tile > 1 else 0.0,
        tile=tile,
        depth=depth,
        unfolds=tile > 1,
    )


def pairs(positions: int, tile: int) -> int:
    """Pairs of positions, one triangle of their square, in whole tiles."""
    n = -(-positions // tile)
    return n * (n + 1) // 2 * tile**2


def machine_rates(device: torch.device, threads: int, dtype: torch.dtype = torch.float32) -> Rates:
    """Rates of this machine's CPU with that many threads, or of a GPU; measured when first asked for.

    ``dtype``: of x and g. It makes a difference on a GPU: bfloat16, or what is multiplied as float32.
    """
    if device.type != "cuda":
        return _measured(device, threads, torch.float32)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _measured(torch.device("cuda", index), 0, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


@functools.lru_cache(maxsize=16)
def _measured(device: torch.device, threads: int, dtype: torch.dtype) -> Rates:  # ``threads`` is a key only
    on_gpu = device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return measure_rates(device, dtype, CUDA_TRIAL if on_gpu else CPU_TRIAL, event_seconds if on_gpu else clock_seconds)
