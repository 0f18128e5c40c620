"""The smallest real models, one for each variant of rotary embedding, and inputs for them."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
    **MOE,
}
VISION = {
    "depth": 2,
    "embed_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "in_channels": 3,
    "num_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "image_size": 32,
}


def text(S=19):
    return {"input_ids": torch.randint(3, VOCABULARY, (2, S))}


def image(size=32):
    return {"pixel_values": torch.randn(2, 3, size, size)}


def patches(grid=((1, 4, 6), (1, 2, 4)), features=3 * 2 * 4 * 4):
    grid = torch.tensor(grid)
    return {"hidden_states": torch.randn(int(grid.prod(-1).sum()), features), "grid_thw": grid}


def pixels():
    inputs = patches()
    return {"pixel_values": inputs["hidden_states"], "grid_thw": inputs["grid_thw"]}


def square_patches(side=6):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([columns.flatten(), rows.flatten()], -1)[None].repeat(2, 1, 1)
    return {"pixel_values": torch.rand(2, side * side, 3 * 4 * 4), "pixel_position_ids": ids}


def memory(groups=2, excluded=3, per_group=16):
    """Features of 16 image tokens, and of two frames and a few object pointers in memory."""
    tokens = groups * per_group + excluded
    return {
        "current_vision_features": torch.randn(16, 2, 64),
        "memory": torch.randn(tokens, 2, 64),
        "memory_posision_embeddings": torch.randn(tokens, 2, 64),
        "num_object_pointer_tokens": excluded,
    }


def grouped_memory():
    return {**memory(per_group=6), "num_spatial_memory_tokens": 2}


def audio():
    return {"input_values": torch.randn(2, 400)}


def waveform():
    return {"input_values": torch.randn(2, 1, 400)}


def mel_features():
    return {"input_features": torch.randn(2, 19, 32)}


def song(frames=40, tokens=10):
    """Text around one window of audio, which the encoder makes a token of every four frames."""
    ids = torch.randint(3, VOCABULARY - 1, (1, 19))
    ids[:, 4 : 4 + tokens] = VOCABULARY - 1
    mask = torch.ones(1, frames, dtype=torch.int64)
    features = torch.randn(1, 16, frames)
    return {"input_ids": ids, "input_features": features, "input_features_mask": mask}


def noise_after_context(block=4, context=7):
    return {
        "noise_embeds": torch.randn(2, block, 64),
        "context_hidden_states": torch.randn(2, context, 2 * 64),
    }


def grey_pair_of_images():
    return {"pixel_values": torch.randn(1, 2, 3, 32, 32)}


def pair_of_images():
    return {"pixel_values": torch.randn(1, 2, 3, 64, 64)}


@dataclass(frozen=True)
class Case:
    """How to build a family's smallest model.

    Attributes:
        family: the name of its module.
        model, config: names of its classes.
        options: of the config, in addition to `sizes`.
        inputs: makes the arguments of a forward.
        bitwise: patched outputs are bitwise identical in float32 and bfloat16.
        generates: it has generate().
    """

    family: str
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)
    inputs: Callable[[], dict[str, Any]] = text
    bitwise: bool = True
    generates: bool = False

    @property
    def module(self):
        return f"transformers.models.{self.family}"

    @property
    def installed(self):
        """Whether the installed transformers has the family."""
        return importlib.util.find_spec(self.module) is not None

    def build(self, dtype=torch.float32, device="cpu"):
        modeling, configuration = (
            importlib.import_module(f"{self.module}.{kind}_{self.family}")
            for kind in ("modeling", "configuration")
        )
        options = {**self.sizes, **self.options}
        if int(transformers.__version__.split(".")[0]) < 5:
            options = in_version_4(options)
        config = getattr(configuration, self.config)(**options)
        kind = getattr(modeling, self.model)
        torch.manual_seed(0)
        if not hasattr(kind, "_from_config"):
            config._attn_implementation = "eager"
        model = getattr(kind, "_from_config", kind)(config)
        with torch.no_grad():  # large enough that attention, and so rotation, matters
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        # model.to(dtype) would make complex tables real.
        return model._apply(lambda t: t.to(device, dtype if t.is_floating_point() else None)).eval()

    def arguments(self, dtype=torch.float32, device="cpu"):
        torch.manual_seed(1)
        return {
            name: value.to(device, dtype if value.is_floating_point() else None)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.inputs().items()
        }


def in_version_4(options):
    """The options of a config of transformers 4, which names rotary parameters one by one."""
    options = dict(options)
    parameters = options.pop("rope_parameters", {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in parameters:
            options[name] = parameters[name]
    if "mrope_section" in parameters:
        sections = parameters["mrope_section"]
        options["rope_scaling"] = {"rope_type": "default", "mrope_section": sections}
    return options


def causal(family, prefix, **options):
    """A language model by the usual names of its classes."""
    return Case(family, f"{prefix}ForCausalLM", f"{prefix}Config", options, generates=True)


def rope(**options):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **options}}


def vision(family, model, config, inputs, **options):
    return Case(family, model, config, options, VISION, inputs)


GPTJ = {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}
CONFORMER = {
    "position_embeddings_type": "rotary",
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
    "apply_spec_augment": False,
}
MEMORY = {
    "memory_attention_hidden_size": 64,
    "memory_attention_num_layers": 2,
    "memory_attention_num_attention_heads": 1,
    "memory_attention_downsample_rate": 1,
    "memory_attention_mlp_hidden_size": 96,
    "memory_attention_feed_forward_hidden_size": 96,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_attention_rope_k_sizes": [2, 2],
}
ERNIE_VL = {"moe_intermediate_size": [32, 32], "moe_k": 2, "moe_num_experts": 4}
MUSIC = {
    "audio_config": {
        "model_type": "audioflamingo3_encoder",
        "num_mel_bins": 16,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_source_positions": 20,
    },
    "text_config": {"model_type": "qwen2", **SIZES},
    "audio_token_id": VOCABULARY - 1,
}
COMPRESSED = {
    "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 4,
}
QWEN4 = {
    **MOE,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "qwen_sparse_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
DAC = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "codebook_dim": 8}
GLUE = {
    "keypoint_detector_config": {
        "encoder_hidden_sizes": [16, 16, 32, 32],
        "decoder_hidden_size": 32,
        "descriptor_decoder_dim": 64,
        "max_keypoints": 20,
        "keypoint_threshold": 0.0,
    },
    "descriptor_dim": 64,
    "num_hidden_layers": 2,
    "depth_confidence": -1.0,
    "width_confidence": -1.0,
    "filter_threshold": 0.0,
}
LOFTR = {"hidden_size": 64, "out_features": [16, 16, 32, 64], "stage_num_blocks": [1, 1, 1, 1]}

CASES = {
    "V1-llama": causal("llama", "Llama"),
    "V1-gemma3": Case(
        "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {"sliding_window": 8}, generates=True
    ),
    "V2-phi3": causal("phi3", "Phi3", **rope(partial_rotary_factor=0.5)),
    "V2-phi": causal("phi", "Phi", **rope(partial_rotary_factor=0.5)),
    "V2-gpt_neox": causal("gpt_neox", "GPTNeoX"),
    "V3-gpt_oss": causal("gpt_oss", "GptOss", **MOE),
    "V3-openai_privacy_filter": Case(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterModel",
        "OpenAIPrivacyFilterConfig",
        MOE,
    ),
    "V4-cohere": causal("cohere", "Cohere"),
    "V5-glm": causal("glm", "Glm"),
    "V6-ernie4_5": causal("ernie4_5", "Ernie4_5"),
    "V7-qwen2_vl": Case(
        "qwen2_vl", "Qwen2VLTextModel", "Qwen2VLTextConfig", rope(mrope_section=[2, 3, 3])
    ),
    "V8-qwen3_vl": Case(
        "qwen3_vl", "Qwen3VLTextModel", "Qwen3VLTextConfig", rope(mrope_section=[2, 3, 3])
    ),
    "V9-glm4v": Case(
        "glm4v",
        "Glm4vTextModel",
        "Glm4vTextConfig",
        rope(mrope_section=[1, 1, 2], partial_rotary_factor=0.5),
    ),
    "V9-glm4v_moe": Case(
        "glm4v_moe",
        "Glm4vMoeTextModel",
        "Glm4vMoeTextConfig",
        {**MOE, **rope(mrope_section=[1, 1, 2], partial_rotary_factor=0.5)},
    ),
    "V10-ernie4_5_vl_moe": Case(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        "Ernie4_5_VLMoeTextConfig",
        {**MOE, **ERNIE_VL, **rope(mrope_section=[3, 3, 2])},
    ),
    "V11-olmo2": causal("olmo2", "Olmo2"),
    "V12-llama4": Case(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**MOE, "intermediate_size_mlp": 96},
        bitwise=False,
        generates=True,
    ),
    "V12-llama4-vision": vision(
        "llama4",
        "Llama4VisionModel",
        "Llama4VisionConfig",
        image,
        intermediate_size=256,
        vision_output_dim=64,
        projector_input_dim=64,
        projector_output_dim=64,
    ),
    "V13-deepseek_v2": replace(causal("deepseek_v2", "DeepseekV2", **MLA), bitwise=False),
    "V14-deepseek_v3": replace(causal("deepseek_v3", "DeepseekV3", **MLA), bitwise=False),
    "V14-deepseek_v32": replace(
        causal(
            "deepseek_v32",
            "DeepseekV32",
            **{**MLA, "index_n_heads": 4, "index_head_dim": 32, "index_topk": 8},
        ),
        bitwise=False,
    ),
    "V15-deepseek_v4": causal("deepseek_v4", "DeepseekV4", **{**MLA, "head_dim": 32, **COMPRESSED}),
    "V16-gemma4": Case(
        "gemma4",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 97,
        },
        generates=True,
    ),
    "V17-gemma4": vision(
        "gemma4", "Gemma4VisionModel", "Gemma4VisionConfig", square_patches, head_dim=16
    ),
    "V18-qwen2_vl": vision(
        "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", "Qwen2VLVisionConfig", patches
    ),
    "V18-minimax_m3_vl": vision(
        "minimax_m3_vl", "MiniMaxM3VLVisionModel", "MiniMaxM3VLVisionConfig", pixels, head_dim=16
    ),
    "V19-dinov3_vit": vision(
        "dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", image, num_register_tokens=2
    ),
    "V20-pixtral": vision("pixtral", "PixtralVisionModel", "PixtralVisionConfig", image),
    "V21-gptj": replace(causal("gptj", "GPTJ", **GPTJ), bitwise=False),
    "V21-codegen": replace(causal("codegen", "CodeGen", **GPTJ), bitwise=False),
    "V22-esm": Case("esm", "EsmModel", "EsmConfig", {"position_embedding_type": "rotary"}),
    "V23-roformer": Case(
        "roformer", "RoFormerModel", "RoFormerConfig", {"rotary_value": True, "embedding_size": 64}
    ),
    "V24-wav2vec2_conformer": Case(
        "wav2vec2_conformer",
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        CONFORMER,
        inputs=audio,
    ),
    "V24-wav2vec2_bert": Case(
        "wav2vec2_bert",
        "Wav2Vec2BertModel",
        "Wav2Vec2BertConfig",
        {**CONFORMER, "feature_projection_input_dim": 32},
        inputs=mel_features,
    ),
    "V26-sam3": vision(
        "sam3", "Sam3ViTModel", "Sam3ViTConfig", image, global_attn_indexes=[1], window_size=4
    ),
    "V26-sam2_video": Case(
        "sam2_video", "Sam2VideoMemoryAttention", "Sam2VideoConfig", MEMORY, {}, memory
    ),
    "V26-edgetam_video": Case(
        "edgetam_video",
        "EdgeTamVideoMemoryAttention",
        "EdgeTamVideoConfig",
        MEMORY,
        {},
        grouped_memory,
    ),
    "V27-efficientloftr": Case(
        "efficientloftr", "EfficientLoFTRModel", "EfficientLoFTRConfig", LOFTR, {}, pair_of_images
    ),
    "V28-modernbert": Case("modernbert", "ModernBertModel", "ModernBertConfig"),
    "nanochat": causal("nanochat", "NanoChat"),
    "clvp": Case(
        "clvp", "ClvpEncoder", "ClvpEncoderConfig", {"hidden_size": 128, "projection_dim": 64}
    ),
    "musicflamingo": Case(
        "musicflamingo", "MusicFlamingoModel", "MusicFlamingoConfig", MUSIC, {}, song
    ),
    "muse_glimmer": vision(
        "muse_glimmer", "MuseGlimmerVisionModel", "MuseGlimmerVisionConfig", pixels
    ),
    "muse_glimmer_text": Case("muse_glimmer", "MuseGlimmerTextModel", "MuseGlimmerTextConfig"),
    "muse_glimmer_assistant": Case(
        "muse_glimmer_assistant",
        "MuseGlimmerAssistantModel",
        "MuseGlimmerAssistantConfig",
        {"target_layer_ids": [0, 1], "block_size": 4},
        inputs=noise_after_context,
    ),
    "qwen4_exp": Case(
        "qwen4_exp", "Qwen4ExpForCausalLM", "Qwen4ExpTextConfig", QWEN4, generates=True
    ),
    "pe_audio": Case(
        "pe_audio", "PeAudioEncoder", "PeAudioEncoderConfig", {"dac_config": DAC}, inputs=waveform
    ),
    "lightglue": Case(
        "lightglue",
        "LightGlueForKeypointMatching",
        "LightGlueConfig",
        GLUE,
        {},
        grey_pair_of_images,
    ),
}
