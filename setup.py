"""Runs CMake, which has all sources and flags; scripts/build_backend.py checks what it needs."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "scripts"))

import build_backend  # noqa: E402

OPTIONS = shlex.split(os.environ.get("CMAKE_ARGS", ""))
if os.environ.get("FUSED_ROPE_CUDA"):
    OPTIONS.append(f"-DFUSED_ROPE_CUDA={os.environ['FUSED_ROPE_CUDA']}")


def metadata() -> dict[str, Any]:
    """Version and requirements: a wheel names the torch that it was built against."""
    found = re.search(r"project\(FusedRope VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())
    assert found, "CMakeLists.txt has no project(FusedRope VERSION ...)"
    version = found[1]
    torch = build_backend.find_torch()
    if torch is None or not {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv):
        return {"version": version, "install_requires": ["torch>=2.11"]}
    # The last of several definitions counts, as in CMake.
    cuda = [o.partition("=")[2] for o in OPTIONS if re.match("-DFUSED_ROPE_CUDA(:|=)", o)]
    with_cuda = torch.cuda and not re.fullmatch("(?i)off|0|no|false|n", "".join(cuda[-1:]))
    kind = f"cu{torch.cuda.replace('.', '')}" if with_cuda else "cpu"
    return {
        "version": f"{version}+torch{torch.minor}{kind}",
        "install_requires": [f"torch=={torch.minor}.*"],
    }


class CMakeBuild(build_ext):
    """An editable install puts the library in python/; `cmake --build build` updates it."""

    def run(self) -> None:
        inplace = self.editable_mode or self.inplace
        default = "build" if inplace else self.build_temp
        build = ROOT / os.environ.get("FUSED_ROPE_BUILD_DIR", default)
        cmake = build_backend.find_cmake() or []
        build_backend.run([*cmake, "-S", ROOT, "-B", build, *self.definitions(build, inplace)])
        build_backend.run([*cmake, "--build", build])
        if not inplace:
            install = [*cmake, "--install", build, "--prefix", Path(self.build_lib) / "fused_rope"]
            build_backend.run(install)
            build_backend.run([*install, "--component", "python"])

    def definitions(self, build: Path, inplace: bool) -> list[str]:
        # CMake refuses another generator in an existing build folder.
        ninja = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={build_backend.find_ninja()}"]
        torch = build_backend.find_torch()
        return [
            *([] if (build / "CMakeCache.txt").exists() else ninja),
            f"-DPython_EXECUTABLE={sys.executable}",
            *([f"-DTorch_DIR={torch.folder}/share/cmake/Torch"] if torch else []),
            f"-DFUSED_ROPE_INPLACE={'ON' if inplace else 'OFF'}",
            f"-DFUSED_ROPE_RELOCATABLE={'OFF' if inplace else 'ON'}",
            *OPTIONS,
        ]

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("fused_rope._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    **metadata(),
)
