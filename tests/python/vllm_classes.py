"""vLLM's rotary embeddings without a GPU: its own Python files, or a stand-in of its registry.

`original` reads an installed vLLM, or the checkout that FUSED_ROPE_VLLM names, and replaces what a
CPU lacks by mocks. `stand_in` has the contract of vLLM's CustomOp registry and the attributes of
its classes, and nothing of their code.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from formula import series
from torch import Tensor

PACKAGE = "vllm.model_executor.layers.rotary_embedding"


def config(*custom_ops: str) -> SimpleNamespace:
    counters = {"enabled_custom_ops": Counter(), "disabled_custom_ops": Counter()}
    return SimpleNamespace(custom_ops=list(custom_ops) or ["all"], **counters)


def source() -> Path | None:
    """The folder with vLLM's package, or None."""
    if "FUSED_ROPE_VLLM" in os.environ:
        return Path(os.environ["FUSED_ROPE_VLLM"])
    found = importlib.util.find_spec("vllm")
    return Path(found.origin).parents[1] if found and found.origin else None


def original(root: Path) -> dict[str, ModuleType]:
    """Modules to put into sys.modules, so that vLLM's rotary embeddings import without the rest."""
    modules: dict[str, Any] = {}
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        modules[name] = ModuleType(name)
        modules[name].__path__ = [str(root / name.replace(".", "/"))]
    mocked = (
        "_aiter_ops config config.compilation distributed logger model_executor.utils platforms "
        "triton_utils utils utils.flashinfer utils.torch_utils"
    )
    for name in mocked.split():
        modules[f"vllm.{name}"] = MagicMock()
    modules["vllm.config"].get_cached_compilation_config.return_value = config()
    modules["vllm._aiter_ops"].rocm_aiter_ops.is_triton_rotary_embed_enabled.return_value = False
    modules["vllm.utils.flashinfer"].has_flashinfer.return_value = False
    platform = modules["vllm.platforms"].current_platform
    for kind in ("rocm", "cuda", "cuda_alike", "tpu", "xpu", "out_of_tree"):
        getattr(platform, f"is_{kind}").return_value = False
    platform.is_cpu.return_value = True
    return modules


def stand_in() -> dict[str, ModuleType]:
    """Modules to put into sys.modules in the place of vLLM's."""
    classes = _classes()
    homes = {"ApplyRotaryEmb": ".common", "Ernie4_5_VLRotaryEmbedding": ".ernie45_vl_rope"}
    names = ["vllm", "vllm.config", "vllm.model_executor", "vllm.model_executor.layers"]
    names += [PACKAGE + part for part in ("", *homes.values())]
    modules = {name: ModuleType(name) for name in names}
    for name, value in classes.items():
        setattr(modules[PACKAGE + homes.get(name, "")], name, value)
    current = config()
    modules["vllm.config"].get_cached_compilation_config = lambda: current
    return modules


def _classes() -> dict[str, type]:
    """Classes of a registry of their own, so that each test starts with an empty one."""
    replaced: dict[str, type] = {}

    class CustomOp(torch.nn.Module):
        def __new__(cls, *args: Any, **kwargs: Any) -> CustomOp:
            return super().__new__(replaced.get(cls.__name__, cls))

        def __init__(self) -> None:
            super().__init__()
            self._forward_method = self.forward_cpu if self.enabled() else self.forward_native

        def forward(self, *args: Any) -> Any:
            return self._forward_method(*args)

        def forward_native(self, *args: Any) -> str:
            return "forward_native"

        @classmethod
        def enabled(cls) -> bool:
            return False  # as with Inductor

        @classmethod
        def register_oot(cls, ours: type) -> None:
            assert cls.__name__ not in replaced, f"Duplicate op name: {cls.__name__}"
            ours.name = cls.__name__
            replaced[cls.__name__] = ours

    class RotaryEmbedding(CustomOp):
        name = "rotary_embedding"

        def __init__(
            self,
            head_size: int,
            rotary_dim: int,
            max_position_embeddings: int,
            base: float,
            is_neox_style: bool,
            dtype: torch.dtype,
            **others: Any,
        ) -> None:
            super().__init__()
            self.head_size, self.rotary_dim = head_size, rotary_dim
            self.is_neox_style = is_neox_style
            angle = torch.arange(max_position_embeddings)[:, None] * series(rotary_dim, base)
            self.register_buffer("cos_sin_cache", self.table(angle).to(dtype), persistent=False)
            vars(self).update(others)

        def table(self, angle: Tensor) -> Tensor:
            return torch.cat([angle.cos(), angle.sin()], -1)

    classes = {
        name: type(name, (RotaryEmbedding,), {})
        for name in (
            "LinearScalingRotaryEmbedding",
            "NTKScalingRotaryEmbedding",
            "DynamicNTKScalingRotaryEmbedding",
            "DynamicNTKAlphaRotaryEmbedding",
            "Llama3RotaryEmbedding",
            "Gemma4RotaryEmbedding",
        )
    }

    class YaRNScalingRotaryEmbedding(RotaryEmbedding):
        def table(self, angle: Tensor) -> Tensor:
            return 1.2 * super().table(angle / 4)

    class DeepseekScalingRotaryEmbedding(RotaryEmbedding):
        pass

    class DeepseekV4ScalingRotaryEmbedding(DeepseekScalingRotaryEmbedding):
        pass

    class MRotaryEmbedding(RotaryEmbedding):
        mrope_section, mrope_interleaved = None, False

    class Ernie4_5_VLRotaryEmbedding(MRotaryEmbedding):
        pass

    class BailingMRotaryEmbedding(MRotaryEmbedding):
        @property
        def spatial_size(self) -> int:
            return sum(self.mrope_section[1:])

    class MRotaryEmbeddingInterleaved(MRotaryEmbedding):
        mrope_dim = [1, 2, 0, 1, 2, 0, 1, 0] * 2

        def forward(self, *args: Any) -> str:
            return "forward"

    class Llama4VisionRotaryEmbedding(RotaryEmbedding):
        def table(self, angle: Tensor) -> Tensor:
            return torch.polar(torch.ones_like(angle), angle)[:, None]

    class ApplyRotaryEmb(CustomOp):
        name = "apply_rotary_emb"

        def __init__(
            self,
            enforce_enable: bool = False,
            is_neox_style: bool = True,
            enable_fp32_compute: bool = False,
        ) -> None:
            super().__init__()
            self.is_neox_style, self.enable_fp32_compute = is_neox_style, enable_fp32_compute

    classes.update((name, value) for name, value in locals().items() if isinstance(value, type))
    return classes
