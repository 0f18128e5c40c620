"""The package as it was built: its facts, and one clear sentence under another torch."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import fused_rope
import pytest
import torch

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


def test_another_torch():
    """One sentence, before the binary is loaded; no symbol lookup error."""
    run = python("""
        import importlib.util
        import sys
        import types

        build = types.ModuleType("fused_rope._build")
        build.VERSION, build.TORCH_VERSION, build.WITH_CUDA = "0.0.0", "1.2.3", False
        sys.modules["fused_rope._build"] = build
        import fused_rope
    """)
    assert run.returncode != 0
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fused_rope was built against torch 1.2.3")
    assert torch.__version__ in last and "fused_rope._C" not in run.stderr


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
