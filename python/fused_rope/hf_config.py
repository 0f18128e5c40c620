"""The arguments of `RotaryEmbedding` that a Hugging Face config describes.

A config states base, scaling and sizes. The pairing, the axis of each pair and the keys that are
ignored are decided by the model's code. `_FAMILIES` states them for every `model_type` with a
rotary embedding in transformers 4.57 and 5.17; docs/from_config.md compares the results with the
models' own modules. What neither the config nor `_FAMILIES` states is a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .frequencies import mrope_axes

__all__ = ["buffer_order", "config_arguments"]

_MAX_DEFAULT_ROWS = 2048
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": ("factor",),
}
# Read for every rope_type, or by attention and not by the rotation.
_COMMON_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "llama_4_scaling_beta",
)
_BASE_NAMES = (
    "rope_theta",
    "global_rope_theta",
    "rotary_emb_base",
    "rotary_embedding_base",
    "attn_config.rope_theta",
)
_HEAD_DIM_NAMES = (
    "head_dim",
    "hidden_size / num_attention_heads",
    "hidden_size / num_heads",
    "n_embd / n_head",
    "d_model / n_heads",
)
_ERNIE = "height and width alternating, then time"
_PLANES = ("plane", "blocks", "plane, frequencies alternating", "plane, columns first, alternating")
_DIRECTLY = "build RotaryEmbedding(...) directly"


def config_arguments(
    config: Any,
    layer_type: str | None = None,
    *,
    interleaved: bool | None = None,
    max_seq_len: int | None = None,
) -> dict[str, Any]:
    """The keyword arguments of `fused_rope.RotaryEmbedding` that a Hugging Face config describes.

    Args:
        config: a config of transformers 4.57 or 5, or its `to_dict()`.
        layer_type: one of the config's layer types, if their rotary parameters differ.
        interleaved: the pairing; None for that of the config's model_type.
        max_seq_len: rows of the table; None for the config's length, but at most 2048.

    Raises:
        ValueError: the config lacks an entry, or has an unknown one.
        TypeError: config is the name of a model.
    """
    if isinstance(config, str):
        raise TypeError(
            f"from_config: expected a config of transformers, got the str {config!r}: load it "
            "first, such as by AutoConfig.from_pretrained"
        )
    reader = _Reader(config)
    family = _find_family(reader, interleaved)
    stated = _rope_parameters(reader, family, layer_type)
    reader = reader.of_layer_type(layer_type)
    kind = _kind(reader, family, stated)
    _refuse_unknown_keys(reader, family, kind, stated)

    D = _head_dim(reader, family)
    R = _rotary_dim(reader, family, kind, stated, D)
    base = _base(reader, family, stated)
    scaling = _scaling(reader, kind, stated)
    if "alpha" in stated:
        base, scaling = _alpha_scaled_base(reader, stated, base, D), {}
    elif family.mscale and kind == "longrope":
        scaling = _phimoe_scaling(reader, stated, scaling)
    axes, layout = _axes(reader, family, kind, stated, R)
    length = reader.number("max_position_embeddings") or _MAX_DEFAULT_ROWS
    rows = int(min(length, _MAX_DEFAULT_ROWS)) if max_seq_len is None else max_seq_len
    return {
        "head_dim": D,
        "rotary_dim": R,
        "rotary_offset": D - R if family.trailing else 0,
        "max_seq_len": rows,
        "base": base,
        "scaling": {**scaling, **layout.get("scaling", {})} or None,
        "interleaved": _pairing(reader, family) if interleaved is None else interleaved,
        "blocks": layout.get("blocks", 1),
        "axes": axes,
    }


def buffer_order(config: Any) -> tuple[int, ...] | None:
    """The pair of each frequency in the buffer of the model's own module; None if in order.

    Ernie 4.5 VL's buffer has the frequencies of height, then of width, then of time, while height
    and width alternate among the pairs.
    """
    reader = _Reader(config)
    family = _FAMILIES.get(reader.model_type)
    if family is None or family.axes != _ERNIE:
        return None
    sections = _sections(reader, family, _rope_parameters(reader, family, None))
    plane = sections[0] + sections[1]
    return (*range(0, plane, 2), *range(1, plane, 2), *range(plane, sum(sections)))


@dataclass(frozen=True)
class _Family:
    """Properties of a model_type that its code decides, not its config.

    Attributes:
        interleaved: pairs are adjacent elements.
        switch: the config's attribute that can disable `interleaved`.
        partial: the fraction of D that rotates if the config states none; None if the model reads
            no partial_rotary_factor.
        width: attributes that hold D, read before `_HEAD_DIM_NAMES`.
        whole_width: D is only the rotated part, which the model splits off before it rotates.
        trailing: the last R elements of a head rotate.
        base: the base if the config states none.
        local_base: transformers 4's attribute with the base of sliding layers, which have no
            scaling.
        states_rotary_dim: the config's rotary_dim is R.
        axes: the name of the order of axes; see `_axes`. "" for one axis.
        sections: pairs of each axis if the config states none.
        needs: an attribute and the value that it has if the model rotates.
        unrotated: layer types that do not rotate.
        ignored: keys of the scaling that the model does not read.
        unscaled: the versions whose model reads no scaling, "4" or "4 and 5".
        mscale: short_mscale and long_mscale scale longrope.
        refused: the reason if no RotaryEmbedding computes its rotation.
    """

    interleaved: bool = False
    switch: str = ""
    partial: float | None = None
    width: tuple[str, ...] = ()
    whole_width: bool = False
    trailing: bool = False
    base: float | None = None
    local_base: str = ""
    states_rotary_dim: bool = False
    axes: str = ""
    sections: tuple[int, ...] = ()
    needs: tuple[str, Any] | None = None
    unrotated: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    unscaled: str = ""
    mscale: bool = False
    refused: str = ""


def _named(names: str, family: _Family) -> dict[str, _Family]:
    return dict.fromkeys(names.split(), family)


_HALF = _Family()
_ANY = _Family(partial=1.0, states_rotary_dim=True)  # an unknown model_type with `interleaved`
_PART = _Family(partial=1.0)
_INTERLEAVED = _Family(interleaved=True)
_LATENT = _Family(interleaved=True, width=("qk_rope_head_dim",), whole_width=True)
_CONTIGUOUS = _Family(axes="sections", sections=(16, 24, 24))
_THIRDS = _Family(axes="sections of thirds", sections=(24, 20, 20))
_GLM_IMAGES = _Family(partial=1.0, axes="sections", sections=(8, 12, 12))
_PLANE = _Family(axes="plane", base=10000.0)
_CONFORMER = _Family(needs=("position_embeddings_type", "rotary"), unscaled="4 and 5")
_HUNYUAN = _Family(ignored=("beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
_NOT_POSITIONS = "its angles follow from coordinates of patches, not from integer positions"
_MEMORY = "its memory attention rotates a plane of features by a table of fixed size"
_LOCAL_ONLY = ("full_attention",)

# Verified against the models' own modules by tests/python/test_transformers_configs.py.
_FAMILIES: dict[str, _Family] = {
    **_named(
        """
        apertus arcee aria_text bitnet chameleon csm csm_depth_decoder_model cwm
        deepseek_ocr2_text deepseek_ocr2_encoder dia_decoder dia_encoder diffllama doge dots1
        emu3_text_model esmc eurobert evolla EvollaModel exaone_moe falcon_h1 flex_olmo gemma
        gemma2 gpt_oss granite granite4_vision_text granite_swa granitemoe
        granitemoe_swa granitemoeshared higgs_audio_v2 hrm_text hy_v3 hyperclovax jais2
        jina_embeddings_v3 kyutai_speech_to_text lasr_encoder lfm2 lfm2_moe llama mellum
        mimi minimax ministral ministral3 mistral mixtral mllama_text_model
        modernbert-decoder moshi muse_glimmer_text muse_glimmer_assistant neucodec nomic_bert
        olmo olmo2 olmo_hybrid olmoe qwen2 qwen2_moe qwen3 qwen3_moe
        qwen3_omni_moe_talker_code_predictor seed_oss smollm3 starcoder2 t5_gemma_module
        t5gemma2_text t5gemma2_decoder timesfm2_5 vaultgemma voxtral_realtime_encoder
        voxtral_realtime_text xcodec2
        """,
        _HALF,
    ),
    "idefics": _Family(base=10000.0, unscaled="4"),
    "dbrx": _Family(unscaled="4"),
    "jetmoe": _Family(width=("kv_channels",)),
    **_named("gemma3_text gemma3n_text", _Family(local_base="rope_local_base_freq")),
    "modernbert": _Family(local_base="local_rope_theta"),
    "olmo3": _Family(local_base="rope_theta"),
    "afmoe": _Family(unrotated=_LOCAL_ONLY),
    "exaone4": _HALF,
    "falcon": _Family(needs=("alibi", False)),
    "granitemoehybrid": _Family(needs=("position_embedding_type", "rope")),
    "zamba2": _Family(needs=("use_mem_rope", True), width=("attention_head_dim",)),
    "phimoe": _Family(mscale=True),
    **_named("hunyuan_v1_dense hunyuan_v1_moe", _HUNYUAN),
    "esm": _Family(base=10000.0, needs=("position_embedding_type", "rotary"), unscaled="4 and 5"),
    **_named("wav2vec2-conformer wav2vec2-bert", _CONFORMER),
    "seamless_m4t": replace(_CONFORMER, width=("hidden_size / speech_encoder_attention_heads",)),
    # Half pairing of the first part of a head.
    **_named("bamba persimmon phi glm4_moe", _Family(partial=0.5)),
    "nemotron": _Family(partial=0.5, unscaled="4"),
    "recurrent_gemma": _Family(partial=0.5, unscaled="4 and 5"),
    **_named("gpt_neox stablelm qwen3_next", _Family(partial=0.25)),
    **_named(
        """
        gpt_neox_japanese glmasr_encoder laguna minimax_m2 minimax_m3_vl_text phi3 phi4_multimodal
        solar_open zaya gemma4_text gemma4_unified_text diffusion_gemma_text step3p5
        """,
        _PART,
    ),
    "mimo_v2_flash": _Family(partial=0.334),
    # Interleaved pairs.
    **_named(
        "blt_global_transformer blt_local_encoder blt_local_decoder blt_patcher", _INTERLEAVED
    ),
    **_named("cohere ernie4_5 ernie4_5_moe helium llama4_text openai_privacy_filter", _INTERLEAVED),
    **_named("pe_audio_encoder pe_video_encoder pe_audio_video_encoder", _INTERLEAVED),
    "qwen2_5_omni_dit": _INTERLEAVED,
    "cohere2": _Family(interleaved=True, unrotated=_LOCAL_ONLY),
    "cohere2_moe": _INTERLEAVED,
    "roformer": _Family(interleaved=True, base=10000.0, unscaled="4 and 5"),
    **_named("glm glm4", _Family(interleaved=True, partial=0.5)),
    "moonshine": _Family(
        interleaved=True, partial=0.9, width=("hidden_size / encoder_num_attention_heads",)
    ),
    "moonshine_streaming": _Family(interleaved=True, partial=0.8),
    **_named(
        "gptj codegen",
        _Family(interleaved=True, base=10000.0, states_rotary_dim=True, unscaled="4 and 5"),
    ),
    # Multi-head latent attention.
    **_named("deepseek_v2 deepseek_v32 axk2 glm_moe_dsa longcat_flash", _LATENT),
    **_named(
        "deepseek_v3 axk1 glm4_moe_lite mistral4 youtu",
        replace(_LATENT, switch="rope_interleave"),
    ),
    **_named("hy_v4 minicpm3", replace(_LATENT, interleaved=False)),
    "deepseek_v4": _Family(interleaved=True, partial=0.125, trailing=True),
    # Text with images: M-RoPE.
    **_named("qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text paddleocr_vl_text", _CONTIGUOUS),
    "qwen2_5_omni_talker": _CONTIGUOUS,
    **_named("glm4v_text glm_ocr_text", replace(_GLM_IMAGES, interleaved=True)),
    **_named("glm4v_moe_text Glm4vMoe_text", replace(_GLM_IMAGES, partial=0.5)),
    "glm_image_text": _GLM_IMAGES,
    **_named("qwen3_vl_text qwen3_vl_moe_text cosmos3_edge_text qwen3_omni_moe_text", _THIRDS),
    "qwen3_omni_moe_talker_text": _THIRDS,
    **_named(
        "qwen3_5_text qwen3_5_moe_text",
        replace(_THIRDS, partial=0.25, sections=(11, 11, 10)),
    ),
    "qwen4_exp_text": replace(_THIRDS, partial=1.0, sections=(11, 11, 10)),
    "ernie4_5_vl_moe_text": _Family(interleaved=True, axes=_ERNIE, sections=(22, 22, 20)),
    "cohere_compass_text": _Family(axes="height, then width, then time", sections=(22, 22, 20)),
    "neomme": _Family(partial=1.0, axes="alternating"),
    # Images: the axes are rows and columns.
    **_named(
        """
        cohere_compass_vision ernie4_5_vl_moe_vision exaone4_5_vision glm4v_vision glm4v_moe_vision
        glm5_next_vision glm_ocr_vision minimax_m3_vl_vision mlcd_vision_model muse_glimmer_vision
        paddleocr_vl_vision qwen2_5_omni_vision_encoder qwen2_5_vl_vision qwen3_5_vision
        qwen3_5_moe_vision qwen3_omni_moe_vision_encoder qwen3_vl_vision qwen3_vl_moe_vision
        qwen4_exp_vision video_llama_3_vision step3p5_vision
        """,
        _PLANE,
    ),
    "qwen2_vl_vision": replace(_PLANE, width=("embed_dim / num_heads",)),
    "sam3_vit_model": replace(_PLANE, interleaved=True),
    "pixtral": _Family(axes="plane, frequencies alternating", base=10000.0),
    "kimi_k25_vision": _Family(axes="plane, columns first, alternating", base=10000.0),
    "gemma4_vision": _Family(axes="blocks", base=100.0),
    # Rotations that RotaryEmbedding does not compute.
    **_named("dinov3_vit eomt_dinov3 sapiens2 efficientloftr", _Family(refused=_NOT_POSITIONS)),
    **_named("sam2_video edgetam_video sam3_tracker_video", _Family(refused=_MEMORY)),
    "llama4_vision_model": _Family(refused="the axes of its pairs alternate and count from 1"),
    "musicflamingo": _Family(refused="its angles are products of times, not of positions"),
    "vjepa2": _Family(refused="both elements of its pairs rotate by angles of their own"),
    "clvp_encoder": _Family(refused="it also rotates values, with a rotary_dim of its own"),
    "nanochat": _Family(refused="its rotation is the inverse (inverse=True of rotate_qk)"),
    "hunyuan_vl_text": _Family(refused="the elements of its pairs may follow different axes"),
}


def _find_family(reader: _Reader, interleaved: bool | None) -> _Family:
    parts = reader.sub_configs()
    model_type = reader.model_type
    if model_type not in _FAMILIES and not any(name.endswith("text_config") for name in parts):
        # In transformers 4 vision configs, and in old files flat text configs, have the model_type
        # of the whole model.
        model_type += "_vision" if reader.get("vocab_size") is None else "_text"
    family = _FAMILIES.get(model_type)
    if family is None and interleaved is not None and reader.has_rotary_parameters():
        return _ANY
    if family is None and parts:
        listed = " or ".join(f"config.{name}" for name in parts)
        raise reader.error(f"contains several models: pass the one that rotates, {listed}")
    if family is None and not reader.has_rotary_parameters():
        raise reader.error(
            "has no rotary parameters (rope_parameters, rope_theta): if the model rotates "
            f"nevertheless, {_DIRECTLY}"
        )
    if family is None:
        raise reader.error(
            "has an unknown model_type, from which the pairing would follow: pass "
            "interleaved=False (halves, as in Llama) or interleaved=True (as in GPT-J)"
        )
    if family.refused:
        raise reader.error(
            f"has no RotaryEmbedding, since {family.refused}: pass its module's tables to rotate_qk"
        )
    if family.needs is not None:
        name, value = family.needs
        if reader.get(name) not in (None, value) or (
            reader.get(name) is None and value is not False
        ):
            raise reader.error(f"rotates only with {name}={value!r}, got {reader.get(name)!r}")
    return family


class _Reader:
    """Reads a config or its dict. A missing entry is None, an invalid one a ValueError."""

    def __init__(self, source: Any, name: str | None = None) -> None:
        kind = "the dict" if isinstance(source, Mapping) else type(source).__name__
        self._source = source
        self._name = name or kind
        self.model_type = str(self.get("model_type") or "")
        if name is None:
            self._name = f"{kind} (model_type {self.model_type!r})"

    def error(self, text: str) -> ValueError:
        return ValueError(f"from_config: {self._name} {text}")

    def get(self, name: str) -> Any:
        head, _, rest = name.partition(".")
        if rest:
            inner = self.get(head)
            return None if inner is None else _Reader(inner, self._name).get(rest)
        if isinstance(self._source, Mapping):
            return self._source.get(name)
        try:
            return getattr(self._source, name, None)
        except Exception as error:  # such as an attribute that differs from layer to layer
            raise self.error(f"has no single {name}, pass layer_type: {error}") from error

    def number(self, *names: str) -> float | None:
        """The first of these that the config has; "a / b" is the integer quotient of two."""
        for name in names:
            parts = [self.checked(part, self.get(part)) for part in name.split(" / ")]
            if None not in parts:
                values = [part for part in parts if part is not None]
                return values[0] if len(values) == 1 else values[0] // values[1]
        return None

    def checked(self, name: str, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise self.error(f"has {name}={value!r}, expected a number > 0")
        return value

    def has_rotary_parameters(self) -> bool:
        names = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_emb_base")
        return any(self.get(name) is not None for name in names)

    def sub_configs(self) -> tuple[str, ...]:
        """Names of the configs in this one, text first."""
        entries = (
            self._source
            if isinstance(self._source, Mapping)
            else getattr(self._source, "__dict__", {})
        )
        found = []
        for name, value in entries.items():
            inner = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
            model_type = inner.get("model_type") or getattr(value, "model_type", None)
            if str(name).endswith("_config") and model_type:
                found.append(str(name))
        return tuple(sorted(found, key=lambda name: ("text" not in name, name)))

    def of_layer_type(self, layer_type: str | None) -> _Reader:
        """A reader of that layer type, if more than its rotary parameters differs (Gemma 4)."""
        if layer_type is None:
            return self
        types = list(self.get("layer_types") or ())
        if isinstance(self._source, Mapping):
            for layer, entries in (self.get("per_layer_config") or {}).items():
                if int(layer) < len(types) and types[int(layer)] == layer_type:
                    return _Reader({**self._source, **entries}, self._name)
            return self
        try:
            return _Reader(self._source.per_layer_config[layer_type], self._name)
        except (AttributeError, KeyError, TypeError, ValueError):
            return self


def _rope_parameters(reader: _Reader, family: _Family, layer_type: str | None) -> dict[str, Any]:
    """The rotary parameters of one layer type, with the names of transformers 5."""
    known = reader.get("layer_types") or ()
    stated = reader.get("rope_parameters")
    if not stated:
        stated = _version_4_parameters(reader, family)
    if not isinstance(stated, Mapping):
        raise reader.error(f"has rope_parameters={stated!r}, expected a mapping")
    by_layer = {key: value for key, value in stated.items() if isinstance(value, Mapping)}
    if by_layer:
        known = {**by_layer, **{key: None for key in stated if stated[key] is None}}
        first = next(iter(by_layer.values()))
        if layer_type is None and any(
            value != by_layer[next(iter(by_layer))] for value in known.values()
        ):
            names = ", ".join(map(repr, known))
            raise reader.error(f"has several rotary embeddings: pass layer_type, one of {names}")
        stated = known.get(layer_type) if layer_type in known else first
    if layer_type is not None:
        if known and layer_type not in known:
            names = ", ".join(sorted(map(repr, set(known))))
            raise reader.error(f"has layers of type {names}, got layer_type={layer_type!r}")
        if stated is None or layer_type in family.unrotated:
            raise reader.error(f"does not rotate in layers of type {layer_type!r}")
    # transformers 5 reads `truncate` only outside the layer types.
    dropped = ("truncate",) if by_layer and reader.get("rope_parameters") else ()
    return {k: v for k, v in stated.items() if v is not None and k not in dropped}


def _version_4_parameters(reader: _Reader, family: _Family) -> dict[str, Any]:
    """The same of transformers 4, which has the base and longrope's length outside the scaling."""
    scaling = reader.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise reader.error(f"has rope_scaling={scaling!r}, expected a mapping")
    scaling = dict(scaling)
    if scaling.get("rope_type", scaling.get("type")) in ("longrope", "su"):
        length = reader.number("max_position_embeddings")
        trained = reader.number("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = trained or length
        if trained and length:
            scaling["factor"] = length / trained
    if not family.local_base:
        return scaling
    base = reader.number(*_BASE_NAMES)
    local = reader.number(family.local_base) or base
    return {
        "full_attention": {**scaling, "rope_theta": base},
        "sliding_attention": {"rope_theta": local},
    }


def _kind(reader: _Reader, family: _Family, stated: Mapping[str, Any]) -> str:
    """The rope_type, by its current name."""
    kind = stated.get("rope_type", stated.get("type", "default"))
    kind = {"mrope": "default", "su": "longrope"}.get(str(kind), str(kind))
    planar = family.axes in _PLANES
    known = ("default", "axial") if planar else tuple(_KEYS)
    if family.mscale:
        known = ("default", "longrope")
    version = "5" if reader.get("rope_parameters") else "4"
    if version in family.unscaled or family.axes == _ERNIE:
        known = ("default",)
    if kind not in known:
        raise reader.error(
            f"has rope_type {kind!r}, expected one of {', '.join(known)} for its model: {_DIRECTLY}"
        )
    return "default" if planar else kind


def _refuse_unknown_keys(
    reader: _Reader, family: _Family, kind: str, stated: Mapping[str, Any]
) -> None:
    """Raises for keys that no known model of this kind reads: they may change its numbers."""
    read = {*_KEYS[kind], *_COMMON_KEYS, *family.ignored}
    if family.axes or family is _ANY:
        read |= {"mrope_section", "mrope_interleaved", "interleaved"}
    if family.mscale and kind == "longrope":
        read |= {"short_mscale", "long_mscale"}
    if family.ignored and kind == "dynamic":
        read.add("alpha")
    unknown = sorted(set(stated) - read)
    if unknown:
        raise reader.error(
            f"has {', '.join(unknown)} in its rotary parameters, which rope_type {kind!r} of its "
            f"model is not known to read: remove it if it changes no number, or {_DIRECTLY}"
        )


def _pairing(reader: _Reader, family: _Family) -> bool:
    switch = reader.get(family.switch) if family.switch else None
    return family.interleaved if switch is None else bool(switch)


def _head_dim(reader: _Reader, family: _Family) -> int:
    D = reader.number(*family.width, *_HEAD_DIM_NAMES)
    if D is None or int(D) != D:
        raise reader.error(
            f"has no head_dim, and no hidden_size and num_attention_heads: {_DIRECTLY}"
        )
    return int(D)


def _rotary_dim(
    reader: _Reader, family: _Family, kind: str, stated: Mapping[str, Any], D: int
) -> int:
    rotary_dim = reader.number("rotary_dim") if family.states_rotary_dim else None
    part = reader.checked("partial_rotary_factor", stated.get("partial_rotary_factor"))
    part = part or reader.number("partial_rotary_factor", "rotary_pct") or family.partial
    if rotary_dim is not None:
        R, said = int(rotary_dim), f"rotary_dim={rotary_dim}"
    elif family.whole_width or kind == "proportional" or part in (None, 1.0):
        R, said = D, f"head_dim {D}"
    else:
        R, said = int(D * (part or 1.0)), f"partial_rotary_factor={part} of head_dim {D}"
        if family.partial is None:
            raise reader.error(f"has partial_rotary_factor={part}, which its model does not read")
    pairs = 4 if family.axes in _PLANES else 2
    if R % pairs or not 0 < R <= D:
        wrong = f"{said} is odd" if R % 2 and R == D else f"{said} gives rotary_dim {R}"
        raise reader.error(f"has no whole pairs: {wrong}: expected a multiple of {pairs} up to {D}")
    return R


def _base(reader: _Reader, family: _Family, stated: Mapping[str, Any]) -> float:
    base = reader.checked("rope_theta", stated.get("rope_theta")) or reader.number(*_BASE_NAMES)
    if base is None and family.base is None:
        raise reader.error(f"has no rope_theta: {_DIRECTLY}")
    return float(base or family.base or 0.0)


def _scaling(reader: _Reader, kind: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `frequencies`; lengths that the scaling does not state are the config's."""
    if kind == "default":
        return {}
    scaling = {key: stated[key] for key in _KEYS[kind] if key in stated}
    for key, value in scaling.items():
        if key.endswith("_factor") and isinstance(value, Sequence):
            for number in value:
                reader.checked(key, number)
        elif key != "truncate" and not (key.startswith("mscale") and value == 0):
            reader.checked(key, value)
    if kind in ("dynamic", "yarn", "longrope", "llama3"):
        length = reader.number("max_position_embeddings")
        trained = reader.checked("length", stated.get("original_max_position_embeddings"))
        trained = length if kind == "dynamic" else trained or length
        if trained is None:
            raise reader.error(f"has rope_type {kind!r} and no max_position_embeddings")
        scaling["original_max_position_embeddings"] = trained
        if kind in ("yarn", "longrope") and length:
            scaling.setdefault("factor", length / trained)
    if kind == "proportional":
        scaling["partial_rotary_factor"] = stated.get("partial_rotary_factor", 1.0)
    return {"rope_type": kind, **scaling}


def _alpha_scaled_base(reader: _Reader, stated: Mapping[str, Any], base: float, D: int) -> float:
    """HunYuan's dynamic scaling by alpha, which does not depend on the length."""
    alpha = reader.checked("alpha", stated["alpha"]) or 1.0
    return float(base * alpha ** (D / max(D - 2, 1)))


def _phimoe_scaling(
    reader: _Reader, stated: Mapping[str, Any], scaling: dict[str, Any]
) -> dict[str, Any]:
    """PhiMoE's attention factors; transformers 5 never uses its long frequencies."""
    short, long = (reader.checked(k, stated.get(k)) for k in ("short_mscale", "long_mscale"))
    if short is None or short != long:
        raise reader.error(
            f"has short_mscale={short} and long_mscale={long}, expected equal ones: one table has "
            "one factor"
        )
    scaling["attention_factor"] = short
    if reader.get("rope_parameters"):
        scaling["long_factor"] = scaling["short_factor"]
    return scaling


def _sections(reader: _Reader, family: _Family, stated: Mapping[str, Any]) -> tuple[int, ...]:
    sections = stated.get("mrope_section", family.sections)
    if not isinstance(sections, Sequence) or any(type(n) is not int or n < 0 for n in sections):
        raise reader.error(f"has mrope_section={sections!r}, expected a list of ints >= 0")
    return tuple(sections)


def _axes(
    reader: _Reader, family: _Family, kind: str, stated: Mapping[str, Any], R: int
) -> tuple[tuple[int, ...] | None, dict[str, Any]]:
    """The axis of each pair, and further arguments of the constructor."""
    P = R // 2
    order = family.axes
    if family is _ANY and "mrope_section" in stated:
        order = "sections of thirds" if stated.get("mrope_interleaved") else "sections"
    if order == "":
        return None, {}
    halves = (0,) * (P // 2) + (1,) * (P // 2)
    if order == "plane":
        return halves, {"scaling": {"rope_type": "axial"}}
    if order == "blocks":
        return halves, {"blocks": 2}
    if order == "plane, frequencies alternating":
        return halves, {"scaling": {"pair_order": [*range(0, P, 2), *range(1, P, 2)]}}
    if order == "plane, columns first, alternating":
        pairs = [j // 2 for j in range(P)]
        return (1, 0) * (P // 2), {"scaling": {"rope_type": "axial", "pair_order": pairs}}
    if order == "alternating":
        return tuple(j % 2 for j in range(P)), {}

    sections = _sections(reader, family, stated)
    if order == "sections of thirds" and len(sections) == 3:
        # The first section has all pairs that the others leave.
        rest = max(P - sections[1] - sections[2], 0)
        return mrope_axes((rest, *sections[1:]), interleaved=True)[:P], {}
    if sum(sections) != P or (order != "sections" and len(sections) != 3):
        raise reader.error(f"has mrope_section={list(sections)}, expected sections of {P} pairs")
    if order == "sections":
        return tuple(axis % 3 for axis in mrope_axes(sections)), {}
    height, width, time = sections
    if order == "height, then width, then time":
        plane = height + width
        pairs = [*range(0, plane, 2), *range(1, plane, 2), *range(plane, P)]
        scaling = (
            {"pair_order": pairs}
            if "rope_type" not in stated or stated["rope_type"] == "default"
            else {}
        )
        return (1,) * height + (2,) * width + (0,) * time, {"scaling": scaling}
    if height != width:
        raise reader.error(f"has mrope_section={list(sections)}, expected as many rows as columns")
    return (1, 2) * height + (0,) * time, {}
