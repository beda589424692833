"""The emulation itself, under AddressSanitizer: faulty kernels are caught, and the kernels stay in their buffers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from privimage_fast.ops import native

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")


@pytest.fixture(scope="session")
def check_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not (ROOT / "csrc").is_dir() or compiler is None:
        pytest.skip("no source checkout, or no C++ compiler")
    folder = tmp_path_factory.mktemp("emulation")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    (folder / "empty.cpp").write_text("int main() {}")
    if subprocess.run(
        [compiler, *sanitize, str(folder / "empty.cpp"), "-o", str(folder / "empty")], capture_output=True
    ).returncode:
        pytest.skip(f"{compiler} has no AddressSanitizer here")
    sources = [ROOT / "tests" / "ops" / "emulation_check.cpp", *sorted((ROOT / "csrc" / "emulation").glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, *sanitize, *map(str, sources), "-o", str(folder / "check")], check=True)
    return folder / "check"


def _run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)


FAULTS = {
    "missing-barrier": "wrong", "missing-second-barrier": "wrong", "uninitialised": "wrong", "missing-wait": "wrong",
    "diverging": "refused: check: the threads of block 0,0,0 wait for each other: 48 at __syncthreads",
    "half-a-warp": "refused: check: the threads of block 0,0,0 wait for each other: 16 at __shfl_xor_sync",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_faulty_kernels_are_caught(check_program: Path, fault: str, seed: str) -> None:
    assert _run(check_program, fault, seed).stdout.startswith(FAULTS[fault])
    assert _run(check_program, "sound", seed).stdout == "right\n"


@pytest.mark.parametrize("fault", ["past-global", "past-shared"])
def test_accesses_past_the_end_are_caught(check_program: Path, fault: str) -> None:
    done = _run(check_program, fault)
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr


def test_kernels_stay_in_their_buffers(check_program: Path) -> None:
    done = _run(check_program, "ops", "5")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr[:3000]
