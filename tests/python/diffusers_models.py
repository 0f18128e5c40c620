"""Tiny models and attention layers of diffusers: one at least of each form of rotary function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

B, H, D, S = 2, 2, 16, 12


class Draw:
    """Seeded inputs of a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.dtype)


@dataclass(frozen=True)
class Case:
    """A module of diffusers, its sizes, and the arguments of a call."""

    module: str
    name: str
    sizes: dict[str, Any]
    arguments: Callable[[Draw], dict[str, Any]]
    form: str
    bitwise: bool = True
    norms: bool = False
    processor: str = ""

    @property
    def installed(self) -> bool:
        try:
            return hasattr(importlib.import_module(f"diffusers.models.{self.module}"), self.name)
        except ImportError:
            return False

    def build(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The module, with random parameters: some are 0 otherwise, so that nothing shows."""
        module = importlib.import_module(f"diffusers.models.{self.module}")
        extra = {"processor": getattr(module, self.processor)()} if self.processor else {}
        model: torch.nn.Module = getattr(module, self.name)(**self.sizes, **extra).eval()
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise / 4 if "norm" in name else noise / 4)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model


def angles(*shape: int) -> Tensor:
    return torch.linspace(0, 20, torch.Size(shape).numel()).sin().reshape(shape) * 9


def pair(width: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of this width."""
    half = angles(*shape[:-1], shape[-1] // 2)
    full = torch.cat([half, half], -1) if width == "tiled" else half.repeat_interleave(2, -1)
    return full.cos(), full.sin()


def matrices(*shape: int) -> Tensor:
    a = angles(*shape)
    return torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], -1).reshape(*shape, 2, 2)


def polar(*shape: int) -> Tensor:
    return torch.polar(torch.ones(shape), angles(*shape))


def flux(draw: Draw) -> dict[str, Any]:
    ids = torch.arange(9.0)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    return {
        "hidden_states": draw(B, 9, 8),
        "encoder_hidden_states": draw(B, 5, 24),
        "pooled_projections": draw(B, 24),
        "timestep": draw(B).abs(),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }


def video(draw: Draw, frames: int = 2, size: int = 8) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, 4, frames, size, size),
        "encoder_hidden_states": draw(B, 6, 16),
        "timestep": torch.tensor([3, 7]),
    }


def cosmos(draw: Draw) -> dict[str, Any]:
    return {**video(draw, 1), "fps": 30}


def anyflow(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 2, 4, 8, 8),
        "encoder_hidden_states": draw(1, 6, 16),
        "timestep": torch.full((1, 2), 500.0),
        "r_timestep": torch.full((1, 2), 250.0),
    }


def lumina(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, 4, 8, 8),
        "encoder_hidden_states": draw(B, 6, 32),
        "timestep": draw(B).abs(),
        "encoder_attention_mask": torch.ones(B, 6, dtype=torch.bool),
    }


def qwen(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 16),
        "encoder_hidden_states": draw(1, 8, 16),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.bool),
        "timestep": draw(1).abs(),
        "img_shapes": [(1, 4, 4)],
    }


def z_image(draw: Draw) -> dict[str, Any]:
    return {"x": [draw(16, 1, 8, 8)], "cap_feats": [draw(6, 16)], "t": torch.tensor([0.5])}


def ltx(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, 32, 4),
        "encoder_hidden_states": draw(B, 6, 16),
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.ones(B, 6, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def ltx2(draw: Draw) -> dict[str, Any]:
    return {
        **ltx(draw),
        "timestep": torch.tensor([3.0, 7.0]),
        "audio_hidden_states": draw(B, 9, 4),
        "audio_encoder_hidden_states": draw(B, 6, 16),
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def hidream(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, 4, 8, 8),
        "encoder_hidden_states_t5": draw(B, 8, 8),
        "encoder_hidden_states_llama3": draw(B, B, 8, 4),
        "pooled_embeds": draw(B, 8),
        "timesteps": torch.tensor([3, 7]),
    }


def joy(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 1, 4, 4),
        "encoder_hidden_states": draw(1, 12, 16),
        "timestep": torch.tensor([1.0]),
    }


def joy_plus(draw: Draw) -> dict[str, Any]:
    return {
        **joy(draw),
        "hidden_states": draw(1, 4, 16, 1, 2, 2),
        "shape_list": [[(1, 1, 2), (1, 2, 1)]],
    }


def longcat(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 16, 8),
        "encoder_hidden_states": draw(1, 10, 32),
        "encoder_attention_mask": torch.ones(1, 10, dtype=torch.bool),
        "attention_mask": torch.ones(1, 16, dtype=torch.bool),
        "timestep": torch.ones(1),
    }


def music(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 8, 24),
        "encoder_hidden_states": draw(1, 24, 16),
        "timestep": torch.full((1,), 0.5).to(draw.dtype),
    }


def layer(argument: str, table: Any) -> Callable[[Draw], dict[str, Any]]:
    return lambda draw: {"hidden_states": draw(B, S, H * D), argument: table}


def anima(draw: Draw) -> dict[str, Any]:
    tables = tuple(t.to(draw.dtype) for t in pair("tiled", B, S, D))
    names = ("position_embeddings", "encoder_position_embeddings")
    return {"hidden_states": draw(B, S, H * D), **dict.fromkeys(names, tables)}


def allegro(draw: Draw) -> dict[str, Any]:
    tables = tuple(pair("tiled", rows, 8) for rows in (2, 4, 4))
    frames, rows, columns = torch.meshgrid(*map(torch.arange, (2, 4, 4)), indexing="ij")
    positions = [axis.reshape(1, -1) for axis in (frames, rows, columns)]
    return {
        "hidden_states": draw(B, 4, 2, 8, 8),
        "encoder_hidden_states": draw(B, 6, 8),
        "timestep": torch.tensor([3, 7]),
        "image_rotary_emb": (tables, positions),
    }


def sana(draw: Draw) -> dict[str, Any]:
    names = ("query", "key", "value")
    return {**{name: draw(B, S, H, D) for name in names}, "rotary_emb": polar(1, 1, S, D // 2)}


def minimax(draw: Draw) -> dict[str, Any]:
    return {"hidden_states": draw(B, S, 24), "rotary_emb": pair("tiled", S, 12)}


def helios(draw: Draw) -> dict[str, Any]:
    return {
        "hidden_states": draw(B, S, H * D),
        "rotary_emb": torch.cat(pair("repeated", B, S, D), -1),
    }


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": H,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 64,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 1,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}
FLUX = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": D,
    "num_attention_heads": H,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}
COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": H,
    "attention_head_dim": 12,
    "num_layers": 1,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": False,
    "extra_pos_embed_type": None,
}
LUMINA = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 3,
    "num_kv_heads": 1,
    "multiple_of": 2,
    "axes_dim_rope": (4, 2, 2),
    "axes_lens": (64, 64, 64),
    "cap_feat_dim": 32,
}
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": D,
    "num_attention_heads": H,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 4, 4),
}
Z_IMAGE = {
    "in_channels": 16,
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [8, 4, 4],
    "axes_lens": [64, 32, 32],
}
MOCHI = {
    "patch_size": 2,
    "num_attention_heads": H,
    "attention_head_dim": 12,
    "num_layers": 2,
    "pooled_projection_dim": 16,
    "in_channels": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 4,
    "max_sequence_length": 16,
}
LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": H,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 1,
    "caption_channels": 16,
}
LTX2 = {
    **LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "rope_double_precision": False,
}
PRX = {
    "in_channels": 4,
    "context_in_dim": 16,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "axes_dim": [8, 8],
}
HIDREAM = {
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_channels": [8, 4],
    "text_emb_dim": 8,
    "num_routed_experts": 2,
    "num_activated_experts": 2,
    "axes_dims_rope": (4, 2, 2),
    "max_resolution": (8, 8),
    "llama_layers": (0, 1),
    "force_inference_output": True,
}
LONGCAT = {
    "dit_dim": 64,
    "dit_depth": 1,
    "dit_heads": 4,
    "dit_text_dim": 32,
    "latent_dim": 8,
    "text_conv": False,
}
MUSIC = {
    "in_channels": 8,
    "condition_dim": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "ff_inner_dim": 32,
    "rotary_dim": 4,
    "fourier_embedding_dim": 8,
}
ALLEGRO = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "cross_attention_dim": 48,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "caption_channels": 8,
}

_T = "transformers."
CASES = {
    "flux": Case(
        f"{_T}transformer_flux", "FluxTransformer2DModel", FLUX, flux, "shared", norms=True
    ),
    "cosmos": Case(
        f"{_T}transformer_cosmos", "CosmosTransformer3DModel", COSMOS, cosmos, "shared", norms=True
    ),
    "lumina2": Case(
        f"{_T}transformer_lumina2",
        "Lumina2Transformer2DModel",
        LUMINA,
        lumina,
        "shared",
        bitwise=False,
        norms=True,
    ),
    "qwen-image": Case(
        f"{_T}transformer_qwenimage",
        "QwenImageTransformer2DModel",
        QWEN,
        qwen,
        "interleaved, half or complex, in float32",
        bitwise=False,
        norms=True,
    ),
    "z-image": Case(
        f"{_T}transformer_z_image",
        "ZImageTransformer2DModel",
        Z_IMAGE,
        z_image,
        "complex",
        bitwise=False,
        norms=True,
    ),
    "anyflow": Case(
        f"{_T}transformer_anyflow",
        "AnyFlowTransformer3DModel",
        WAN,
        anyflow,
        "complex, in float64, heads first",
        bitwise=False,
    ),
    "sana-wm": Case(
        f"{_T}transformer_sana_wm",
        "SanaWMSoftmaxAttention",
        {},
        sana,
        "complex, elements first",
        bitwise=False,
    ),
    "wan": Case(
        f"{_T}transformer_wan",
        "WanTransformer3DModel",
        WAN,
        video,
        "interleaved, every second number of the tables",
    ),
    "helios": Case(
        f"{_T}transformer_helios",
        "HeliosAttention",
        {"dim": H * D, "heads": H, "dim_head": D},
        helios,
        "interleaved, every second number of a joint table",
        processor="HeliosAttnProcessor",
    ),
    "mochi": Case(
        f"{_T}transformer_mochi",
        "MochiTransformer3DModel",
        MOCHI,
        lambda draw: {
            **video(draw),
            "encoder_attention_mask": torch.ones(B, 6, dtype=torch.bool),
        },
        "interleaved, in float32, tables per head",
        norms=True,
    ),
    "ltx": Case(
        f"{_T}transformer_ltx",
        "LTXVideoTransformer3DModel",
        LTX,
        ltx,
        "interleaved, in float32, all heads in one row",
    ),
    "ltx-2, split": Case(
        f"{_T}transformer_ltx2",
        "LTX2VideoTransformer3DModel",
        {**LTX2, "rope_type": "split"},
        ltx2,
        "half, in float32, tables per head",
        bitwise=False,
    ),
    "ltx-2, interleaved": Case(
        f"{_T}transformer_ltx2",
        "LTX2VideoTransformer3DModel",
        {**LTX2, "rope_type": "interleaved"},
        ltx2,
        "interleaved, in float32, all heads in one row",
    ),
    "kandinsky-5": Case(
        f"{_T}transformer_kandinsky",
        "Kandinsky5Attention",
        {"num_channels": H * D, "head_dim": D},
        layer("rotary_emb", matrices(S, 1, D // 2)),
        "rotation matrices, to bfloat16",
    ),
    "kandinsky-6": Case(
        f"{_T}transformer_kandinsky6",
        "Kandinsky6Attention",
        {"num_channels": H * D, "head_dim": D},
        layer("rotary_emb", matrices(S, 1, D // 2)),
        "rotation matrices, in float32",
    ),
    "prx": Case(
        f"{_T}transformer_prx",
        "PRXTransformer2DModel",
        PRX,
        lambda draw: {
            "hidden_states": draw(1, 4, 8, 8),
            "encoder_hidden_states": draw(1, 6, 16),
            "timestep": torch.tensor([1.0]),
        },
        "rotation matrices, in float32, heads first",
        norms=True,
    ),
    "hidream": Case(
        f"{_T}transformer_hidream_image",
        "HiDreamImageTransformer2DModel",
        HIDREAM,
        hidream,
        "rotation matrices, in float32, q and k",
    ),
    "joyimage": Case(
        f"{_T}transformer_joyimage",
        "JoyImageEditTransformer3DModel",
        JOY,
        joy,
        "interleaved, in float32, q and k",
    ),
    "joyimage-plus": Case(
        f"{_T}transformer_joyimage_edit_plus",
        "JoyImageEditPlusTransformer3DModel",
        JOY,
        joy_plus,
        "interleaved, in float32, q and k",
    ),
    "longcat-audio": Case(
        f"{_T}transformer_longcat_audio_dit",
        "LongCatAudioDiTTransformer",
        LONGCAT,
        longcat,
        "half, in float32",
    ),
    "minimax-h3": Case(
        f"{_T}transformer_minimax_h3",
        "MiniMaxH3Attention",
        {"hidden_size": 24, "heads": H, "dim_head": D},
        minimax,
        "half, leading elements",
        norms=True,
    ),
    "minimax-music": Case(
        f"{_T}transformer_minimax_music3",
        "MiniMaxMusic3Transformer1DModel",
        MUSIC,
        music,
        "half, leading elements",
    ),
    "stable-audio-3": Case(
        f"{_T}transformer_stable_audio3",
        "StableAudio3SelfAttention",
        {"dim": H * D, "dim_heads": D},
        layer("rope", torch.cat([angles(S, 4)] * 2, -1)),
        "half, in float32, leading elements, by angles",
    ),
    "anima": Case(
        "condition_embedders.condition_embedder_anima",
        "AnimaTextConditionerAttention",
        {
            "query_dim": H * D,
            "context_dim": H * D,
            "num_attention_heads": H,
            "attention_head_dim": D,
        },
        anima,
        "half, one tensor",
    ),
    "allegro": Case(
        f"{_T}transformer_allegro",
        "AllegroTransformer3DModel",
        ALLEGRO,
        allegro,
        "half, in float32, blocks, rows by positions",
    ),
}
