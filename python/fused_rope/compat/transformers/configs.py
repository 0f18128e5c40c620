"""What `RotaryEmbedding.from_config` makes of every config of the installed transformers.

Each rotary module of transformers is built from its config, and so is ours; a row says whether both
rotate alike. The module's own frequencies are compared, and random queries and keys that the
model's own function rotates by the module's tables.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...embedding import RotaryEmbedding

__all__ = [
    "Row",
    "built",
    "frequencies_differ",
    "layer_types",
    "page",
    "pairs",
    "rope_of",
    "rows",
    "rows_of",
]

_TOKENS = 7
_POSITIONS = 50
_PLACE: dict[str, Any] = {"max_seq_len": _POSITIONS, "device": "cpu"}
_CLASS = re.compile(r"^class (\w*(?:Rotary|RoPE|Rope)\w*)\(", re.MULTILINE)

_PAGE = """\
# Configs that `RotaryEmbedding.from_config` reads

`RotaryEmbedding.from_config(config)` gives the rotation of the model that a Hugging Face config
describes, or raises a ValueError that says what it does not know. This page is made by
`python -m fused_rope.compat.transformers.configs`; it compares, for the default config of every
rotary module of transformers {version}, frequencies, attention factor, rotary_dim, axes and pairing
with the model's own. **{alike} of {all} rotate alike**; the others raise.

* *function*: the model's own rotary function, with the tables of its own module, and ours agree on
  random queries and keys. *scores*: the model permutes the elements of queries and keys, so their
  products are compared. *frequencies*: the model's function takes other arguments, so its module's
  frequencies and attention factor are compared.
* The pairing is that of the config's `model_type`. Of another model_type, as of remote code, it is
  not known: pass `interleaved=`. Keys of the rotary parameters that no model of the rope_type reads
  are refused, since they may change numbers.
* A `partial_rotary_factor` that a model's code does not read is refused.
* Multi-head latent attention (DeepSeek): head_dim is the part that rotates, qk_rope_head_dim.
* PhiMoE with a short_mscale that differs from long_mscale is refused. With transformers 5 its
  long_factor is never used, in the model as here.
* HunYuan's `alpha` scales the base for all lengths up to max_position_embeddings. Beyond it
  transformers switches to dynamic scaling without alpha, which is not followed.
* Layers without rotation: `layer_type` of such a layer is refused where the config's layer types
  tell (Cohere 2, AFMoE); lists of layers (`no_rope_layers`) are the caller's.

| module | model_type | layer type | rotary_dim of head_dim | pairing | axes | compared by |
| --- | --- | --- | --- | --- | --- | --- |
{table}
"""


@dataclass(frozen=True)
class Row:
    """One rotary module with one config and layer type.

    Attributes:
        module: its class, by the name of its family.
        model_type: of the config.
        layer_type: None where one embedding serves all layers.
        rope: ours, None where from_config raises.
        error: what it raises.
        compared: "function", "scores" or "frequencies"; "" where it raises.
        difference: the largest difference of what was compared, relative to its largest value.
    """

    module: str
    model_type: str
    layer_type: str | None
    rope: RotaryEmbedding | None
    error: str
    compared: str
    difference: float


def pairs() -> Iterator[tuple[ModuleType, type[torch.nn.Module], type[Any]]]:
    """Every rotary module of the installed transformers with every config that builds it."""
    models = Path(str(import_module("transformers").__file__)).parent / "models"
    for file in sorted(models.glob("*/modeling_*.py")):
        names = _CLASS.findall(file.read_text())
        names = [name for name in names if not name.endswith("Attention")]
        if not names or re.match("modeling_(tf|flax)_", file.name):
            continue
        module = import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for name in names:
            rotary = getattr(module, name)
            parameters = inspect.signature(rotary.__init__).parameters
            if "config" in parameters:
                for config in _configs(module, file.parent, name):
                    yield module, rotary, config


def _configs(module: ModuleType, folder: Path, name: str) -> list[type[Any]]:
    """The config classes of the family that hold what the module reads."""
    found = []
    for file in sorted(folder.glob("configuration_*.py")):
        configuration = import_module(f"transformers.models.{folder.name}.{file.stem}")
        for value in vars(configuration).values():
            defined = isinstance(value, type) and value.__module__ == configuration.__name__
            if defined and hasattr(value, "model_type") and _fits(name, value):
                found.append(value)
    return found


def _fits(name: str, config: type[Any]) -> bool:
    """Whether the model builds a module of this name from such a config, by their names."""
    if re.match("Sam3(?!ViT)", config.__name__):
        return False
    parts = ("Vision", "DiT", "Talker", "Thinker", "Text", "CodePredictor", "Code2Wav", "SaProt")
    of_name = {part for part in parts if part in name} - {"Text", "Thinker"}
    of_config = {part for part in parts if part in config.__name__} - {"Text"}
    if "OmniMoeRotary" in name:
        return "CodePredictor" in of_config
    if "Thinker" in name:
        return not of_config & {"Vision", "Talker", "CodePredictor", "Code2Wav"}
    if not of_name and re.match("Pixtral|MLCD|Llama4Vision", config.__name__):
        return True
    return of_name == of_config - {"Talker"} or of_name == of_config


def rows() -> list[Row]:
    """A row for every module, config and layer type."""
    found = []
    for module, rotary, config_class in pairs():
        for config, theirs in built(rotary, config_class):
            found.extend(rows_of(module, theirs, config))
    return found


def built(
    rotary: type[torch.nn.Module], config_class: type[Any]
) -> Iterator[tuple[Any, torch.nn.Module]]:
    """The default config, or the nearest one that the module takes, and the module; or nothing."""
    for options in _options(config_class.model_type):
        try:
            config = config_class(**options)
            theirs = rotary(config)
        except Exception:  # of another module, or an optional dependency is absent
            continue
        yield config, theirs
        return


def layer_types(theirs: torch.nn.Module) -> list[str | None]:
    """The layer types that a module has frequencies of; [None] where one embedding serves all."""
    names = [name for name, _ in theirs.named_buffers() if name.endswith("_inv_freq")]
    types = [name.removesuffix("_inv_freq") for name in names if "original" not in name]
    return [*types] or [None]


# Defaults that do not rotate, and sizes that the family's own code does not take.
_OPTIONS: dict[str, dict[str, Any]] = {
    "esm": {"position_embedding_type": "rotary"},
    "wav2vec2-conformer": {"position_embeddings_type": "rotary"},
    "wav2vec2-bert": {"position_embeddings_type": "rotary"},
    "seamless_m4t": {"position_embeddings_type": "rotary"},
    "granitemoehybrid": {"position_embedding_type": "rope"},
    "zamba2": {"use_mem_rope": True},
    "glm4_moe": {"head_dim": 128},
    "glm4v_moe_text": {"head_dim": 128},
    "Glm4vMoe_text": {"head_dim": 128},
    "glm4v_text": {"partial_rotary_factor": 0.5},
    "glm_image_text": {"partial_rotary_factor": 0.5},
    "qwen3_omni_moe_text": {"head_dim": 128},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 50000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
}


def _options(model_type: str) -> list[dict[str, Any]]:
    """Without a scaling, which is enough for transformers 5, and with what 4 may look for."""
    options = _OPTIONS.get(model_type, {})
    sections = [8, 12, 12] if model_type.lower().startswith("glm") else [24, 20, 20]
    scalings = ({"rope_type": "default"}, {"rope_type": "default", "mrope_section": sections})
    return [options, *({**options, "rope_scaling": scaling} for scaling in scalings)]


def rows_of(module: ModuleType, theirs: torch.nn.Module, config: Any) -> list[Row]:
    """A row for each layer type of a rotary module."""
    found = []
    for layer_type in layer_types(theirs):
        name = f"{module.__name__.split('.')[-2]}.{type(theirs).__name__}"
        row = Row(name, config.model_type, layer_type, None, "", "", 0.0)
        try:
            rope = rope_of(config, layer_type)
        except ValueError as error:
            found.append(replace(row, error=str(error)))
            continue
        by_frequencies = frequencies_differ(theirs, rope, layer_type)
        compared, by_function = _rotations_differ(module, theirs, config, rope, layer_type)
        differences = [d for d in (by_frequencies, by_function) if d is not None]
        found.append(
            replace(
                row, rope=rope, compared=compared, difference=max(differences, default=math.inf)
            )
        )
    return found


def rope_of(config: Any, layer_type: str | None) -> RotaryEmbedding:
    """Ours, for what the module of the config itself computes."""
    try:
        return RotaryEmbedding.from_config(config, layer_type=layer_type, **_PLACE)
    except ValueError as error:
        # transformers 4 builds the module of full attention from the config itself.
        if layer_type is None and "pass layer_type" in str(error):
            return RotaryEmbedding.from_config(config, layer_type="full_attention", **_PLACE)
        raise


def frequencies_differ(
    theirs: torch.nn.Module, rope: RotaryEmbedding, layer_type: str | None
) -> float | None:
    """The largest relative difference, None where the module holds them in another form."""
    prefix = f"{layer_type}_" if layer_type else ""
    held = getattr(theirs, f"{prefix}inv_freq", None)
    ours = rope._inv_freq
    if not isinstance(held, Tensor) or held.shape != ours.shape:
        return None
    scale = getattr(theirs, f"{prefix}attention_scaling", 1.0)
    by_scale = abs(float(rope.cos[0, 0]) / scale - 1)
    held = held.double()
    return max(by_scale, float(((held - ours).abs() / ours.abs().clamp(min=1e-30)).max()))


def _rotations_differ(
    module: ModuleType,
    theirs: torch.nn.Module,
    config: Any,
    rope: RotaryEmbedding,
    layer_type: str | None,
) -> tuple[str, float | None]:
    """How random queries and keys could be compared, and their largest difference."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 3, _TOKENS, rope.head_dim, generator=generator)
    k = torch.randn(1, 3, _TOKENS, rope.head_dim, generator=generator)
    axes = 1 + max(rope.axes or (0,))
    positions = torch.randint(0, _POSITIONS, (axes, _TOKENS), generator=generator)
    got = rope(q, k, positions=positions[:, None] if axes > 1 else positions[0])
    for function in _functions(module, theirs, config):
        want = _try(module, function, theirs, config, rope, layer_type, q, k, positions)
        if want is None:
            continue
        R = min(want[0].shape[-1], rope.head_dim)
        ours = tuple(x[..., :R] for x in got)
        if "interleave" in function.__name__ or "DiT" in type(theirs).__name__:
            scores = [(x[0] @ x[1].mT,) for x in (ours, want)]
            return "scores", _difference(*scores)
        return "function", _difference(ours, want)
    return "frequencies", None


def _difference(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True))


def _functions(
    module: ModuleType, theirs: torch.nn.Module, config: Any
) -> list[Callable[..., Any]]:
    """The rotary functions of the family, the likeliest first."""
    planar = bool(re.search("Vision|MLCD|Pixtral|Sam3ViT", type(theirs).__name__))
    switched_off = not getattr(config, "rope_interleave", True)
    found = []
    for name, value in vars(module).items():
        if not re.match("apply_(rotary|multi)", name) or not inspect.isfunction(value):
            continue
        of_plane = bool(re.search("vision|2d|dimensional", name))
        if switched_off and "interleave" in name:
            continue
        if planar == of_plane or (planar and re.search("Pixtral", type(theirs).__name__)):
            found.append(value)
    if not found and planar:
        return [f for name, f in vars(module).items() if name == "apply_rotary_pos_emb"]
    return sorted(found, key=lambda f: not re.search("interleave|multimodal", f.__name__))


def _try(
    module: ModuleType,
    function: Callable[..., Any],
    theirs: torch.nn.Module,
    config: Any,
    rope: RotaryEmbedding,
    layer_type: str | None,
    q: Tensor,
    k: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """The model's own rotation of q and k, None where its function takes something else."""
    names = list(inspect.signature(function).parameters)
    planar = (
        bool(re.search("vision|2d|dimensional", function.__name__))
        or "Pixtral" in type(theirs).__name__
    )
    if planar:
        ids = positions.T if positions.shape[0] > 1 else positions[0][:, None].repeat(1, 2)
        if "Gemma4" in type(theirs).__name__:
            ids = ids[None]
        if type(theirs).__name__ == "PixtralRotaryEmbedding":  # transformers 4 numbers patches
            ids = ids[:, 0] * (config.image_size // config.patch_size) + ids[:, 1]
    else:
        ids = positions[:, None] if positions.shape[0] > 1 else positions
        if "mrope_section" in names and positions.shape[0] == 1:
            ids = positions[None].repeat(3, 1, 1)
    extra = {} if layer_type is None else {"layer_type": layer_type}
    options: dict[str, Any] = {}
    if "mrope_section" in names:
        options["mrope_section"] = [(rope.axes or ()).count(axis) for axis in range(3)]
    if "DiT" in type(theirs).__name__ and hasattr(module, "deinterleave_head_dim"):
        q, k = (module.deinterleave_head_dim(x) for x in (q, k))
    if "Pixtral" in type(theirs).__name__:
        options["unsqueeze_dim"] = 0
    widths = (rope.head_dim, rope.rotary_dim)
    try:
        if "seq_len" in inspect.signature(theirs.forward).parameters:
            tables = theirs(q, seq_len=_POSITIONS)
            options["position_ids"] = ids
        else:
            tables = theirs(q, ids, **extra)
    except Exception:
        return None
    for width in dict.fromkeys(widths):
        try:
            return _call(function, names, tables, q[..., :width], k[..., :width], ids, options)
        except Exception:
            continue
    return None


def _call(
    function: Callable[..., Any],
    names: list[str],
    tables: Any,
    q: Tensor,
    k: Tensor,
    ids: Tensor,
    extra: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    if isinstance(tables, Tensor):  # complex
        if "llama4" in function.__module__:
            a, b = function(q.transpose(1, 2), k.transpose(1, 2), tables)
            return a.transpose(1, 2), b.transpose(1, 2)
        a, b = function(q, k, tables)
        return a, b
    cos, sin = tables
    if function.__name__ == "apply_multidimensional_rope":
        a, b = (function(x.transpose(1, 2), cos, sin, ids) for x in (q, k))
        return a.transpose(1, 2), b.transpose(1, 2)
    if "vision" in function.__name__:
        tokens_first = [x[0].transpose(0, 1) for x in (q, k)]
        if "minimax_m3" in function.__module__:
            tokens_first = [x[None] for x in tokens_first]
        a, b = (
            x.reshape(x.shape[-3:]).transpose(0, 1)[None] for x in function(*tokens_first, cos, sin)
        )
        return a, b
    if names[:2] in (["q", "k"], ["query", "key"], ["queries", "keys"]):
        a, b = function(q, k, cos, sin, **extra)
        return a, b
    a, b = (function(x, cos, sin) for x in (q, k))
    return a, b


def page(rows: list[Row]) -> str:
    """docs/from_config.md."""
    alike = [row for row in rows if row.rope is not None]
    return _PAGE.format(
        version=import_module("transformers").__version__,
        alike=len(alike),
        all=len(rows),
        table="\n".join(_line(row) for row in rows),
    )


def _line(row: Row) -> str:
    start = f"| {row.module} | {row.model_type} | {row.layer_type or ''} |"
    if row.rope is None:
        return f"{start} ValueError: {row.error.removeprefix('from_config: ')} | | | |"
    rope = row.rope
    pairing = "interleaved" if rope.interleaved else "half"
    pairing += f", {rope.blocks} blocks" if rope.blocks > 1 else ""
    width = f"{rope.rotary_dim} of {rope.head_dim}"
    width += f", from {rope.rotary_offset}" if rope.rotary_offset else ""
    axes = "" if rope.axes is None else str(1 + max(rope.axes))
    return f"{start} {width} | {pairing} | {axes} | {row.compared} |"


if __name__ == "__main__":
    sys.stdout.write(page(rows()))
