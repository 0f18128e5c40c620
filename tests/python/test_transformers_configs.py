"""from_config: the rotation of every model of transformers, or an error that names the unknown."""

import copy
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fused_rope import RotaryEmbedding, mrope_axes

transformers = pytest.importorskip("transformers")

from fused_rope.compat.transformers import configs  # noqa: E402

MODERN = int(transformers.__version__.split(".")[0]) >= 5
PAGE = Path(__file__).parents[2] / "docs" / "from_config.md"
LENGTH = 4096
HALVES = [1.0 + 0.1 * j for j in range(8)]
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 512},
    "yarn-mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 512},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def family(name, kind="modeling"):
    """A module of the family, skipping where the installed transformers has none."""
    return pytest.importorskip(f"transformers.models.{name}.{kind}_{name}")


def config_of(name, cls, **options):
    return getattr(family(name, "configuration"), cls)(**options)


def plain(**options):
    """A text config as plain keys, of remote code unless model_type says otherwise."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": LENGTH}
    return {**sizes, "rope_theta": 10000.0, **options}


def rope_parameters(**parameters):
    """Rotary parameters as the installed transformers' configs take them."""
    if MODERN:
        return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}
    return {"rope_theta": 10000.0, "rope_scaling": parameters}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Configs warn of keys that their models do not read, thousands of times."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def built(quiet):
    """Every rotary module with the config that it is built from."""
    return [
        (module, rotary, config, theirs)
        for module, rotary, config_class in configs.pairs()
        for config, theirs in configs.built(rotary, config_class)
    ]


@pytest.fixture(scope="module")
def rows(built):
    return [
        row
        for module, _, config, theirs in built
        for row in configs.entries_of(module, theirs, config)
    ]


# --- the sweep ------------------------------------------------------------------------------------

# What the models compute is no RotaryEmbedding, or their config does not say which.
REFUSED = {
    "clvp_encoder",
    "dinov3_vit",
    "efficientloftr",
    "eomt_dinov3",
    "hunyuan_vl_text",
    "llama4_vision_model",
    "musicflamingo",
    "nanochat",
    "sapiens2",
    "edgetam_video",
    "sam2_video",
    "sam3_tracker_video",
    "vjepa2",
    "",
    "qwen2_vl",
    "qwen2_5_vl",
}
# Their rotations are methods of attention modules; the pairing is that of docs/transformers.md.
METHODS = {"seamless_m4t", "wav2vec2-bert", "wav2vec2-conformer"}
# Their modules are built whatever the scaling, and ignore it.
UNSCALED = METHODS | {"esm", "nemotron", "phimoe", "pixtral", "qwen2_5_omni_dit"}


@pytest.mark.slow
def test_every_model_rotates_alike_or_is_refused(rows):
    assert len(rows) > (200 if MODERN else 95)
    for row in rows:
        name = f"{row.module} of {row.model_type}, {row.layer_type}"
        assert (row.rope is None) == (row.model_type in REFUSED), f"{name}: {row.error}"
        if row.rope is None:
            assert row.error.startswith("from_config: "), name
            continue
        assert row.difference < 2e-5, f"{name}: off by {row.difference}"
        assert row.compared != "frequencies" or row.model_type in METHODS, name


def test_documented_comparison_is_that_of_the_installed_version(rows):
    """python -m fused_rope.compat.transformers.configs > docs/from_config.md"""
    page = PAGE.read_text()
    version = re.search(r"transformers (\d+\.\d+\.\d+)", page)[1]
    if version != transformers.__version__:
        pytest.skip(f"the page is that of transformers {version}")
    assert configs.page(rows) == page


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_scaling_of_every_model(kind, built):
    """Frequencies and attention factor, for every family whose own module takes the scaling."""
    compared, refused = 0, set()
    for _, rotary, config, theirs in built:
        for layer_type in configs.layer_types(theirs):
            try:
                R = configs.rope_of(config, layer_type).rotary_dim
                scaled = with_scaling(config, kind, R, layer_type)
                scaled_theirs = rotary(scaled)
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):
                continue  # a family that from_config refuses, or a scaling that the model does
            try:
                rope = configs.rope_of(scaled, layer_type)
            except ValueError as error:
                assert str(error).startswith("from_config: ")
                refused.add(config.model_type)
                continue
            difference = configs.frequencies_differ(scaled_theirs, rope, layer_type)
            assert difference is not None and difference < 2e-5, (rotary.__name__, layer_type)
            compared += 1
    assert compared >= (140 if MODERN else 65)
    assert refused <= UNSCALED


def with_scaling(config, kind, R, layer_type):
    config = copy.deepcopy(config)
    scaling = {"rope_type": kind.split("-")[0], **SCALINGS[kind]}
    if kind == "longrope":
        scaling["short_factor"] = [1 + 0.1 * j for j in range(R // 2)]
        scaling["long_factor"] = [2 + 0.1 * j for j in range(R // 2)]
    if not MODERN:
        old = config.rope_scaling or {}
        config.rope_scaling = {**scaling, **{k: old[k] for k in old if k == "mrope_section"}}
        return config
    kept = ("rope_theta", "partial_rotary_factor", "mrope_section")

    def replaced(old):
        return {**scaling, **{key: old[key] for key in kept if key in old}}

    old = config.rope_parameters
    if layer_type is None:
        config.rope_parameters = replaced(old)
    else:
        config.rope_parameters = {**old, layer_type: replaced(old[layer_type])}
    return config


def test_dicts_are_read_as_configs_are(built):
    for _, _, config, theirs in built:
        for layer_type in configs.layer_types(theirs):
            found = [outcome(source, layer_type) for source in (config, config.to_dict())]
            assert found[0] == found[1], type(config).__name__


def outcome(source, layer_type):
    try:
        rope = RotaryEmbedding.from_config(source, layer_type=layer_type, max_seq_len=8)
    except ValueError:
        return "ValueError"
    return repr(rope), rope._inv_freq.tolist()


@pytest.mark.slow
def test_no_config_of_transformers_ends_in_another_error(monkeypatch):
    """Configs without rotary parameters, composed ones, and those of vision and audio models."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # two load another's
    models = Path(transformers.__file__).parent / "models"
    seen = 0
    for file in sorted(models.glob("*/configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for value in vars(module).values():
            if not (isinstance(value, type) and value.__module__ == module.__name__):
                continue
            try:
                config = value()
            except Exception:  # not a config, or one that needs arguments
                continue
            if not hasattr(config, "to_dict"):
                continue
            seen += 1
            try:
                RotaryEmbedding.from_config(config, max_seq_len=8)
            except ValueError as error:
                assert re.match("from_config: .*(pass|build|has|rotates)", str(error))
    assert seen > 400


# --- models whose rotation is not a module with a config ------------------------------------------


@pytest.mark.parametrize("name,cls", [("gptj", "GPTJConfig"), ("codegen", "CodeGenConfig")])
def test_gptj(name, cls):
    module = family(name)
    config = config_of(name, cls, n_embd=64, n_head=4, rotary_dim=8)
    rope = RotaryEmbedding.from_config(config, layout="bshd")
    assert (rope.head_dim, rope.rotary_dim, rope.interleaved) == (16, 8, True)
    q = torch.randn(1, 7, 4, 16)
    sin, cos = module.create_sinusoidal_positions(7, 8)[None].chunk(2, -1)
    want = torch.cat([module.apply_rotary_pos_emb(q[..., :8], sin, cos), q[..., 8:]], -1)
    torch.testing.assert_close(rope(q), want, rtol=0, atol=1e-5)
    config.rotary_dim = 7
    with pytest.raises(ValueError, match="rotary_dim"):
        RotaryEmbedding.from_config(config)


def test_roformer():
    module = family("roformer")
    config = config_of("roformer", "RoFormerConfig", hidden_size=64, num_attention_heads=4)
    table = module.RoFormerSinusoidalPositionalEmbedding(32, 16)
    with torch.no_grad():
        filled = table.create_weight() if hasattr(table, "create_weight") else table._init_weight()
    table = table.weight if filled is None else filled
    q = torch.randn(1, 4, 7, 16)
    want, _ = module.RoFormerSelfAttention.apply_rotary_position_embeddings(
        table[None, None, :7], q, q
    )
    torch.testing.assert_close(RotaryEmbedding.from_config(config)(q), want, rtol=0, atol=1e-5)


@pytest.mark.skipif(MODERN, reason="transformers 5 builds these modules from the config: the sweep")
@pytest.mark.parametrize(
    "name,config,rotary",
    [
        ("qwen2_vl", "Qwen2VLVisionConfig", "VisionRotaryEmbedding"),
        ("qwen2_5_vl", "Qwen2_5_VLVisionConfig", "Qwen2_5_VisionRotaryEmbedding"),
        ("glm4v", "Glm4vVisionConfig", "Glm4vVisionRotaryEmbedding"),
        ("qwen3_vl", "Qwen3VLVisionConfig", "Qwen3VLVisionRotaryEmbedding"),
    ],
)
def test_images_in_version_4(name, config, rotary):
    module = family(name)
    config = config_of(name, config)
    rope = RotaryEmbedding.from_config(config, layout="thd")
    assert rope.axes == (0,) * (rope.rotary_dim // 4) + (1,) * (rope.rotary_dim // 4)
    places = torch.randint(0, 20, (2, 7))
    angles = getattr(module, rotary)(rope.head_dim // 2)(20)[places.T].flatten(1)
    q, k = torch.randn(2, 7, 3, rope.head_dim)
    tables = torch.cat([angles, angles], -1)
    want = module.apply_rotary_pos_emb_vision(q, k, tables.cos(), tables.sin())
    got = rope(q, k, positions=places[:, None])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name,cls,rotary",
    [
        ("dbrx", "DbrxConfig", "DbrxRotaryEmbedding"),
        ("recurrent_gemma", "RecurrentGemmaConfig", "RecurrentGemmaRotaryEmbedding"),
        ("idefics", "IdeficsConfig", "IdeficsEmbedding"),
        ("chameleon", "ChameleonConfig", "ChameleonRotaryEmbedding"),
    ],
)
@pytest.mark.skipif(MODERN, reason="transformers 5 builds these modules from the config: the sweep")
def test_modules_of_a_width_in_version_4(name, cls, rotary):
    rope = RotaryEmbedding.from_config(config_of(name, cls))
    theirs = getattr(family(name), rotary)(rope.rotary_dim, base=rope.base)
    torch.testing.assert_close(rope._inv_freq.float(), theirs.inv_freq.float(), rtol=2e-6, atol=0)
    part = 0.5 if name == "recurrent_gemma" else 1.0
    assert rope.rotary_dim == rope.head_dim * part
    assert rope.base == {"dbrx": 10000.0}.get(name, 10000.0)


# --- layer types ----------------------------------------------------------------------------------

LAYERED = {
    "gemma3": ("Gemma3TextConfig", {"rope_local_base_freq": 2000.0, "rope_theta": 5e5}),
    "gemma3n": ("Gemma3nTextConfig", {"rope_local_base_freq": 2000.0, "rope_theta": 5e5}),
    "modernbert": ("ModernBertConfig", {"local_rope_theta": 2000.0, "global_rope_theta": 5e5}),
}


@pytest.mark.parametrize("name", LAYERED)
def test_bases_of_layer_types_in_both_versions(name):
    """The options of transformers 4, which 5 takes too."""
    cls, options = LAYERED[name]
    config = config_of(name, cls, **options)
    for source in (config, config.to_dict()):
        with pytest.raises(ValueError, match="layer_type"):
            RotaryEmbedding.from_config(source)
        for layer_type, base in (("sliding_attention", 2000.0), ("full_attention", 5e5)):
            assert RotaryEmbedding.from_config(source, layer_type=layer_type).base == base
        with pytest.raises(ValueError, match="spiral"):
            RotaryEmbedding.from_config(source, layer_type="spiral")


@pytest.mark.skipif(MODERN, reason="transformers 5 has these by layer type: the sweep")
@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("name", ["gemma3", "olmo3"])
def test_scaling_of_full_attention_alone_in_version_4(name, layer_type):
    cls = {"gemma3": "Gemma3TextConfig", "olmo3": "Olmo3Config"}[name]
    scaling = {"rope_type": "linear", "factor": 8.0}
    rope = RotaryEmbedding.from_config(
        config_of(name, cls, rope_scaling=scaling), layer_type=layer_type
    )
    assert rope.scaling == (scaling if layer_type == "full_attention" else None)


@pytest.mark.parametrize("name,cls", [("cohere2", "Cohere2Config"), ("afmoe", "AfmoeConfig")])
def test_layers_that_do_not_rotate(name, cls):
    config = config_of(name, cls)
    RotaryEmbedding.from_config(config, layer_type="sliding_attention")
    with pytest.raises(ValueError, match="does not rotate"):
        RotaryEmbedding.from_config(config, layer_type="full_attention")


def test_gemma4_full_attention_has_heads_of_its_own():
    config = config_of("gemma4", "Gemma4TextConfig", num_hidden_layers=6)
    for source in (config, config.to_dict()):
        widths = [
            RotaryEmbedding.from_config(source, layer_type=layer_type).head_dim
            for layer_type in ("sliding_attention", "full_attention")
        ]
        assert widths == [256, 512]


# --- keys of families -----------------------------------------------------------------------------


def phimoe(short, long):
    lists = {"short_factor": HALVES, "long_factor": [2 * value for value in HALVES]}
    scaling = {"rope_type": "longrope", **lists, "original_max_position_embeddings": 16}
    scaling |= {"short_mscale": short, "long_mscale": long}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return config_of(
        "phimoe", "PhimoeConfig", **sizes, max_position_embeddings=64, **rope_parameters(**scaling)
    )


@pytest.mark.parametrize("S", [8, 40])
def test_phimoe_has_factors_of_its_own(S):
    config = phimoe(1.25, 1.25)
    rotary = family("phimoe").PhimoeRotaryEmbedding(config)
    x = torch.randn(1, 4, S, 16)
    if MODERN:
        cos, sin = rotary(x, torch.arange(S)[None])
    else:
        cos, sin = (table[None] for table in rotary(x, seq_len=S))
    want = x * cos[:, None] + family("phimoe").rotate_half(x) * sin[:, None]
    rope = RotaryEmbedding.from_config(config)
    torch.testing.assert_close(rope(x), want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="short_mscale"):
        RotaryEmbedding.from_config(phimoe(1.25, 1.5))


def test_hunyuan_alpha():
    """As its published configs have it, with keys that the model does not read."""
    scaling = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32}
    scaling |= {"beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.0}
    config = config_of(
        "hunyuan_v1_dense", "HunYuanDenseV1Config", head_dim=64, **rope_parameters(**scaling)
    )
    theirs = family("hunyuan_v1_dense").HunYuanDenseV1RotaryEmbedding(config)
    rope = RotaryEmbedding.from_config(config)
    torch.testing.assert_close(rope._inv_freq.float(), theirs.inv_freq, rtol=2e-6, atol=0)
    with pytest.raises(ValueError, match="alpha"):
        RotaryEmbedding.from_config(plain(model_type="llama", rope_scaling=scaling))


@pytest.mark.parametrize("interleave", [True, False])
def test_deepseek_switches_its_pairing(interleave):
    config = config_of("deepseek_v3", "DeepseekV3Config", rope_interleave=interleave)
    rope = RotaryEmbedding.from_config(config)
    assert rope.interleaved is interleave
    assert rope.head_dim == rope.rotary_dim == config.qk_rope_head_dim


def test_ernie_vl_rotates_as_its_module():
    """Its buffer holds the frequencies in another order than its pairs have them."""
    config = config_of("ernie4_5_vl_moe", "Ernie4_5_VLMoeTextConfig")
    assert RotaryEmbedding.from_config(config).axes == (1, 2) * 22 + (0,) * 20


# --- what is not known ----------------------------------------------------------------------------

UNKNOWN = {
    "no rotary parameters": (plain(model_type="bert", rope_theta=None), "no rotary parameters"),
    "nothing": ({}, "no rotary parameters"),
    "remote code": (plain(model_type="remote"), "interleaved="),
    "no model_type": (plain(), "interleaved="),
    "composed": (
        {"model_type": "x", "text_config": plain(model_type="llama"), "vision_config": {}},
        "config.text_config",
    ),
    "rope_type": (
        plain(model_type="llama", rope_scaling={"type": "spiral", "factor": 2.0}),
        "spiral",
    ),
    "mscale of linear": (
        plain(model_type="llama", rope_scaling={"type": "linear", "factor": 2.0, "mscale": 1.2}),
        "mscale",
    ),
    "short_mscale": (
        plain(
            model_type="phi3",
            rope_scaling={
                "type": "longrope",
                "short_factor": HALVES,
                "long_factor": HALVES,
                "short_mscale": 1.2,
            },
        ),
        "short_mscale",
    ),
    "axes of a model with one": (
        plain(model_type="llama", rope_scaling={"type": "default", "mrope_section": [2, 3, 3]}),
        "mrope_section",
    ),
    "partial factor": (
        plain(model_type="llama", partial_rotary_factor=0.5),
        "partial_rotary_factor=0.5",
    ),
    "sections that do not fit": (
        plain(model_type="qwen2_vl_text", rope_scaling={"mrope_section": [2, 3, 4]}),
        "mrope_section",
    ),
    "sections of text": (
        plain(model_type="qwen2_vl_text", rope_scaling={"mrope_section": "2, 3, 3"}),
        "mrope_section",
    ),
    "factor of text": (
        plain(model_type="llama", rope_scaling={"type": "linear", "factor": "4"}),
        "factor='4'",
    ),
    "factor of zero": (
        plain(model_type="llama", rope_scaling={"type": "linear", "factor": 0}),
        "factor=0",
    ),
    "one number for a list": (
        plain(
            model_type="llama",
            rope_scaling={"type": "longrope", "short_factor": 2.0, "long_factor": HALVES},
        ),
        "short_factor to be a list",
    ),
    "trained length of text": (
        plain(
            model_type="llama",
            rope_scaling={
                "type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": "64",
            },
        ),
        "original_max_position_embeddings='64'",
    ),
    "truncate of text": (
        plain(model_type="llama", rope_scaling={"type": "yarn", "factor": 2.0, "truncate": "no"}),
        "truncate",
    ),
    "infinite base": (plain(model_type="llama", rope_theta=float("inf")), "rope_theta=inf"),
    "no factor": (plain(model_type="llama", rope_scaling={"type": "linear"}), "factor"),
    "scaling that is a word": (plain(model_type="llama", rope_scaling="linear"), "mapping"),
    "no base": (plain(model_type="llama", rope_theta=None), "rope_theta"),
    "no heads": (plain(model_type="llama", num_attention_heads=None), "head_dim"),
    "no length": (
        plain(
            model_type="llama",
            max_position_embeddings=None,
            rope_scaling={"type": "dynamic", "factor": 2.0},
        ),
        "max_position_embeddings",
    ),
    "odd head_dim": (plain(model_type="llama", head_dim=63), "head_dim 63 is odd: "),
    "alibi": (plain(model_type="falcon", alibi=True), "alibi"),
    "another direction": (plain(model_type="nanochat"), "inverse"),
    "scaling that gptj ignores": (
        {
            "model_type": "gptj",
            "n_embd": 64,
            "n_head": 4,
            "rotary_dim": 8,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
        "linear",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("form", ["dict", "object"])
def test_what_is_unknown_is_said(case, form):
    config, word = UNKNOWN[case]
    if form == "object":
        config = SimpleNamespace(**config)
    with pytest.raises(ValueError, match=re.escape(word)) as error:
        RotaryEmbedding.from_config(config)
    assert str(error.value).startswith("from_config: ")


@pytest.mark.parametrize(
    "source,words",
    [
        (None, "got None"),
        ("meta-llama/Llama-2-7b", "AutoConfig.from_pretrained"),
        (transformers.LlamaConfig, "the class LlamaConfig: pass an instance"),
        ([{}], r"got \[\{\}\]"),
    ],
    ids=["none", "name", "class", "list"],
)
def test_what_is_no_config(source, words):
    with pytest.raises(ValueError, match=f"^from_config: expected a config .*{words}"):
        RotaryEmbedding.from_config(source)


def test_a_model_is_no_config():
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 8}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, intermediate_size=32))
    with pytest.raises(ValueError, match=r"^from_config: .*LlamaModel: pass model\.config"):
        RotaryEmbedding.from_config(model)


def test_parts_that_are_not_called_configs():
    parts = transformers.BertConfig(), transformers.LlamaConfig()
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    for source in (config, config.to_dict()):
        with pytest.raises(ValueError, match=r"config\.decoder or config\.encoder"):
            RotaryEmbedding.from_config(source)


def test_a_composed_config_names_its_parts():
    config = transformers.LlavaConfig()
    for source in (config, config.to_dict(), transformers.Qwen2VLConfig()):
        with pytest.raises(ValueError, match=r"config\.text_config or config\.vision_config"):
            RotaryEmbedding.from_config(source)
    RotaryEmbedding.from_config(transformers.LlavaConfig().text_config)


def test_files_of_before_configs_were_composed():
    """A flat text config with the images' config inside, as Qwen2-VL was published."""
    sections = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"model_type": "qwen2_vl", "embed_dim": 64, "num_heads": 4}
    flat = plain(model_type="qwen2_vl", vocab_size=97, vision_config=vision, rope_scaling=sections)
    assert RotaryEmbedding.from_config(flat).axes == mrope_axes([2, 3, 3])
    assert RotaryEmbedding.from_config(vision).axes == (0,) * 4 + (1,) * 4


def test_remote_code_with_a_named_pairing():
    config = plain(
        model_type="remote",
        partial_rotary_factor=0.5,
        rope_scaling={
            "rope_type": "default",
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    )
    for interleaved in (False, True):
        rope = RotaryEmbedding.from_config(config, interleaved=interleaved)
        assert (rope.rotary_dim, rope.interleaved) == (8, interleaved)
        assert rope.axes == mrope_axes([2, 1, 1], interleaved=True)
    assert RotaryEmbedding.from_config(plain(rotary_dim=4), interleaved=True).rotary_dim == 4
    with pytest.raises(ValueError, match="ntk"):
        RotaryEmbedding.from_config(plain(rope_scaling={"type": "ntk"}), interleaved=True)


def test_longrope_of_version_4():
    """Its trained length is the config's own, not part of the scaling."""
    lists = {"short_factor": HALVES, "long_factor": HALVES}
    config = plain(
        model_type="phi3",
        original_max_position_embeddings=1024,
        rope_scaling={"type": "su", **lists},
    )
    scaling = RotaryEmbedding.from_config(config).scaling
    assert scaling["factor"] == 4.0 and scaling["original_max_position_embeddings"] == 1024


# --- arguments ------------------------------------------------------------------------------------


def test_a_long_config_starts_small_and_grows():
    config = plain(model_type="llama", max_position_embeddings=10_000_000)
    rope = RotaryEmbedding.from_config(config)
    assert rope.cos.shape == (2048, 8)
    assert RotaryEmbedding.from_config(config, max_seq_len=5000).cos.shape[0] == 5000
    assert RotaryEmbedding.from_config(plain(model_type="llama")).cos.shape[0] == 2048
    short = plain(model_type="llama", max_position_embeddings=100)
    assert RotaryEmbedding.from_config(short).cos.shape[0] == 100
    x = torch.randn(1, 1, 1, 16)
    far = RotaryEmbedding.from_config(config, max_seq_len=3001)
    assert torch.equal(rope(x, offset=3000), far(x, offset=3000))


def test_a_pairing_can_be_given_and_changed():
    config = plain(model_type="cohere")
    x = torch.randn(1, 2, 5, 16)
    rope = RotaryEmbedding.from_config(config)
    half = RotaryEmbedding.from_config(config, interleaved=False)
    assert rope.interleaved and not half.interleaved
    want = half(x)
    rope.interleaved = False
    assert torch.equal(rope(x), want)
