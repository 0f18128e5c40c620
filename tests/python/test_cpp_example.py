"""examples/cpp, built against the installed package; llama_attention is transformers' attention."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import fused_rope
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

llama = pytest.importorskip("transformers.models.llama.modeling_llama")

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
B, S, E, HQ, HK, D = 2, 24, 64, 8, 2, 16
STEPS = 20
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs, built as the README says."""
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("no cmake or no C++ compiler on PATH")
    prefix = f"{fused_rope.__path__[0]};{torch.utils.cmake_prefix_path}"
    folder = tmp_path_factory.mktemp("example")
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release"]
    for command in (
        [cmake, "-S", str(EXAMPLE), "-B", str(folder), *options],
        [cmake, "--build", str(folder)],
    ):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    return folder


@pytest.fixture(scope="module")
def program(examples: Path) -> Path:
    return examples / "llama_attention"


class Attention(nn.Module):
    """Original transformers: its attention, its rotary tables, its causal mask."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": E, "num_attention_heads": HQ, "num_key_value_heads": HK}
        config = llama.LlamaConfig(
            **sizes, head_dim=D, max_position_embeddings=512, rope_parameters=ROPE
        )
        config._attn_implementation = "eager"
        self.attention = llama.LlamaAttention(config, layer_idx=0)
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        tables = self.rotary(x, torch.arange(S)[None])
        mask = torch.full((S, S), -torch.inf).triu(1)[None, None]
        out: Tensor = self.attention(x, position_embeddings=tables, attention_mask=mask)[0]
        return out


def train(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_equals_transformers(program: Path, tmp_path: Path) -> None:
    """The same outputs, losses and trained weights from the same weights and data."""
    model = Attention()
    x, target = torch.randn(B, S, E), torch.randn(B, S, E) / 4
    weights = {name: p.detach().clone() for name, p in model.attention.named_parameters()}
    given, result = tmp_path / "given.pt", tmp_path / "result.pt"
    torch.save({"x": x, "target": target, **weights}, given)
    run = subprocess.run([program, given, result], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    got = torch.load(result, weights_only=False)  # libtorch tags the type of its dict

    torch.testing.assert_close(got.pop("out"), model(x).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.pop("losses"), train(model, x, target), rtol=1e-5, atol=1e-6)
    for name in ("trained", "decoded"):
        torch.testing.assert_close(got.pop(name), model(x).detach(), rtol=1e-4, atol=1e-5)
    trained = dict(model.attention.named_parameters())
    assert got.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(got[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert not torch.equal(parameter, weights[name])


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("rotary_attention", "fused_rope "),
        ("llama_attention", "loss "),
        ("decode", "keys and values are in their slots"),
    ],
)
def test_alone(name: str, printed: str, examples: Path) -> None:
    run = subprocess.run([examples / name], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith(printed)
