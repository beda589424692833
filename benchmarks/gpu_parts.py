"""The parts of gpu.py that measure, and the list of all: each yields rows of a table as it gets them."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from gpu_checks import build, sanitize, tests
from gpu_machine import Machine, Row, attempt

from privimage_fast import ops
from privimage_fast.dp.graphs import CapturedStep
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, SamplerConfig, denoising_batch
from privimage_fast.models.unet import PRESETS, UNetConfig
from privimage_fast.ops import normalise

TOY = UNetConfig(base_channels=8, channel_mult=(1,), blocks=1, attention_levels=())


def ceilings(machine: Machine) -> Iterator[Row]:
    """What this device reaches: a bf16 matrix product and a copy."""
    n = machine.scale(8192, 128)
    a, b = (torch.randn(n, n, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    took = machine.seconds(lambda: a @ b, repeat=10)
    yield {"what": "bf16 GEMM", "TFLOP/s": 2 * n**3 / took["median"] / 1e12, **took}
    size = machine.scale(1 << 30, 1 << 12)
    source, target = (torch.zeros(size, device=machine.device, dtype=torch.uint8) for _ in range(2))
    took = machine.seconds(lambda: target.copy_(source), repeat=10)
    yield {"what": "copy", "GB/s": 2 * size / took["median"] / 1e9, **took}


STORES: dict[str, dict[str, Any]] = {
    "stored": {},
    "stored in bfloat16": {"store_dtype": torch.bfloat16},
    "norm only": {"store": False},
}


def kernels(machine: Machine) -> Iterator[Row]:
    """The kernels as shares of those ceilings."""
    gemm, copy = (row[unit] for row, unit in zip(ceilings(machine), ("TFLOP/s", "GB/s"), strict=True))
    for channels, size, k, dtype in [
        (64, 32, 8, torch.bfloat16), (128, 32, 8, torch.bfloat16), (256, 32, 8, torch.bfloat16), (256, 8, 8, torch.bfloat16),
        (128, 32, 1, torch.bfloat16), (128, 32, 8, torch.float32),
    ]:  # fmt: skip
        for how, store in STORES.items():
            name = f"conv 3×3 {channels}→{channels} {size}×{size} K={k} {str(dtype)[6:]} {how}"
            yield attempt(lambda: _conv(machine, channels, size, k, dtype, store, gemm), name)  # noqa: B023
    for way, passes in (("forward", 2), ("backward", 3)):
        yield attempt(lambda: _norm(machine, copy, way, passes), f"group norm + SiLU, {way}")  # noqa: B023
    yield attempt(lambda: _residual(machine, copy), "end of a residual block")
    yield attempt(lambda: _private_step(machine, copy), "noise + Adam + EMA")
    yield attempt(lambda: _weighted_sum(machine, copy, torch.float32), "weighted sum")
    yield attempt(lambda: _weighted_sum(machine, copy, torch.bfloat16), "weighted sum of bfloat16")
    yield attempt(lambda: _summed_step(machine, copy), "weighted sum + noise + Adam + EMA in one pass")


def _conv(machine: Machine, channels: int, size: int, k: int, dtype: torch.dtype, store: dict[str, Any], gemm: float) -> Row:
    c, side, samples = machine.scale(channels, 8), machine.scale(size, 4), machine.scale(32, 2)
    x, g = (
        torch.randn(samples * k, c, side, side, device=machine.device, dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    shape = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, multiplicity=k)
    took = machine.seconds(lambda: ops.conv_weight_grad(x, g, **store, **shape), repeat=3)
    rate = 2 * samples * k * side * side * c * c * 9 / took["median"] / 1e12
    return {"TFLOP/s": rate, "share of GEMM": rate / gemm, **took}


def _norm(machine: Machine, copy: float, way: str, passes: int) -> Row:
    """``passes``: images read and written, each once; the kernel's second read should find them in the cache."""
    rows, channels, side = machine.scale(1024, 2), machine.scale(64, 8), machine.scale(32, 4)
    x, g = torch.randn(2, rows, side, side, channels, device=machine.device, dtype=torch.bfloat16).movedim(-1, 2)
    affine = torch.ones(2, channels, device=machine.device)
    _, *statistics_of_groups = normalise.forward(x, 4, *affine, 1e-5, True)
    took = machine.seconds(
        (lambda: normalise.forward(x, 4, *affine, 1e-5, True))
        if way == "forward" else (lambda: normalise.backward(x, g, *statistics_of_groups, *affine, True)), repeat=5,
    )  # fmt: skip
    rate = passes * x.element_size() * x.numel() / took["median"] / 1e9
    return {"GB/s": rate, "share of copy": rate / copy, **took}


def _residual(machine: Machine, copy: float) -> Row:
    rows, channels, side = machine.scale(1024, 2), machine.scale(64, 8), machine.scale(32, 4)
    x, g = torch.randn(2, rows, side, side, channels, device=machine.device, dtype=torch.bfloat16).movedim(-1, 2)
    bias = torch.ones(channels, device=machine.device)
    took = machine.seconds(lambda: normalise.residual_forward(x, g, bias, bias, 0.5), repeat=5)
    rate = 3 * x.element_size() * x.numel() / took["median"] / 1e9
    return {"GB/s": rate, "share of copy": rate / copy, **took}


def _private_step(machine: Machine, copy: float) -> Row:
    n = machine.scale(80_000_000, 1000)
    state = [torch.zeros(n, device=machine.device) for _ in range(5)]
    count = iter(range(1, 1 << 20))
    took = machine.seconds(
        lambda: ops.private_step_(
            *state, noise_std=1.0, denominator=1.0, key=bytes(32), step=next(count), rank=0, stream=1, optimizer="adam", lr=1e-3,
            ema_decay=0.9,
        ), repeat=3,
    )  # fmt: skip
    rate = 10 * 4 * n / took["median"] / 1e9  # five arrays read, five written
    return {"GB/s": rate, "share of copy": rate / copy, **took}


def _stored(machine: Machine, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    stored = torch.zeros(machine.scale(64, 2), machine.scale(10_000_000, 125), device=machine.device, dtype=dtype)
    return stored, torch.ones(stored.shape[0], device=machine.device)


def _weighted_sum(machine: Machine, copy: float, dtype: torch.dtype) -> Row:
    stored, coef = _stored(machine, dtype)
    out = torch.zeros(stored.shape[1], device=machine.device)
    took = machine.seconds(lambda: ops.weighted_sum_(out, stored, coef), repeat=3)
    rate = stored.element_size() * stored.numel() / took["median"] / 1e9
    return {"GB/s": rate, "share of copy": rate / copy, **took}


def _summed_step(machine: Machine, copy: float) -> Row:
    stored, coef = _stored(machine, torch.float32)
    state = [torch.zeros(stored.shape[1], device=machine.device) for _ in range(5)]
    count = iter(range(1, 1 << 20))
    took = machine.seconds(
        lambda: ops.summed_private_step_(
            *state, sums=[state[1]], stored=[stored], coef=coef, noise_std=1.0, denominator=1.0, key=bytes(32), step=next(count),
            rank=0, stream=1, optimizer="adam", lr=1e-3, ema_decay=0.9,
        ), repeat=3,
    )  # fmt: skip
    rate = 4 * (stored.numel() + 10 * stored.shape[1]) / took["median"] / 1e9
    return {"GB/s": rate, "share of copy": rate / copy, **took}


def network(machine: Machine, config: UNetConfig, samples: int, multiplicity: int) -> tuple[Any, tuple[Any, ...], DenoisingLoss]:
    torch.manual_seed(0)
    size = machine.scale(32, 8)
    model = Denoiser(config, EDMConfig(), resolution=size, channels=3, num_classes=10)
    model = model.to(machine.device).to(memory_format=torch.channels_last)
    images = torch.rand(samples, 3, size, size, device=machine.device) * 2 - 1
    labels = torch.arange(samples, device=machine.device) % 10
    batch = denoising_batch(
        images, labels, edm=model.edm, num_classes=10, multiplicity=multiplicity, label_dropout=0.1, generator=None
    )
    return model, batch.args(), DenoisingLoss(multiplicity)


STEPS = ("plain", "DP", "DP captured")
COMPILED = ("plain compiled",)  # a compiled module runs as written under the engine: its DP step is the one above


def steps(machine: Machine) -> Iterator[Row]:
    """DP step ÷ plain step, 3.7 M U-Net in bf16: plain eager and compiled; DP eager and in CUDA graphs.

    All have the same rows at a time: as many as fit (4,096 of K=8 take more than 78 GiB), fewer for all where one does not. What
    takes a minute to compile comes last.
    """
    measured: list[tuple[int, int, dict[str, float]]] = []
    for k, most in ((8, 4096), (1, 1024)):
        samples = _fitting(machine, k, machine.scale(most // k, 4))
        while (taken := (yield from _compared(machine, k, samples, STEPS, {}))) is None:
            samples //= 2
        measured.append((k, samples, taken))
    for k, samples, taken in measured:
        while (again := (yield from _compared(machine, k, samples, COMPILED, taken))) is None:
            samples //= 2
            again = yield from _compared(machine, k, samples, STEPS, {})
            taken = again or {}


def _fitting(machine: Machine, k: int, most: int) -> int:
    """Samples, ``most`` or a half or a quarter of it …, of which a DP step should fit: by what two small ones take."""
    small, free = machine.scale(32, 1), machine.free_bytes()
    one, two = (_peak(machine, k, n) for n in (small, 2 * small))
    samples = most
    if free is not None and one is not None and two is not None:
        # A tenth is for what a capture and cuDNN's workspaces take besides.
        while samples > 1 and 1.1 * (one + (two - one) * (samples / small - 1)) > free:
            samples //= 2
    return samples


def _peak(machine: Machine, k: int, samples: int) -> int | None:
    """Of a DP step; None where it is not known, or the step fails: then a failure to measure it says so."""
    try:
        run, _ = _runner(machine, "DP", k, samples)
        run()  # what the first one measures and warms up does not count
        return machine.peak_bytes(run)
    except Exception:
        return None
    finally:
        machine.forget()


def _compared(
    machine: Machine, k: int, samples: int, kinds: Sequence[str], before: dict[str, float]
) -> Generator[Row, None, dict[str, float] | None]:
    """Seconds of each kind of step, beside those ``before``. None: one had too little memory, so that all should be measured once
    more with fewer rows."""
    taken = dict(before)
    for kind in kinds:
        if kind == "plain compiled" and machine.rehearsal:
            continue  # compiles for a minute
        row = attempt(lambda: _step(machine, kind, k, samples), f"{kind}, K={k}")  # noqa: B023
        machine.forget()
        if samples > 1 and re.search("out of memory|OutOfMemoryError", row.get("failed", "")):
            yield {"what": row["what"], "out of memory at": samples * k, "all repeated with": samples // 2 * k}
            return None
        if "median" in row:
            taken[kind] = row["median"]
            for plain in ("plain", "plain compiled"):
                if plain in taken and plain != kind:
                    row[f"÷ {plain}"] = taken[kind] / taken[plain]
        yield row
    return taken


def _step(machine: Machine, kind: str, k: int, samples: int) -> Row:
    run, more = _runner(machine, kind, k, samples)
    took = machine.seconds(run, rounds=7)
    rows = samples * k
    peak = machine.peak_bytes(run)
    return {
        "rows": rows,
        "rows/s": rows / took["median"],
        **took,
        "peak bytes": peak,
        "reserved bytes": machine.held_bytes(),
        **more,
    }


def _runner(machine: Machine, kind: str, k: int, samples: int) -> tuple[Callable[[], None], Row]:
    """One step of this kind, and what is to be said of it."""
    model, args, loss_fn = network(machine, TOY if machine.rehearsal else PRESETS["large"], samples, k)
    more: Row = {}
    if "compiled" in kind:
        torch.compiler.reset()  # the same code was compiled for other rows, and would now be for any number of them
        model.compile()
    if kind.startswith("DP"):
        private = PrivateOptimizer(
            model, max_grad_norm=1e-3, noise_multiplier=1.0, expected_batch_size=samples, multiplicity=k,
            update=UpdateRule("adam", lr=1e-4), ema_decay=0.999,
        )  # fmt: skip
        if "captured" in kind:
            # What cannot be captured is no captured step: an error, rather than the time of an eager one.
            capture = True if machine.device.type == "cuda" else None
            captured = CapturedStep(private, loss_fn, args, autocast=torch.bfloat16, capture=capture)
            more["captured"] = captured.captured

            def run() -> None:
                captured.accumulate(args)
                captured.step()
        else:

            def run() -> None:
                with torch.autocast(machine.device.type, torch.bfloat16):
                    private.accumulate(loss_fn, args)
                private.step()
    else:
        plain = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def run() -> None:
            plain.zero_grad(set_to_none=True)
            with torch.autocast(machine.device.type, torch.bfloat16):
                losses = loss_fn(model, *args)
            losses.sum().backward()
            plain.step()

    return run, more


def profile(machine: Machine) -> Iterator[Row]:
    """Where a step's time goes: the kernels that take most of it, in the plain and in the eager DP step of K = 8 and 1."""
    from torch.profiler import ProfilerActivity

    activity = ProfilerActivity.CUDA if machine.device.type == "cuda" else ProfilerActivity.CPU
    for kind, k in (("plain", 8), ("DP", 8), ("plain", 1), ("DP", 1)):
        run, _ = _runner(machine, kind, k, machine.scale(1024, 2) // k or 1)
        for _ in range(2):
            run()
        machine.synchronize()
        with torch.profiler.profile(activities=[activity]) as watched:
            run()
            machine.synchronize()
        on_gpu = machine.device.type == "cuda"  # there the host's calls are listed too, and take no time of the device
        timed = [(e.key, e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count) for e in watched.key_averages()]
        events = [event for event in timed if event[1] > 0]
        whole = sum(taken for _, taken, _ in events) or 1.0
        for place, (name, taken, count) in enumerate(sorted(events, key=lambda e: -e[1])[:20], 1):
            row = {"kernel": name[:160], "ms": taken / 1e3, "share": taken / whole, "launches": count}
            yield {"what": f"{kind}, K={k}, {place}", **row}
        machine.forget()


def memory(machine: Machine) -> Iterator[Row]:
    """An 80 M U-Net at K=8: the memory and time of a logical batch of 4,096 images, from a few of its micro-batches."""
    config = UNetConfig(base_channels=128, channel_mult=(2, 2, 2), blocks=4, attention_levels=(1,), head_channels=64)
    logical, samples = machine.scale(4096, 4), machine.scale(32, 2)
    model, args, loss_fn = network(machine, TOY if machine.rehearsal else config, samples, 8)
    size = sum(p.numel() for p in model.parameters())
    budget = machine.scale(6 << 30, 1 << 30)
    optimizer = PrivateOptimizer(
        model, max_grad_norm=1e-3, noise_multiplier=1.0, expected_batch_size=logical, multiplicity=8, memory_budget=budget
    )

    def accumulate() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16):
            optimizer.accumulate(loss_fn, args)

    def run() -> None:
        for _ in range(2):
            accumulate()
        optimizer.step()

    name = f"U-Net of {size / 1e6:.0f} M parameters, logical batch {logical}, K=8"
    peak = machine.peak_bytes(run)
    took = machine.seconds(accumulate, rounds=3)["median"] * logical / samples
    yield {"what": name, "peak bytes": peak, "GiB": None if peak is None else peak / 2**30, "budget": budget, "seconds": took}


def sampling(machine: Machine) -> Iterator[Row]:
    """Images a second from the 3.7 M U-Net with 18 Heun steps: bf16 from a CUDA graph, and float32."""
    from privimage_fast.stages.sample import draw

    for name, low in (("bfloat16", torch.bfloat16), ("float32", None)):
        count = machine.scale(2000, 4)
        model, _, _ = network(machine, TOY if machine.rehearsal else PRESETS["large"], 2, 1)
        options = {"seed": 0, "device": machine.device.type, "autocast": low}
        labels = np.arange(count) % 10

        def run(model: Any = model, options: Any = options, labels: Any = labels) -> None:
            draw(model, labels, SamplerConfig(steps=machine.scale(18, 2)), **options)

        yield attempt(lambda: {"images/s": count / (took := machine.seconds(run, rounds=3))["median"], **took}, name)  # noqa: B023


# The whole method on 60,000 grey images of 28 × 28: 25 epochs. The published 150 take six times its fine-tuning.
JOB: dict[str, Any] = {
    "data": {"resolution": 28, "channels": 1},
    "privacy": {"epsilon": 10.0, "delta": 1e-5},
    "query": {"classifier": {"epochs": 2}},
    "model": {"preset": "large"},
    "pretrain": {"steps": 3000, "batch_size": 512},
    "finetune": {"steps": 366, "batch_size": 4096, "multiplicity": 8, "checkpoint_steps": 100},
    "sample": {"per_class": 6000, "batch_size": 2000},
}  # fmt: skip
TOY_JOB: dict[str, Any] = {
    "data": {"resolution": 8, "channels": 1},
    "privacy": {"epsilon": 10.0, "delta": 1e-3},
    "query": {"classifier": {"width": 8, "epochs": 1, "batch_size": 32}},
    "model": {"preset": "custom", "unet": {"base_channels": 8, "channel_mult": [1], "blocks": 1, "attention_levels": []}},
    "pretrain": {"steps": 4, "batch_size": 8},
    "warmup": {"steps": 2, "batch_size": 6},
    "finetune": {"steps": 4, "batch_size": 8, "multiplicity": 2, "physical_batch_size": 8},
    "sample": {"per_class": 10, "batch_size": 10, "sampler": {"steps": 3}},
}


def job(machine: Machine, share: float = 0.1) -> Iterator[Row]:
    """The whole method on images in the shape of Fashion-MNIST: ``share`` of its steps and samples, and all of it from that.

    Start-up, planning and capture are not a matter of steps, so the whole is estimated too long rather than too short.
    """
    from privimage_fast.config import build_config  # late, as the pipeline: every part's process would wait for them
    from privimage_fast.data import ImageSet
    from privimage_fast.pipeline import Run

    settings = {name: dict(section) for name, section in (TOY_JOB if machine.rehearsal else JOB).items()}
    for section, key in (("pretrain", "steps"), ("finetune", "steps"), ("sample", "per_class")):
        settings[section][key] = max(1, round(share * settings[section][key]))
    side, whole = settings["data"]["resolution"], 0.0
    private, public = (
        ImageSet(*made_up_images(machine.scale(60_000, 60), side, classes=len(names)), tuple(names))
        for names in ("0123456789", "abcdefghijklmnopqrstuvwxyz")
    )
    with tempfile.TemporaryDirectory() as folder:
        config = build_config({**settings, "out": f"{folder}/run", "device": machine.device.type})
        run = Run(config, public=public, private=private)
        with run.opened(resume=False):
            for stage in ("query", "select", "pretrain", "warmup", "finetune", "sample"):
                start = time.perf_counter()
                getattr(run, stage)()
                machine.synchronize()
                seconds = time.perf_counter() - start
                scaled = seconds / share if stage in ("pretrain", "finetune", "sample") else seconds
                whole += scaled
                yield {"what": stage, "seconds": seconds, "of the whole": scaled}
    yield {"what": "the whole job", "share that was run": share, "of the whole": whole}


def made_up_images(count: int, side: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, side, side, 1) uint8, a bright row on noise, and labels (n,): the row's place."""
    random = np.random.default_rng(classes)  # two sets have no image in common
    labels = np.arange(count) % classes
    images = random.integers(0, 90, (count, side, side, 1), dtype=np.uint8)
    images[np.arange(count), labels % side] += 120
    return images, labels


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "tests": tests, "ceilings": ceilings, "kernels": kernels, "steps": steps, "profile": profile, "memory": memory,
    "sampling": sampling, "job": job, "sanitize": sanitize, "build": build,
}  # fmt: skip
