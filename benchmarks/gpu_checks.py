"""The parts of gpu.py that check: the build, the tests on the device, every kernel under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from gpu_machine import ROOT, Machine, Row, attempt

from privimage_fast import ops
from privimage_fast.ops import normalise


def build(machine: Machine) -> Iterator[Row]:
    """Every .cu compiled for this GPU with warnings as errors; registers and spills from ptxas."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        yield {"what": "nvcc", "failed": "not found"}
        return
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"), key=lambda p: p.stat().st_size)
    arch = "sm_90" if machine.rehearsal else "sm_{}{}".format(*torch.cuda.get_device_capability())
    command = [nvcc, "-std=c++17", "-O3", f"-arch={arch}", "-fmad=false", "-Werror=all-warnings", "-Xptxas", "-v", "-c"]

    def compile_one(source: Path) -> Row:
        start = time.perf_counter()
        done = subprocess.run([*command, str(source), "-o", os.devnull], capture_output=True, text=True, check=False)
        report = done.stderr + done.stdout
        if done.returncode:
            raise RuntimeError(report[-500:])
        used = [int(line.split("Used ")[1].split()[0]) for line in report.splitlines() if "Used " in line]
        spilled = sum(" 0 bytes spill stores" not in line for line in report.splitlines() if "spill stores" in line)
        return {"registers": max(used, default=0), "kernels that spill": spilled, "seconds": time.perf_counter() - start}

    with ThreadPoolExecutor(machine.scale(os.cpu_count() or 1, 1)) as pool:
        chosen = sources[: machine.scale(len(sources), 2)]
        yield from pool.map(lambda source: attempt(lambda: compile_one(source), source.name), chosen)


def tests(machine: Machine) -> Iterator[Row]:
    """The kernel tests on the device instead of the emulation, and the step's own tests."""
    chosen = [
        f"tests/{name}.py"
        for name in ("ops/test_cuda_emulated", "ops/test_group_norm", "ops/test_armed_step", "dp/test_cuda_step")
    ]
    selection = ["-k", "clip_factors or spent"] if machine.rehearsal else []
    environment = {**os.environ, "PRIVIMAGE_TEST_DEVICE": machine.device.type}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--no-header", "-rf", *selection, *chosen]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [line.strip() for line in process.stdout]
    for line in lines:
        if line.startswith("FAILED"):
            yield {"what": line.split()[1], "failed": line.partition(" - ")[2] or "see the test"}
    summary = (lines or [""])[-1]
    yield {"what": "pytest", "exit": process.returncode, "result": summary} | (
        {} if process.returncode == 0 else {"failed": "\n".join(lines[-5:])}
    )


def sanitize(machine: Machine) -> Iterator[Row]:
    """compute-sanitizer over every kernel on small, awkward shapes."""
    if machine.rehearsal:
        every_kernel(machine)
        yield {"what": "compute-sanitizer", "result": "needs a GPU"}
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        yield {"what": "compute-sanitizer", "failed": "not found"}
        return
    checks = ("memcheck", "racecheck", "initcheck", "synccheck")
    for i, check in enumerate(checks):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
        may_take = machine.left() / (len(checks) - i)

        def run(command: list[str] = command, may_take: float = may_take) -> Row:
            done = subprocess.run(
                [*command, "--every-kernel"], capture_output=True, text=True, timeout=may_take, check=False
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError((done.stdout + done.stderr)[-800:])
            return {"result": "clean"}

        yield attempt(run, check)


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
            rounded_norms, rounded = ops.conv_weight_grad(x, g, multiplicity=k, store_dtype=torch.bfloat16, **shape)
            assert rounded is not None
            ops.weighted_sum_(torch.zeros(stored.shape[1:], device=device), rounded, ops.clip_factors(rounded_norms, 1.0))
            ops.conv_clipped_sum(x, g, torch.ones(samples, device=device), multiplicity=k, **shape)
            if c % 4 == 0:
                mean = torch.rand(samples * k, 4, device=device)
                ops.group_norm_affine_grad(x, x, mean, mean, num_groups=4, multiplicity=k)
        t = torch.randn(4, 9, 11, device=device, dtype=dtype)
        statistics_ = torch.rand(4, 9, device=device)
        ops.layer_norm_affine_grad(t, t, statistics_, statistics_, multiplicity=2)
        wide = torch.randn(4, 9, 136, device=device, dtype=dtype)
        norms, _ = ops.linear_weight_grad(t, wide, multiplicity=2)
        ops.linear_weight_grads([(t, wide), (wide, t), (wide, wide)] * 5, multiplicity=2)
        ops.linear_gram_norms(t, wide, multiplicity=2)
        ops.linear_clipped_sum(t, wide, ops.clip_factors(norms, 1.0), multiplicity=2)
        ids = torch.arange(36, device=device).view(4, 9) % 5
        ops.embedding_grad(ids, t, num_embeddings=5, padding_idx=0, multiplicity=2)
        for channels, size in ((8, 1), (72, 5), (64, 16)):
            x, g = torch.randn(2, 3, size, size + 1, channels, device=device, dtype=dtype).movedim(-1, 2)
            affine = torch.randn(2, channels, device=device)
            for silu in (True, False):
                _, *statistics_of_groups = normalise.forward(x, 4, *affine, 1e-5, silu)
                normalise.backward(x, g, *statistics_of_groups, *affine, silu)
            shift = torch.randn(x.shape[:2], device=device)
            _, *statistics_of_groups = normalise.forward(x, 4, *affine, 1e-5, True, shift)
            normalise.backward(x, g, *statistics_of_groups, *affine, True, shift)
            normalise.residual_backward(normalise.residual_forward(x, g, *affine, 0.5), 0.5)
    state = [torch.zeros(1003, device=device) for _ in range(5)]
    constants = {"noise_std": 1.0, "denominator": 1.0, "key": bytes(32), "rank": 0, "stream": 1, "lr": 0.1, "ema_decay": 0.9}
    ops.private_step_(*state, step=1, optimizer="adam", **constants)
    # More items than a launch takes, one of kernel offsets by channels and rounded, beginning within a block of the cipher.
    sums = [state[1][3:75].view(4, 2, 3, 3), *state[1][75:275].split(2)]
    stored = [torch.randn(5, 4, 3, 3, 2, device=device).movedim(-1, 2).bfloat16(), *torch.randn(100, 5, 2, device=device)]
    constants_of_step = {"step": 3, "optimizer": "adam", **constants}
    ops.summed_private_step_(*state, sums=sums, stored=stored, coef=torch.rand(5, device=device), **constants_of_step)
    if ops.build_info().native:
        armed = ops.ArmedStep(*state, optimizer="adam")
        armed.arm(step=2, **constants)
        armed.launch()
    machine.synchronize()
