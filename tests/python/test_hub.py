"""`make hub`: the layout for the Kernels Hub's builder, complete and free of global names."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import fused_rope
import pytest

if sys.version_info < (3, 11):
    pytest.skip("tomllib needs Python 3.11", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[2]
# What the builder generates, for the operators of the library that is loaded here.
OPS = """
import torch

ops = torch.ops.fused_rope


def add_op_namespace_prefix(op_name):
    return f"fused_rope::{op_name}"
"""
# The package under another name, without the installed one, against a formula.
USE = """
import sys
import torch

torch.ops.load_library(sys.argv[1])
import kernel

q, k = torch.randn(2, 9, 4, 64, requires_grad=True), torch.randn(2, 9, 2, 64)
cos, sin = kernel.cos_sin_table(kernel.inv_freq(64), 9)
table = [torch.cat([t, t], -1).expand(2, -1, -1) for t in (cos, sin)]


def formula(x):
    a, b = x.chunk(2, -1)
    return x * table[0][:, :, None] + torch.cat([-b, a], -1) * table[1][:, :, None]


def same(got, want):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


want = formula(q), formula(k)
same(kernel.rotate_qk(q, k, cos, sin), want)
same(kernel.RotaryEmbedding(64)(q, k), want)
same(torch.func.vmap(kernel.rotate, (0, None, None))(q[:, None], cos, sin)[:, 0], want[0])
layer = kernel.layers.Half()
heads_first = layer(q.transpose(1, 2), k.transpose(1, 2), *table)
same([x.transpose(1, 2) for x in heads_first], want)
grads = [torch.autograd.grad(y.sum(), q) for y in (kernel.rotate(q, cos, sin), want[0])]
same(*grads)
compiled = torch.compile(kernel.rotate_qk, backend="aot_eager", fullgraph=True)
same(compiled(q, k, cos, sin), want)
assert "fused_rope" not in sys.modules
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "out"
    command = [sys.executable, ROOT / "scripts" / "hub.py", "--out", out]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def build(hub):
    return tomllib.loads((hub / "build.toml").read_text())


def test_build_toml(hub, build):
    """Every listed file is there, and every C++ file is listed: the builder copies no other."""
    general, torch, kernel = build["general"], build["torch"], build["kernel"]["fused_rope_cuda"]
    assert general["edition"] == 5 and general["backends"] == ["cpu", "cuda"]
    assert general["license"] == "Apache-2.0" and (hub / "LICENSE").exists()
    listed = [*torch["src"], *kernel["src"]]
    assert len(set(listed)) == len(listed)
    assert not [file for file in listed if not (hub / file).is_file()]
    found = {
        str(path.relative_to(hub))
        for path in hub.rglob("*")
        if path.suffix in (".h", ".cuh", ".cpp", ".cu")
    }
    assert found == set(listed)
    package = hub / "torch-ext" / general["name"].replace("-", "_")
    assert (package / "__init__.py").exists() and (hub / "flake.nix").exists()


def test_included_headers_are_there(hub, build):
    """Includes of the project's own headers resolve in the include folders of build.toml."""
    folders = [hub / folder for folder in build["torch"]["include"]]
    for path in (p for p in hub.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
        for line in path.read_text().splitlines():
            if line.startswith('#include "') and "registration.h" not in line:
                name = line.split('"')[1]
                places = [path.parent, *folders]
                assert any((place / name).exists() for place in places), (path, name)


def test_cpp_has_the_builder_s_namespace(hub):
    sources = [p.read_text() for p in (hub / "csrc").rglob("*") if p.suffix in (".h", ".cpp")]
    text = "\n".join(sources).replace(" ", "")
    assert text.count("FUSED_ROPE_LIBRARY(TORCH_EXTENSION_NAME,m)") == 1
    assert "TORCH_LIBRARY(fused_rope" not in text and "_IMPL(fused_rope" not in text
    assert '("fused_rope::' not in text


def test_python_imports_are_relative(hub):
    """Only torch, the standard library and the package itself; no operator by a global name."""
    for path in (hub / "torch-ext").rglob("*.py"):
        text = path.read_text()
        assert "torch.ops.fused_rope" not in text and "fused_rope::" not in text
        assert 'Library("' not in text
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in (name.split(".")[0] for name in names):
                assert name == "torch" or name in sys.stdlib_module_names, (path, name)


def test_package_works(hub, tmp_path):
    """The package, as the `kernels` package imports it, with the operators of this build."""
    package = tmp_path / "kernel"
    shutil.copytree(hub / "torch-ext" / "fused_rope", package)
    (package / "_ops.py").write_text(OPS)
    (tmp_path / "use.py").write_text(USE)
    (library,) = (Path(fused_rope.__file__).parent / "lib").glob("libfused_rope.so")
    command = [sys.executable, tmp_path / "use.py", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_build_toml_is_valid_for_the_builder(hub):
    """The builder's own parser, in a version that has this edition."""
    data = pytest.importorskip("kernels_data")
    if not hasattr(data, "Build"):
        pytest.skip("this version of kernels_data has no Build")
    assert data.Build.open(hub).general is not None
