"""Writes the library's sources in the layout of the Kernels Hub's builder.

    python scripts/hub.py [--out build/hub]

`kernel-builder build` there builds every variant. The builder gives the operators of each build a
namespace of their own, since one process may load several builds: they are registered under
TORCH_EXTENSION_NAME and called through the `_ops` module that it generates. There is no pybind11.
scripts/hub holds the files that are only for the Hub.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "torch-ext/fused_rope"

# What a kernel of the Hub offers: the operators, the module, and layers for transformers.
MODULES = (
    "_functorch.py",
    "distributed.py",
    "embedding.py",
    "frequencies.py",
    "functional.py",
    "hf_config.py",
    "reference.py",
    "scaled_frequencies.py",
    "table.py",
    "table_cache.py",
    "tracing.py",
    "types.py",
    "compat/_patching/norms.py",
    "compat/_patching/style.py",
    "compat/transformers/adapters.py",
    "compat/transformers/layers.py",
)
# Sources of every backend, and those of CUDA.
HOST = ("csrc/autograd/*", "csrc/cpu/*", "csrc/meta/*", "csrc/ops/*")
HOST += ("include/fused_rope/ops.h", "include/fused_rope/types.h")
HOST += ("include/fused_rope/kernels/*.h", "include/fused_rope/kernels/cpu/*.h")
CUDA = ("csrc/cuda/*", "include/fused_rope/kernels/cuda/*")


class Rewriting:
    """Replaces patterns in a text; each must occur."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file

    def replace(self, pattern: str, by: str) -> None:
        self.text, count = re.subn(pattern, by, self.text, flags=re.MULTILINE)
        if not count:
            raise SystemExit(f"hub: expected {pattern!r} in {self.file}: adapt scripts/hub.py")


def python_source(file: str) -> str:
    """A module of the package that calls the operators through `_ops`."""
    source = Rewriting((ROOT / "python/fused_rope" / file).read_text(), file)
    if "torch.ops.fused_rope" in source.text:
        names = "add_op_namespace_prefix, ops" if file == "functional.py" else "ops"
        source.replace(r"torch\.ops\.fused_rope\b", "ops")
        source.replace(r"\A((?:.*\n)*?)(?=from \.)", rf"\1from ._ops import {names}\n")
    if file == "functional.py":
        source.replace(r'"fused_rope::(\w+)"', r'add_op_namespace_prefix("\1")')
    if file == "reference.py":
        source.replace(r'Library\("fused_rope"', "Library(ops.name")
    return source.text


def cpp_source(file: str) -> str:
    """A source that defines and finds the operators in the builder's namespace."""
    source = Rewriting((ROOT / file).read_text(), file)
    if re.search(r"\bTORCH_LIBRARY", source.text):
        source.replace(
            r"\bTORCH_LIBRARY(\w*)\(fused_rope,", r"FUSED_ROPE_LIBRARY\1(TORCH_EXTENSION_NAME,"
        )
    if '("fused_rope::' in re.sub(r"\s", "", source.text):
        source.replace(r'\((\s*)"fused_rope::(\w+)"', r'(\1FUSED_ROPE_OPERATOR("\2")')
    if "FUSED_ROPE_" in source.text and file.endswith(".cpp"):
        source.text = '#include "ops/namespace.h"\n' + source.text
    return source.text


def files(patterns: tuple[str, ...]) -> list[str]:
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def write(out: Path) -> None:
    """Writes the layout; what was there is removed."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(
        ROOT / "scripts/hub", out, ignore=shutil.ignore_patterns("__pycache__", "build.toml")
    )
    shutil.copy(ROOT / "LICENSE", out)

    def put(file: str, text: str) -> None:
        path = out / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    for module in MODULES:
        put(f"{PACKAGE}/{module}", python_source(module))
    for folder in ("compat", "compat/_patching", "compat/transformers"):
        put(f"{PACKAGE}/{folder}/__init__.py", "")
    lists = {"HOST": files(HOST), "CUDA": files(CUDA)}
    for file in (*lists["HOST"], *lists["CUDA"]):
        put(file, cpp_source(file))
    lists["HOST"].append("csrc/ops/namespace.h")
    build = (ROOT / "scripts/hub/build.toml").read_text()
    for name, listed in lists.items():
        build = build.replace(f"@{name}@", "".join(f'  "{file}",\n' for file in sorted(listed)))
    put("build.toml", build)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the layout of the Kernels Hub's builder.")
    parser.add_argument("--out", type=Path, default=ROOT / "build/hub", help="the folder to write")
    out = parser.parse_args().out
    write(out)
    print(f"wrote {out}: run kernel-builder build there")


if __name__ == "__main__":
    main()
