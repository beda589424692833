"""Everything there is to check and measure on a GPU, in parts, within ten minutes.

    python benchmarks/gpu.py                              # all parts; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --parts ceilings,kernels     # some of them
    python benchmarks/gpu.py --rehearse                   # toy sizes on the CPU: runs the script's code, measures nothing

Run it from a source checkout, with the package installed or built for the GPU. Figures compare only inside one run: read
the shares and ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from privimage_fast import ops
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import PRESETS, UNetConfig

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass
class Machine:
    """Where the script runs and how large its problems are."""

    device: torch.device
    rehearsal: bool

    def scale(self, real: int, toy: int) -> int:
        return toy if self.rehearsal else real

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], rounds: int = 9, repeat: int = 1) -> dict[str, float]:
        """Median and quartiles of ``rounds`` timings of ``repeat`` calls, per call, after two that do not count."""
        rounds, repeat = self.scale(rounds, 3), self.scale(repeat, 1)
        times = []
        for i in range(rounds + 2):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            self.synchronize()
            if i >= 2:
                times.append((time.perf_counter() - start) / repeat)
        quarter = statistics.quantiles(times, n=4)
        return {"median": statistics.median(times), "q1": quarter[0], "q3": quarter[2]}

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Most memory in use at once while ``run`` runs; None where torch does not count it."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


# --- Parts: each returns rows of a table --------------------------------------------------------------------------------


def build(machine: Machine) -> list[Row]:
    """Every .cu compiled for this GPU with warnings as errors; registers and spills from ptxas."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return [{"what": "nvcc", "result": "not found"}]
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    arch = "sm_90" if machine.rehearsal else "sm_{}{}".format(*torch.cuda.get_device_capability())
    rows = []
    for source in sources[: machine.scale(len(sources), 1)]:
        start = time.perf_counter()
        command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-fmad=false", "-Werror=all-warnings", "-Xptxas", "-v", "-c"]
        done = subprocess.run([*command, str(source), "-o", os.devnull], capture_output=True, text=True, check=False)
        report = done.stderr + done.stdout
        used = [int(line.split("Used ")[1].split()[0]) for line in report.splitlines() if "Used " in line]
        spilled = sum(" 0 bytes spill stores" not in line for line in report.splitlines() if "spill stores" in line)
        rows.append({
            "what": source.name, "result": "ok" if done.returncode == 0 else report[-500:], "registers": max(used, default=0),
            "kernels that spill": spilled, "seconds": time.perf_counter() - start,
        })  # fmt: skip
    return rows


def tests(machine: Machine) -> list[Row]:
    """The kernel tests on the device instead of the emulation, and the step's own tests."""
    chosen = ["tests/ops/test_cuda_emulated.py", "tests/dp/test_cuda_step.py"]
    selection = ["-k", "clip_factors"] if machine.rehearsal else ["-k", "not faulty and not past_the_end and not buffers"]
    environment = {**os.environ, "PRIVIMAGE_TEST_DEVICE": machine.device.type}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *selection, *chosen], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    return [{"what": "pytest", "result": (done.stdout.strip().splitlines() or [done.stderr[-500:]])[-1], "exit": done.returncode}]


def sanitize(machine: Machine) -> list[Row]:
    """compute-sanitizer over every kernel on small, awkward shapes."""
    if machine.rehearsal:
        every_kernel(machine)
        return [{"what": "compute-sanitizer", "result": "needs a GPU"}]
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"what": "compute-sanitizer", "result": "not found"}]
    rows = []
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--every-kernel"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            result = "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-800:]
        except subprocess.TimeoutExpired:
            result = "not finished in 60 s"
        rows.append({"what": check, "result": result})
    return rows


def every_kernel(machine: Machine) -> None:
    device = machine.device
    convs = [(2, 2, 5, 7, 4, 3, 1), (1, 2, 72, 136, 5, 3, 1), (2, 1, 16, 16, 6, 3, 4), (1, 3, 8, 8, 9, 1, 1)]
    for dtype in (torch.float32, torch.bfloat16):
        for samples, k, c, p, size, kernel, groups in convs:
            x = torch.randn(samples * k, c, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            g = torch.randn(samples * k, p, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            shape = dict(kernel_size=(kernel,) * 2, stride=(1, 1), padding=(kernel // 2,) * 2, dilation=(1, 1), groups=groups)
            norms, stored = ops.conv_weight_grad(x, g, multiplicity=k, **shape)
            ops.conv_weight_grad(x, g, multiplicity=k, store=False, **shape)
            ops.conv_gram_norms(x, g, multiplicity=k, **shape)
            assert stored is not None
            ops.weighted_sum_(torch.zeros(stored.shape[1:], device=device), stored, ops.clip_factors(norms, 1.0))
            ops.bias_grad(g, channel_dim=1, multiplicity=k)
        t = torch.randn(4, 9, 11, device=device, dtype=dtype)
        statistics_ = torch.rand(4, 9, device=device)
        ops.layer_norm_affine_grad(t, t, statistics_, statistics_, multiplicity=2)
        ids = torch.arange(36, device=device).view(4, 9) % 5
        ops.embedding_grad(ids, t, num_embeddings=5, padding_idx=0, multiplicity=2)
    state = [torch.zeros(1003, device=device) for _ in range(5)]
    ops.private_step_(
        *state, noise_std=1.0, denominator=1.0, key=bytes(32), step=1, rank=0, stream=1, optimizer="adam", lr=0.1, ema_decay=0.9
    )
    machine.synchronize()


def ceilings(machine: Machine) -> list[Row]:
    """What this device reaches: a bf16 matrix product and a copy."""
    n = machine.scale(8192, 128)
    a, b = (torch.randn(n, n, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    gemm = machine.seconds(lambda: a @ b, repeat=10)
    size = machine.scale(1 << 30, 1 << 12)
    source, target = (torch.zeros(size, device=machine.device, dtype=torch.uint8) for _ in range(2))
    copy = machine.seconds(lambda: target.copy_(source), repeat=10)
    return [
        {"what": "bf16 GEMM", "TFLOP/s": 2 * n**3 / gemm["median"] / 1e12, **gemm},
        {"what": "copy", "GB/s": 2 * size / copy["median"] / 1e9, **copy},
    ]


def kernels(machine: Machine) -> list[Row]:
    """The kernels as shares of those ceilings."""
    gemm, copy = (row[unit] for row, unit in zip(ceilings(machine), ("TFLOP/s", "GB/s"), strict=True))
    device, rows = machine.device, []
    for channels, size, k, dtype in [
        (64, 32, 8, torch.bfloat16), (128, 32, 8, torch.bfloat16), (256, 32, 8, torch.bfloat16), (256, 8, 8, torch.bfloat16),
        (128, 32, 1, torch.bfloat16), (128, 32, 8, torch.float32),
    ]:  # fmt: skip
        c, side, samples = machine.scale(channels, 8), machine.scale(size, 4), machine.scale(32, 2)
        x, g = (
            torch.randn(samples * k, c, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for _ in range(2)
        )
        flops = 2 * samples * k * side * side * c * c * 9
        shape = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, multiplicity=k)
        for store in (True, False):
            took = machine.seconds(
                lambda x=x, g=g, store=store, shape=shape: ops.conv_weight_grad(x, g, store=store, **shape), repeat=3
            )
            rate = flops / took["median"] / 1e12
            name = f"conv 3×3 {channels}→{channels} {size}×{size} K={k} {str(dtype)[6:]} {'stored' if store else 'norm only'}"
            rows.append({"what": name, "TFLOP/s": rate, "share of GEMM": rate / gemm, **took})
    n = machine.scale(80_000_000, 1000)
    state = [torch.zeros(n, device=device) for _ in range(5)]
    count = iter(range(1, 1 << 20))

    def step() -> None:
        ops.private_step_(
            *state, noise_std=1.0, denominator=1.0, key=bytes(32), step=next(count), rank=0, stream=1, optimizer="adam", lr=1e-3,
            ema_decay=0.9,
        )  # fmt: skip

    took = machine.seconds(step, repeat=3)
    rate = 10 * 4 * n / took["median"] / 1e9  # five arrays read, five written
    rows.append({"what": "noise + Adam + EMA", "GB/s": rate, "share of copy": rate / copy, **took})
    stored, out = torch.zeros(machine.scale(64, 2), n // 8, device=device), torch.zeros(n // 8, device=device)
    coef = torch.ones(stored.shape[0], device=device)
    took = machine.seconds(lambda: ops.weighted_sum_(out, stored, coef), repeat=3)
    rate = 4 * stored.numel() / took["median"] / 1e9
    rows.append({"what": "weighted sum", "GB/s": rate, "share of copy": rate / copy, **took})
    return rows


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


def steps(machine: Machine) -> list[Row]:
    """DP step ÷ plain step (eager and compiled) for the 3.7 M U-Net in bf16, one physical batch of 512 rows a call."""
    rows = []
    for k in (8, 1):
        samples = machine.scale(512 // k, 2)
        config = (
            UNetConfig(base_channels=8, channel_mult=(1,), blocks=1, attention_levels=())
            if machine.rehearsal
            else PRESETS["large"]
        )
        taken: dict[str, dict[str, float]] = {}
        for kind in ("plain", "plain compiled", "DP"):
            if kind == "plain compiled" and machine.rehearsal:
                continue
            model, args, loss_fn = network(machine, config, samples, k)
            if kind == "DP":
                private = PrivateOptimizer(
                    model, max_grad_norm=1e-3, noise_multiplier=1.0, expected_batch_size=samples, multiplicity=k,
                    update=UpdateRule("adam", lr=1e-4), ema_decay=0.999,
                )  # fmt: skip

                def run(private=private, loss_fn=loss_fn, args=args) -> None:
                    with torch.autocast(machine.device.type, torch.bfloat16):
                        private.accumulate(loss_fn, args)
                    private.step()
            else:
                plain = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
                called = torch.compile(model) if kind == "plain compiled" else model

                def run(model=called, plain=plain, loss_fn=loss_fn, args=args) -> None:
                    plain.zero_grad(set_to_none=True)
                    with torch.autocast(machine.device.type, torch.bfloat16):
                        losses = loss_fn(model, *args)
                    losses.sum().backward()
                    plain.step()

            taken[kind] = machine.seconds(run, repeat=3)
            row = {
                "what": f"{kind}, K={k}", "÷ plain": taken[kind]["median"] / taken["plain"]["median"],
                "rows/s": samples * k / taken[kind]["median"], **taken[kind], "peak bytes": machine.peak_bytes(run),
            }  # fmt: skip
            rows.append(row)
    return rows


def memory(machine: Machine) -> list[Row]:
    """An 80 M U-Net at K=8 with a budget: what a physical batch of a logical 4,096 takes. Batches repeat, so peaks do."""
    config = UNetConfig(base_channels=128, channel_mult=(2, 2, 2), blocks=4, attention_levels=(1,), head_channels=64)
    if machine.rehearsal:
        config = UNetConfig(base_channels=8, channel_mult=(1,), blocks=1, attention_levels=())
    samples = machine.scale(32, 2)
    model, args, loss_fn = network(machine, config, samples, 8)
    size = sum(p.numel() for p in model.parameters())
    budget = machine.scale(6 << 30, 1 << 30)
    optimizer = PrivateOptimizer(
        model, max_grad_norm=1e-3, noise_multiplier=1.0, expected_batch_size=4096, multiplicity=8, memory_budget=budget
    )

    def run() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16):
            optimizer.accumulate(loss_fn, args)
        optimizer.step()

    start = time.perf_counter()
    peak = machine.peak_bytes(run)
    took = time.perf_counter() - start
    return [{"what": f"U-Net of {size / 1e6:.0f} M parameters", "peak bytes": peak, "budget": budget, "seconds": took}]


def job(machine: Machine) -> list[Row]:
    """The whole method on the demo's data."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "privimage_fast", "demo", "--device", machine.device.type, "--out", f"{folder}/run"]
        if machine.rehearsal:
            command.append("--dry-run")
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        result = "ok" if done.returncode == 0 else done.stderr[-500:]
    return [{"what": "privimage demo", "result": result, "seconds": time.perf_counter() - start}]


PARTS: dict[str, Callable[[Machine], list[Row]]] = {
    "build": build, "tests": tests, "sanitize": sanitize, "ceilings": ceilings, "kernels": kernels, "steps": steps,
    "memory": memory, "job": job,
}  # fmt: skip


def table(name: str, rows: list[Row]) -> str:
    lines = [f"\n## {name}"]
    for row in rows:
        cells = [
            f"{k} {v:.4g}" if isinstance(v, float) and math.isfinite(v) else f"{k} {v}" for k, v in row.items() if k != "what"
        ]
        lines.append(f"{row['what']}: " + ", ".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json", help="where the JSON goes")
    parser.add_argument("--minutes", type=float, default=10, help="no part starts after this many (default: 10)")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU; its figures mean nothing")
    parser.add_argument("--every-kernel", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer watches
    options = parser.parse_args(argv)
    wanted = [p.strip() for p in options.parts.split(",") if p.strip()]
    unknown = [p for p in wanted if p not in PARTS]
    if unknown:
        parser.error(f"--parts: no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "gpu.py: torch finds no GPU, so nothing was measured; --rehearse runs the script at toy sizes on the CPU",
            file=sys.stderr,
        )
        return 2
    info = ops.build_info()
    if not options.rehearse and not info.cuda_built:
        print(f"gpu.py: this build has no CUDA kernels ({info.cuda_status}); build with PRIVIMAGE_CUDA=1", file=sys.stderr)
        return 2
    machine = Machine(torch.device("cpu" if options.rehearse else "cuda"), options.rehearse)
    if options.every_kernel:
        every_kernel(machine)
        return 0
    started = time.perf_counter()
    results: dict[str, Any] = {
        "rehearsal": options.rehearse, "device": info.cuda_device, "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": importlib.util.find_spec("triton") is not None, "build": asdict(info), "parts": {},
    }  # fmt: skip
    failed = False
    for name in wanted:
        if time.perf_counter() - started > 60 * options.minutes:
            results["parts"][name] = [{"what": name, "result": "not started: out of time"}]
        else:
            try:
                results["parts"][name] = PARTS[name](machine)
            except Exception as error:  # the other parts still count
                failed = True
                results["parts"][name] = [{"what": name, "result": f"{type(error).__name__}: {error}"}]
        print(table(name, results["parts"][name]), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1, default=str) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
