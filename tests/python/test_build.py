"""The package as it was built: its facts, its symbols, one clear sentence under another torch."""

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fused_rope
import pytest
import torch
from fused_rope import diagnostics

FOLDER = Path(fused_rope.__file__).parent


def python(code):
    """Runs code in a fresh interpreter that finds this package."""
    path = f"import sys; sys.path.insert(0, {str(FOLDER.parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", path + textwrap.dedent(code)], capture_output=True, text=True
    )


def test_facts():
    from fused_rope import _build

    assert fused_rope.__version__ == _build.VERSION == fused_rope._C.version
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fused_rope.__version__)
    assert torch.__version__ == _build.TORCH_VERSION
    assert fused_rope._C.with_cuda == _build.WITH_CUDA
    if torch.cuda.is_available():
        assert _build.WITH_CUDA, "a GPU is there, but the library was built without CUDA"


def test_headers_find_each_other():
    """The installed ones include no header that is not installed."""
    root = FOLDER / "include"
    headers = [p for p in root.rglob("*") if p.suffix in (".h", ".cuh")]
    included = {x for p in headers for x in re.findall(r'#include "(.+)"', p.read_text())}
    assert included
    assert not [x for x in included if not (root / x).is_file()]


@pytest.mark.parametrize("call", ["rotate(x, *table)", "cos_sin_table(x[0, 0, 0], 4096)"])
def test_threads(call):
    """The CPU's loops are spread over torch's threads; without OpenMP they silently are not."""
    if not torch.backends.openmp.is_available() or not Path("/proc/self/task").exists():
        pytest.skip("needs a torch with OpenMP, and a list of threads")
    run = python(f"""
        import os

        import torch

        import fused_rope

        torch.set_num_threads(3)
        x = torch.empty(1, 512, 8, 64)
        table = torch.empty(512, 32), torch.empty(512, 32)
        before = len(os.listdir("/proc/self/task"))
        fused_rope.{call}
        print(len(os.listdir("/proc/self/task")) - before)
    """)
    assert run.stdout.split() == ["2"], run.stderr


BUILT = {"VERSION": "0.0.0", "WITH_CUDA": True, "CUDA_ARCHITECTURES": ()}


def import_under(torch_version, cuda, built, cuda_built):
    """Imports a package that was built against `built` under another torch."""
    return python(f"""
        import sys
        import types

        import torch

        torch.__version__, torch.version.cuda = {torch_version!r}, {cuda!r}
        build = types.ModuleType("fused_rope._build")
        vars(build).update({BUILT!r}, TORCH_VERSION={built!r}, CUDA_VERSION={cuda_built!r})
        sys.modules["fused_rope._build"] = build
        import fused_rope
    """)


@pytest.mark.parametrize(
    ("torch_version", "cuda", "built", "cuda_built", "why"),
    [
        ("2.14.1+cu130", "13.0", "2.13.0+cu130", "13.0", "minor versions of torch"),
        ("2.1.0", None, "2.13.0+cpu", None, "minor versions of torch"),
        ("3.13.0", None, "2.13.0+cpu", None, "minor versions of torch"),
        ("2.13.0+cu126", "12.6", "2.13.0+cu130", "13.0", "CUDA versions"),
        ("2.13.0+cpu", None, "2.13.0+cu130", "13.0", "CUDA versions"),
    ],
    ids=["minor", "prefix", "major", "CUDA", "no CUDA"],
)
def test_another_torch(torch_version, cuda, built, cuda_built, why):
    """One sentence, before the binary is loaded; no symbol lookup error."""
    run = import_under(torch_version, cuda, built, cuda_built)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    expected = f"fused_rope was built against torch {built} but torch {torch_version} is imported"
    assert last.startswith(f"ImportError: {expected}") and why in last
    assert "--no-deps" in last and "fused_rope._C" not in run.stderr


@pytest.mark.parametrize(
    ("built", "cuda_built"),
    [("2.13.7", None), ("2.13.0+cpu", None), ("2.13.0+cu131", "13.1")],
    ids=["patch", "local", "CUDA minor"],
)
def test_compatible_torch(built, cuda_built):
    run = import_under("2.13.2", "13.0", built, cuda_built)
    assert run.returncode == 0, run.stderr


# Methods of exported classes are their own; constructors and private helpers are among them.
FORMS = ("rotate", "rotate_", "rotate_qk", "rotate_qk_", "rotate_out", "rotate_qk_out")
EXPORTED = {
    *("cos_sin_table", "frequencies", "RotaryEmbeddingImpl"),
    *(*FORMS, *(f"norm_{form}" for form in FORMS)),
    "rotate_and_cache",
    # by the Python extension
    *("call_rotate", "call_rotate_", "call_rotate_out", "call_rotate_and_cache"),
}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_exported_symbols():
    """The library exports the public API, and the extension its entry point."""

    def defined(library):
        """Kinds and names, without the linker's own."""
        listed = subprocess.run(
            ["nm", "-DC", "--defined-only", library], capture_output=True, text=True, check=True
        )
        symbols = [line.split(maxsplit=2)[1:] for line in listed.stdout.splitlines()]
        return [s for s in symbols if s[1] not in ("_edata", "_end", "__bss_start")]

    (library,) = FOLDER.glob("lib*/libfused_rope.so")
    names = set()
    for kind, symbol in defined(library):
        ours = re.match(r"(?:(?:typeinfo|typeinfo name|vtable) for )?fused_rope::(\w+)", symbol)
        if ours:
            names.add(ours[1])
        else:  # weak copies of torch's and the C++ library's inline functions
            assert kind in "VWu", symbol
    assert names == EXPORTED
    (extension,) = FOLDER.glob("_C*.so")
    assert [symbol for kind, symbol in defined(extension) if kind in "TDB"] == ["PyInit__C"]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf, of binutils")
def test_libraries_are_found_next_to_the_package():
    (library,) = FOLDER.glob("lib*/libfused_rope.so")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    (path,) = re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", dynamic.stdout)
    assert path.split(":")[0] == "$ORIGIN/../../torch/lib"
    if "site-packages" in str(FOLDER):
        assert path == "$ORIGIN/../../torch/lib"


def test_build_info():
    info = fused_rope.build_info()
    assert info["version"] == fused_rope.__version__
    assert info["torch"] == torch.__version__ and info["cuda"] == torch.version.cuda
    assert info["kernels"] == (["CPU", "CUDA"] if fused_rope._C.with_cuda else ["CPU"])
    assert len(info["cuda_devices"]) == torch.cuda.device_count()
    assert bool(info["cuda_architectures"]) == bool(info["cuda_built"]) == fused_rope._C.with_cuda


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((9, 0), ("80-real", "90-real"), "machine code"),
        ((8, 9), ("80-real",), "machine code"),
        ((9, 0), ("90a-real",), "machine code"),
        ((12, 1), ("90-real", "120-virtual"), "PTX"),
        ((9, 0), ("90",), "machine code"),
        ((10, 0), ("90",), "PTX"),
        ((7, 5), ("80-real", "80-virtual"), "none"),
        ((8, 0), ("86-real",), "none"),
    ],
)
def test_kernels_of_a_gpu(capability, architectures, expected):
    assert diagnostics._kernels_for(capability, architectures) == expected


def test_command_line():
    run = python("import runpy; runpy.run_module('fused_rope', run_name='__main__')")
    assert run.returncode == 0, run.stderr
    assert f"torch               {torch.__version__}\n" in run.stdout
    assert re.search(r"^self-check cpu +passed in \d+\.\d s$", run.stdout, re.MULTILINE)


def test_command_line_fails_with_the_check():
    run = python("""
        import sys
        import fused_rope
        from fused_rope import __main__, functional, reference

        functional.rotate = lambda x, *table, **options: reference.rotate(x, *table, **options) + 1
        sys.exit(__main__.main())
    """)
    assert (
        run.returncode == 1 and "self-check cpu      FAILED: self_check: the forward" in run.stdout
    )


def test_modules_are_attributes():
    run = python("""
        import fused_rope

        print(fused_rope.compat.liger.liger_rotary_pos_emb.__name__)
        print(fused_rope.compat.transformers.patch.__name__)
        print(fused_rope.distributed.zigzag_positions.__name__)
        print(hasattr(fused_rope, "nothing"), hasattr(fused_rope.compat, "nothing"))
    """)
    want = ["liger_rotary_pos_emb", "patch", "zigzag_positions", "False", "False"]
    assert run.stdout.split() == want, run.stderr


def test_import_is_quiet_and_light():
    """No message, and none of the libraries that only the compat modules know."""
    run = python("""
        import sys
        import torch

        before = set(sys.modules)
        import fused_rope

        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"transformers", "numpy", "triton", "tqdm", "matplotlib"}))
    """)
    assert run.returncode == 0 and run.stdout.strip() == "[]" and not run.stderr, run.stderr


def test_operators_load_without_the_functions():
    """The library alone registers the operators, for programs that load exported graphs."""
    run = python("""
        import torch
        import fused_rope

        x, t = torch.ones(1, 1, 1, 2), torch.ones(1, 1)
        print(torch.ops.fused_rope.rotate(x, t, t).flatten().tolist())
    """)
    assert run.stdout.strip() == "[0.0, 2.0]", run.stderr


def test_typed():
    assert (FOLDER / "py.typed").exists()
