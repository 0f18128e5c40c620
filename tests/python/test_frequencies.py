"""Inverse frequencies: Hugging Face's numbers, papers' formulas, and no influence from outside."""

import math

import pytest
import torch
from fused_rope.frequencies import frequencies, mrope_axes
from fused_rope.hf_config import config_arguments

R = 64
LISTS = {
    "short_factor": [1.0 + 0.1 * i for i in range(R // 2)],
    "long_factor": [2.0 + 0.3 * i for i in range(R // 2)],
}
SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32, **LISTS},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    *(
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": 8192,
        }
        for high in (4.0, 2.0)
    ),
]


def default(rotary_dim=R, base=10000.0):
    return 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def test_default():
    inv_freq, factor = frequencies(R, 500000.0)
    torch.testing.assert_close(inv_freq, default(base=500000.0), rtol=1e-15, atol=0)
    assert inv_freq.dtype == torch.float64 and inv_freq.device.type == "cpu" and factor == 1.0


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
@pytest.mark.parametrize("rows", [None, 16, 65, 500])
def test_equals_hugging_face(scaling, rows):
    transformers = pytest.importorskip("transformers")
    functions = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
    kind = scaling["rope_type"]
    if kind not in functions:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": R}
    sizes["max_position_embeddings"] = 64
    if int(transformers.__version__.split(".")[0]) >= 5:
        parameters = {**scaling, "rope_theta": 10000.0}
        config = transformers.LlamaConfig(**sizes, rope_parameters=parameters)
    else:
        config = transformers.LlamaConfig(**sizes, rope_scaling=dict(scaling))
    want, want_factor = functions[kind](config, "cpu", seq_len=rows)
    arguments = config_arguments(config)
    got, factor = frequencies(
        arguments["rotary_dim"], arguments["base"], arguments["scaling"], rows=rows
    )
    torch.testing.assert_close(got.float(), want, rtol=2e-6, atol=0)
    assert factor == pytest.approx(want_factor, rel=1e-7)


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_layer_types_with_head_dims_of_their_own(layer_type):
    """Gemma 4's layers of full attention have wider heads, of which p-RoPE rotates a part."""
    gemma4 = pytest.importorskip("transformers.models.gemma4")
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    config = gemma4.Gemma4TextConfig(num_hidden_layers=6, head_dim=32, global_head_dim=64)
    want = getattr(Gemma4TextRotaryEmbedding(config), f"{layer_type}_inv_freq")
    arguments = config_arguments(config, layer_type)
    assert arguments["head_dim"] == (64 if layer_type == "full_attention" else 32)
    got, _ = frequencies(arguments["rotary_dim"], arguments["base"], arguments["scaling"])
    torch.testing.assert_close(got.float(), want, rtol=2e-6, atol=0)
    with pytest.raises(ValueError, match="layer_type"):
        config_arguments(config)


def test_llama3_steps_where_it_has_no_blend():
    """A frequency exactly at both factors is kept; transformers divides 0 by 0."""
    once = 8192 / (2 * math.pi)
    scaling = {**SCALINGS[6], "low_freq_factor": once, "high_freq_factor": once}
    assert frequencies(2, scaling=scaling)[0].tolist() == [1.0]


def test_half_truncated():
    inv_freq, factor = frequencies(32, 1024.0, {"rope_type": "half_truncated"})
    turning = (1 / 1024.0) ** torch.linspace(0, 1, 8, dtype=torch.float64)
    want = torch.cat([turning, torch.zeros(8, dtype=torch.float64)])
    torch.testing.assert_close(inv_freq, want, rtol=1e-14, atol=0)
    assert factor == 1.0


def test_axial():
    inv_freq, _ = frequencies(32, scaling={"rope_type": "axial"})
    torch.testing.assert_close(inv_freq, default(16).repeat(2), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "scaling,word",
    [
        ({"rope_type": "spiral"}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"type": "linear"}, "factor"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor"),
        ({**SCALINGS[5], "long_factor": [1.0]}, "long_factor"),
        ({"rope_type": "half_truncated"}, "rotary_dim"),
    ],
)
def test_errors_name_what_is_wrong(scaling, word):
    with pytest.raises(ValueError, match=word):
        frequencies(30 if word == "rotary_dim" else R, scaling=scaling)
    with pytest.raises(ValueError, match="rotary_dim"):
        frequencies(7)


def test_frequencies_do_not_depend_on_modes_and_defaults():
    want = [
        frequencies(R, scaling=scaling)[0] for scaling in SCALINGS if "dynamic" not in str(scaling)
    ]
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            got = [
                frequencies(R, scaling=scaling)[0]
                for scaling in SCALINGS
                if "dynamic" not in str(scaling)
            ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and not a.is_inference() for a, b in zip(got, want, strict=True))


def test_mrope_axes():
    assert mrope_axes([16, 24, 24]) == (0,) * 16 + (1,) * 24 + (2,) * 24
    want = tuple(j % 3 if j < 60 else 0 for j in range(64))
    assert mrope_axes([24, 20, 20], interleaved=True) == want
    for bad in ([4, -1], []):
        with pytest.raises(ValueError, match="sections"):
            mrope_axes(bad)


def test_pair_order():
    inv_freq, _ = frequencies(8, scaling={"pair_order": [0, 2, 1, 3]})
    assert inv_freq.tolist() == default(8)[[0, 2, 1, 3]].tolist()
    for order in ([0, 1, 2], [0, 1, 2, 4]):
        with pytest.raises(ValueError, match="pair_order"):
            frequencies(8, scaling={"pair_order": order})
    with pytest.raises(ValueError, match="pair_order"):
        frequencies(R, scaling={**SCALINGS[5], "pair_order": list(range(R // 2))})
