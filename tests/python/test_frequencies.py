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


TRAINED = {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, **TRAINED}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, **TRAINED, **LISTS}
WRONG_SCALINGS = {
    "unhashable kind": ({"rope_type": ["yarn"]}, "rope_type .*yarn"),
    "no kind": ({"factor": 4.0}, "'default' does not read factor"),
    "key of another kind": ({**YARN, "low_freq_factor": 1.0}, "'yarn' does not read low_freq"),
    "misspelled key": ({**YARN, "mscal": 1.0}, "does not read mscal"),
    "zero factor": ({"rope_type": "linear", "factor": 0}, "factor to be a number > 0, got 0"),
    "negative factor": ({**YARN, "factor": -4.0}, "factor to be a number > 0, got -4.0"),
    "infinite factor": ({**YARN, "factor": math.inf}, "factor to be a number > 0, got inf"),
    "factor of text": ({"rope_type": "linear", "factor": "4"}, "factor to be a number .*'4'"),
    "factor of truth": ({"rope_type": "linear", "factor": True}, "factor to be a number .*True"),
    "no trained length": ({**YARN, "original_max_position_embeddings": 0}, "original_max.* > 0"),
    "trained length of 1": ({**LONGROPE, "original_max_position_embeddings": 1}, "> 1, got 1"),
    "length of text": (
        {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": "32"},
        "original_max_position_embeddings to be a number > 0, got '32'",
    ),
    "beta of text": ({**YARN, "beta_fast": "32"}, "beta_fast to be a number"),
    "truncate of text": ({**YARN, "truncate": "no"}, "truncate to be True or False, got 'no'"),
    "one number for a list": ({**LONGROPE, "short_factor": 2.0}, "short_factor to be a list"),
    "text for a list": ({**LONGROPE, "long_factor": "abc"}, "long_factor to be a list"),
    "zero in a list": ({**LONGROPE, "long_factor": [0.0] * (R // 2)}, "long_factor to be a number"),
    "more than all": ({"rope_type": "proportional", "partial_rotary_factor": 2.0}, "<= 1, got 2"),
    "order of text": ({"rope_type": "default", "pair_order": "a" * (R // 2)}, "pair_order"),
    "another base": ({"rope_type": "default", "rope_theta": 5e5}, "base=500000.0"),
}


@pytest.mark.parametrize("name", WRONG_SCALINGS)
def test_wrong_scalings(name):
    scaling, message = WRONG_SCALINGS[name]
    with pytest.raises(ValueError, match=f"^frequencies: .*{message}"):
        frequencies(R, scaling=scaling)


@pytest.mark.parametrize(
    "error,message,arguments",
    [
        (TypeError, "rotary_dim to be an int, got float", {"rotary_dim": 64.0}),
        (TypeError, "base to be a number, got str", {"base": "10000"}),
        (ValueError, "base > 0, got 0", {"base": 0}),
        (ValueError, "base > 0, got nan", {"base": math.nan}),
        (ValueError, "another base than 1", {"base": 1, "scaling": YARN}),
        (TypeError, "a mapping with rope_type, got str", {"scaling": "yarn"}),
        (TypeError, "a mapping with rope_type, got list", {"scaling": [4.0]}),
    ],
)
def test_wrong_arguments(error, message, arguments):
    with pytest.raises(error, match=f"^frequencies: .*{message}"):
        frequencies(**{"rotary_dim": R} | arguments)


@pytest.mark.parametrize("sections,got", [(3, "int"), ("ab", "str"), ([1.5, 1], "float")])
def test_sections_are_ints(sections, got):
    with pytest.raises(TypeError, match=f"^mrope_axes: .*, got {got}"):
        mrope_axes(sections)


def test_keys_that_change_no_number():
    """A config's rope_parameters are a scaling as they are."""
    given = {**YARN, "rope_theta": 5e5, "partial_rotary_factor": 1.0, "max_position_embeddings": 64}
    assert frequencies(R, 5e5, given)[0].equal(frequencies(R, 5e5, YARN)[0])
    sections = {"type": "mrope", "mrope_section": [8, 12, 12], "mrope_interleaved": True}
    assert frequencies(R, scaling=sections)[0].equal(frequencies(R)[0])
