"""Builds the extension module `privimage_fast._C` with CMake and ninja; metadata is in pyproject.toml.

Environment:
  PRIVIMAGE_CUDA=0|1|auto     CUDA kernels: never, required, or where nvcc is found (default)
  PRIVIMAGE_CUDA_ARCHS=80;90  CUDA architectures (default: 80, 90 and the newest, with PTX)
  PRIVIMAGE_REQUIRE_NATIVE=1  a failed build is an error; otherwise the package installs without the extension
  PRIVIMAGE_WERROR=1          warnings are errors
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def version() -> str:
    text = (ROOT / "privimage_fast" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if not found:
        raise RuntimeError('privimage_fast/__init__.py has no line __version__ = "..."')
    return found.group(1)


def truthy(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "off", "no")


def cmake_executable() -> str:
    """The build requirement's own cmake if it is importable (an isolated build), else the one on PATH."""
    try:
        import cmake

        return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        found = shutil.which("cmake")
        if not found:
            raise RuntimeError("cmake was not found; `pip install cmake ninja`, or install a system cmake") from None
        return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            self.run_cmake(Path(self.get_ext_fullpath(ext.name)).resolve().parent)
        except Exception as error:
            if truthy("PRIVIMAGE_REQUIRE_NATIVE"):
                raise
            # Not fatal: every op has a plain torch implementation, and `privimage doctor` says which one runs.
            print(f"privimage-fast: native kernels were not built ({error}); installing without them", file=sys.stderr)

    def run_cmake(self, output: Path) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # an isolated build's cmake and ninja move between runs
        environment = dict(os.environ)
        arguments = [
            f"-DPRIVIMAGE_OUTPUT_DIR={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPRIVIMAGE_CUDA={os.environ.get('PRIVIMAGE_CUDA', 'auto') or 'auto'}",
            f"-DPRIVIMAGE_WERROR={'ON' if truthy('PRIVIMAGE_WERROR') else 'OFF'}",
        ]
        if os.environ.get("PRIVIMAGE_CUDA_ARCHS"):
            arguments.append(f"-DPRIVIMAGE_CUDA_ARCHS={os.environ['PRIVIMAGE_CUDA_ARCHS']}")
        try:
            import ninja

            environment["PATH"] = f"{ninja.BIN_DIR}{os.pathsep}{environment.get('PATH', '')}"
        except ImportError:
            pass
        if shutil.which("ninja", path=environment["PATH"]):
            arguments.append("-GNinja")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        cmake = cmake_executable()
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), *arguments], check=True, env=environment)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True, env=environment)


setup(
    version=version(),
    license="Apache-2.0",
    ext_modules=[Extension("privimage_fast._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
