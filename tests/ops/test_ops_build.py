"""Dispatch, the fallback without an extension, and what the build says about itself."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from privimage_fast import ops
from privimage_fast.ops import native, reference

ROOT = Path(__file__).parents[2]
needs_source = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a source checkout")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize("name", ops._OP_NAMES)
def test_reference_native_and_public_op_share_a_signature(name: str) -> None:
    plain = inspect.signature(getattr(reference, name)).parameters
    kernel = {k: v for k, v in inspect.signature(getattr(native, name)).parameters.items() if not k.startswith("_")}
    described = [[(p.name, p.kind, p.default) for p in side.values()] for side in (plain, kernel)]
    assert described[0] == described[1]
    assert getattr(ops, name).__doc__ == getattr(reference, name).__doc__


def test_dispatch_chooses_by_device_and_dtype(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.randn(4, 3, 5), torch.randn(4, 3, 2)
    assert ops.linear_weight_grad(x.double(), g, multiplicity=2)[1].dtype == torch.float64
    assert native.supports("linear_weight_grad", [x, g])
    assert native.supports("linear_weight_grad", [x.bfloat16(), g])
    assert not native.supports("linear_weight_grad", [x.half(), g])
    assert not native.supports("linear_weight_grad", [x.to("meta"), g.to("meta")])
    ops.linear_weight_grad(x.half(), g, multiplicity=2)
    monkeypatch.setattr(native, "_C", None)
    assert not native.supports("linear_weight_grad", [x, g])
    torch.testing.assert_close(
        ops.linear_weight_grad(x, g, multiplicity=2)[1], reference.linear_weight_grad(x, g, multiplicity=2)[1]
    )
    assert not ops.build_info().native


def test_ops_do_not_record_gradients() -> None:
    x, g = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        assert not ops.linear_weight_grad(x.to(dtype), g.to(dtype), multiplicity=2)[1].requires_grad


def test_without_the_extension_every_op_runs_and_one_line_says_so() -> None:
    done = run_python(
        """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stdout)
sys.modules["privimage_fast._C"] = None
import torch
from privimage_fast import ops
g = torch.ones(4, 3, 2)
assert ops.linear_weight_grad(g, g, multiplicity=2)[0].tolist() == [144.0, 144.0]
p, s = torch.zeros(9), torch.zeros(9)
ops.private_step_(p, s, None, None, None, noise_std=1.0, denominator=1.0, key=bytes(32), step=0, rank=0, stream=0,
                  optimizer="sgd", lr=1.0)
assert p.abs().min() > 0
info = ops.build_info()
assert not info.native and info.native_reason and len(info.reference_ops) == 15, info
"""
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "native kernels" in line]
    assert len(lines) == 1 and lines[0].startswith("INFO ")


def test_build_info(isa: str) -> None:
    info = ops.build_info()
    assert info.native and info.isa == isa and isa in info.isa_usable and set(info.isa_usable) <= set(info.isa_compiled)
    assert info.isa_compiled[0] == "baseline"
    assert info.cuda_status
    assert info.cuda_built == bool(info.cuda_archs)
    assert "float64" in info.reference_ops["conv_weight_grad"]


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
@pytest.mark.parametrize("wanted", ["baseline", "no such level"])
def test_environment_lowers_the_instruction_set(wanted: str) -> None:
    best = native._C.build_info()["isa_usable"][-1]
    code = "from privimage_fast import _C; print(_C.build_info()['isa'])"
    found = run_python(code, PRIVIMAGE_CPU_ISA=wanted).stdout.strip()
    assert found == (wanted if wanted == "baseline" else best)


@pytest.mark.skipif(native._C is None, reason="the extension is not built")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="dladdr")
def test_one_openmp_runtime_in_the_process() -> None:
    """The extension's calls reach the runtime torch brought, so there is one pool of threads."""
    runtime = ops.build_info().openmp_runtime
    if not runtime:
        pytest.skip("built without OpenMP")
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert os.path.realpath(runtime) in {os.path.realpath(path) for path in loaded}
    # torch's wheel loads its own copy before the extension asks for one; then no second may appear.
    code = """
import torch
before = {l.split()[-1] for l in open("/proc/self/maps") if "gomp" in l}
import privimage_fast.ops as ops
after = {l.split()[-1] for l in open("/proc/self/maps") if "gomp" in l}
torch.randn(500, 500) @ torch.randn(500, 500)
ops.gaussian_noise(bytes(32), step=0, rank=0, stream=0, n=100_000)
print(before, after, ops.build_info().openmp_runtime in before if before else True)
"""
    assert run_python(code).stdout.strip().endswith("True")


@needs_source
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
def test_cuda_sources_compile(source: str, tmp_path: Path) -> None:
    subprocess.run(
        ["nvcc", "-std=c++17", "-arch=compute_80", "-fmad=false", "-Werror=all-warnings", "-DPRIVIMAGE_WITH_CUDA", "--ptx",
         "-o", str(tmp_path / "out.ptx"), str(ROOT / "csrc" / "cuda" / source)],
        check=True,
    )  # fmt: skip
    assert "fma.rn.f64" not in (tmp_path / "out.ptx").read_text()  # contraction would change the noise's bits


@needs_source
def test_every_cuda_source_is_emulated() -> None:
    emulated = {p.stem for p in (ROOT / "csrc" / "emulation").glob("*.cpp")}
    assert emulated - {"fibers"} == {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"runtime"}


@needs_source
def test_metadata_names_the_license_without_a_deprecated_key(tmp_path: Path) -> None:
    """`project.license` as a table is an error in setuptools from 2027 on, as an expression in those before 77."""
    setuptools = pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "privimage_fast/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as p; print(p('out'))"
    (tmp_path / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    (folder,) = (tmp_path / "out").glob("*.dist-info")
    assert "\nLicense: Apache-2.0\n" in (folder / "METADATA").read_text(), setuptools.__version__
    assert list(folder.rglob("LICENSE")) and "project.license" not in done.stdout + done.stderr
