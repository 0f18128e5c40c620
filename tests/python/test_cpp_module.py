"""fused_rope::RotaryEmbedding, built against the installed package, has Python's very numbers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import fused_rope
import pytest
import torch
from fused_rope import RotaryEmbedding
from oracle import same
from torch import Tensor

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "modules"
TRAINED = {"original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, **TRAINED}
YARN = {"rope_type": "yarn", "factor": 8.0, **TRAINED}
YARN_KEYS = {"beta_fast": 16, "beta_slow": 2, "mscale": 0.707, "mscale_all_dim": 1.5}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1 + j / 8 for j in range(16)],
    "long_factor": [2 + j / 4 for j in range(16)],
    **TRAINED,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PROPORTIONAL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 8.0}

# The same names and options as in tests/modules/main.cpp.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"base": 5e5},
    "linear": {"scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"scaling": DYNAMIC},
    "yarn": {"scaling": YARN},
    "yarn, every key": {"scaling": {**YARN, "factor": 40.0, **YARN_KEYS, "truncate": False}},
    "yarn, attention factor": {"scaling": {**YARN, "attention_factor": 1.25}},
    "longrope": {"scaling": LONGROPE},
    "llama3": {"scaling": LLAMA3},
    "llama3, no blend": {"scaling": {**LLAMA3, "high_freq_factor": 1.0}},
    "proportional": {"scaling": PROPORTIONAL},
    "half-truncated": {"scaling": {"rope_type": "half_truncated"}},
    "axial": {"scaling": {"rope_type": "axial"}},
    "span": {"rotary_dim": 16, "rotary_offset": 8, "scaling": DYNAMIC},
    "interleaved": {"interleaved": True, "precision": "model"},
    "blocks": {"blocks": 2, "scaling": DYNAMIC},
    "axes": {"axes": [0, 1, 2] * 4 + [0] * 4, "scaling": DYNAMIC},
}


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "q": torch.randn(2, 7, 4, 32, generator=generator),
        "k": torch.randn(2, 7, 1, 32, generator=generator),
        "positions": torch.randint(-1, 100, (2, 7), generator=generator),
        "axes": torch.randint(-1, 100, (3, 2, 7), generator=generator),
        "lengths": torch.tensor([3, 60], dtype=torch.int32),
    }


@pytest.fixture(scope="module")
def results(
    given: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What the C++ program made of `given`."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler on PATH")
    folder = tmp_path_factory.mktemp("modules")
    torch.save(given, folder / "given.pt")
    prefix = f"{fused_rope.__path__[0]};{torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", PROGRAM, "-B", folder, f"-DCMAKE_PREFIX_PATH={prefix}"],
        ["cmake", "--build", folder],
        [folder / "modules", folder / "given.pt", folder / "results.pt"],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return dict(torch.load(folder / "results.pt", weights_only=False))


@pytest.mark.parametrize("name", OPTIONS)
def test_is_pythons(name: str, given: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    rope = RotaryEmbedding(32, max_seq_len=128, **OPTIONS[name])
    same(results[f"{name}.table"], torch.stack([rope.cos, rope.sin]))
    positions = given["axes" if rope.axes else "positions"]
    calls: dict[str, dict[str, Any]] = {
        "rows": {"offset": 90},
        "positions": {"positions": positions},
        "lengths": {"offset": given["lengths"]},
    }
    for how, where in calls.items():
        want = torch.cat(rope(given["q"], given["k"], **where), dim=2)
        same(results[f"{name}.{how}"], want)


def test_each_is_compared(results: dict[str, Tensor]) -> None:
    assert {name.split(".")[0] for name in results} == OPTIONS.keys()
