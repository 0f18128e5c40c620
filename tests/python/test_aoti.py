"""AOTInductor packages: loaded in Python, and in a C++ program without Python."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fused_rope
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.slow
INSTALLED = Path(fused_rope.__file__).parent
PROGRAM = Path(__file__).parents[1] / "aoti"


class Rope(nn.Module):
    """Every kind of argument that a package has to keep: tensors, a symbol, words, a list."""

    def __init__(self) -> None:
        super().__init__()
        inv_freq = 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        cos, sin = fused_rope.cos_sin_table(inv_freq, 64)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        table, bhsd = (self.cos, self.sin), dict(layout="bhsd")
        rows = dict(positions=positions, interleaved=True, precision="model")
        span = dict(offset=q.shape[2], blocks=2, rotary_offset=8)
        axes = dict(positions=torch.stack((positions, positions + 1)), axes=[0, 1] * 8)
        return (
            *fused_rope.rotate_qk(q, k, *table, **bhsd, **rows),
            *fused_rope.rotate_qk(q, k, *table, **bhsd, **span),
            fused_rope.rotate(q, *table, **bhsd, **axes),
            fused_rope.rotate_(k * 2, *table, **bhsd),
        )


def inputs(S: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k, views of [B, S, H, D] memory, and positions, for 2 batches, 4 and 2 heads."""
    q, k = (torch.randn(2, S, H, 48).bfloat16().transpose(1, 2) for H in (4, 2))
    return q, k, torch.randint(-1, 60, (2, S))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The module as a package, and a file of [inputs, outputs] as the module itself has them."""
    folder = tmp_path_factory.mktemp("aoti")
    module, S = Rope(), torch.export.Dim("S", min=2, max=32)
    shapes = ({2: S}, {2: S}, {1: S})
    exported = torch.export.export(module, inputs(9), dynamic_shapes=shapes)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "rope.pt2"))
    examples = [[list(x), list(module(*x))] for x in map(inputs, (9, 2, 31))]
    torch.save(examples, folder / "examples.pt")
    return Path(path), folder / "examples.pt"


def run_python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path.insert(0, {str(INSTALLED.parent)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", path + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def skip_where_no_package_loads(folder: Path) -> None:
    """Some builds of torch crash on every package: no fault of an operator."""
    linear = run_python(
        """
        import torch

        x = torch.ones(2, 3)
        exported = torch.export.export(torch.nn.Linear(3, 3), (x,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=sys.argv[1])
        torch._inductor.aoti_load_package(path)(x)
        """,
        folder / "linear.pt2",
    )
    if linear.returncode < 0:
        pytest.skip(f"this torch crashes on any package (signal {-linear.returncode})")


def check_package_loads(package: tuple[Path, Path]) -> subprocess.CompletedProcess[str]:
    """Loads and compares in a process of its own, where a crash does no harm."""
    run = run_python(
        """
        import fused_rope, torch

        model = torch._inductor.aoti_load_package(sys.argv[1])
        for inputs, outputs in torch.load(sys.argv[2]):
            for got, want in zip(model(*inputs), outputs, strict=True):
                assert torch.equal(got, want) and got.stride() == want.stride()
        """,
        *package,
    )
    if run.returncode < 0:
        skip_where_no_package_loads(package[0].parent)
    return run


def test_package_in_python(package: tuple[Path, Path]) -> None:
    run = check_package_loads(package)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_package_in_a_program_without_python(package: tuple[Path, Path], tmp_path: Path) -> None:
    check_package_loads(package)
    prefixes = f"{INSTALLED};{torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", PROGRAM, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefixes}"],
        ["cmake", "--build", tmp_path],
        [tmp_path / "aoti", *package],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == "18 of 18 outputs are right"
