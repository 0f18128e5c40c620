"""The build backend of pyproject.toml: setuptools, after a check of what a build needs.

What is missing is reported in one sentence at the end of the output, before any file is compiled.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

SETUPTOOLS, CMAKE, TORCH = (77,), (3, 31), (2, 11)
TOOLS = 'pip install "setuptools>=77" "cmake>=3.31" ninja'


class Torch(NamedTuple):
    """The torch that the library is built against and will run with."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])


def find_torch() -> Torch | None:
    """The torch of this interpreter, which pip's build isolation hides; None without one."""
    spec = find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    folders += [f"{sysconfig.get_path(name)}/torch" for name in ("platlib", "purelib")]
    for folder in map(Path, folders):
        if (folder / "version.py").exists():
            facts = runpy.run_path(str(folder / "version.py"))
            return Torch(folder, facts["__version__"], facts.get("cuda"))
    return None


def find_cmake() -> list[str] | None:
    """The CMake of this interpreter's environment, else the one on PATH; None without one."""
    if find_spec("cmake"):
        return [sys.executable, "-m", "cmake"]
    found = shutil.which("cmake")
    return [found] if found else None


def find_ninja() -> str | None:
    return shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def prerequisites() -> None:
    """Exits with one sentence if a build cannot succeed."""
    torch, cmake = find_torch(), find_cmake()
    if torch is None:
        sys.exit(
            "fused-rope is built against the torch that it will run with, and "
            f"{sys.executable} has none: install torch first (pip install torch), then run "
            f"`{TOOLS}` and `pip install --no-build-isolation .`; an isolated build, such as "
            "`python -m build`, installs what FUSED_ROPE_TORCH names, such as torch==2.13.0."
        )
    if numbers(torch.version) < TORCH:
        sys.exit(
            f"fused-rope needs torch 2.11 or later, and torch {torch.version} is installed: "
            "upgrade torch first."
        )
    if cmake is None:
        sys.exit(f"fused-rope needs CMake 3.31 or later, and there is none: run `{TOOLS}`.")
    said = subprocess.run([*cmake, "--version"], capture_output=True, text=True).stdout
    version = said.split("\n")[0].removeprefix("cmake version ")
    if numbers(version) < CMAKE:
        sys.exit(f"fused-rope needs CMake 3.31 or later, and {version} is found: run `{TOOLS}`.")
    if find_ninja() is None:
        sys.exit(f"fused-rope needs ninja, and there is none: run `{TOOLS}`.")
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++"]
    if not any(map(shutil.which, compilers)):
        sys.exit(
            f"fused-rope needs a C++20 compiler, and there is no {' or '.join(compilers)}: install "
            "one (such as Debian's g++), or name it in CXX."
        )


def run(command: list[str | Path]) -> None:
    """Runs CMake; if it fails, exits with its error as one sentence after all output."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        errors = []
        for line in process.stderr or ():
            sys.stderr.write(line)
            errors.append(line)
    if process.returncode:
        found = re.search(r"^CMake Error.*\n\n?((?:  .*\n)+)", "".join(errors), re.MULTILINE)
        reason = found[1] if found else "the compiler's messages are above."
        sys.exit(f"fused-rope could not be built: {' '.join(reason.split())}")


def _setuptools() -> Any:
    """setuptools' own backend."""
    try:
        import setuptools
        from setuptools import build_meta
    except ImportError:
        sys.exit(f"fused-rope is built by setuptools, and there is none: run `{TOOLS}`.")
    if numbers(setuptools.__version__) < SETUPTOOLS:
        sys.exit(
            f"fused-rope needs setuptools 77 or later, and {setuptools.__version__} is installed: "
            f"run `{TOOLS}`."
        )
    return build_meta


def _hook(name: str, *, builds: bool) -> Callable[..., Any]:
    def hook(*args: Any, **kwargs: Any) -> Any:
        torch = os.environ.get("FUSED_ROPE_TORCH")
        if builds and torch and name.startswith("get_requires") and find_torch() is None:
            return [torch]
        if builds:
            prerequisites()
        return getattr(_setuptools(), name)(*args, **kwargs)

    return hook


get_requires_for_build_sdist = _hook("get_requires_for_build_sdist", builds=False)
build_sdist = _hook("build_sdist", builds=False)
get_requires_for_build_wheel = _hook("get_requires_for_build_wheel", builds=True)
prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel", builds=True)
build_wheel = _hook("build_wheel", builds=True)
get_requires_for_build_editable = _hook("get_requires_for_build_editable", builds=True)
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable", builds=True)
build_editable = _hook("build_editable", builds=True)
