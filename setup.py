"""Runs CMake, which has all sources and flags, for `pip install --no-build-isolation .`."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# Checked at import, so that pip reports it before it downloads anything.
if not importlib.util.find_spec("torch"):
    sys.exit(
        "fused-rope is built against the torch that it will run with: install torch first, "
        "then run `pip install --no-build-isolation .`."
    )


def project_version() -> str:
    found = re.search(r"project\(FusedRope VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt has no project(FusedRope VERSION ...)"
    return found[1]


def cmake() -> list[str]:
    """The CMake of this interpreter's environment, else the one on PATH."""
    if importlib.util.find_spec("cmake"):
        return [sys.executable, "-m", "cmake"]
    return [shutil.which("cmake") or sys.exit("fused-rope needs CMake: pip install cmake")]


def ninja() -> list[str]:
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={found}"] if found else []


class CMakeBuild(build_ext):
    """An editable install puts the library in python/; `cmake --build build` updates it."""

    def run(self) -> None:
        inplace = self.editable_mode or self.inplace
        default = "build" if inplace else self.build_temp
        build = ROOT / os.environ.get("FUSED_ROPE_BUILD_DIR", default)
        self.configure(build, inplace)
        subprocess.run([*cmake(), "--build", build], check=True)
        if not inplace:
            package = Path(self.build_lib) / "fused_rope"
            install = [*cmake(), "--install", build, "--prefix", package]
            subprocess.run(install, check=True)
            subprocess.run([*install, "--component", "python"], check=True)

    def configure(self, build: Path, inplace: bool) -> None:
        # CMake refuses another generator in an existing build folder.
        generator = [] if (build / "CMakeCache.txt").exists() else ninja()
        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFUSED_ROPE_INPLACE={'ON' if inplace else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run([*cmake(), "-S", ROOT, "-B", build, *generator, *options], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    version=project_version(),
    ext_modules=[Extension("fused_rope._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
