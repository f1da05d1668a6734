"""Tiny random models of every type in transformers' causal and sequence-to-sequence mappings."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LARGEST = 40_000_000
"""Parameters of a model that is still called tiny."""
VOCABULARY = 200
SPREAD = {"mobilebert": 0.05}
"""Standard deviation of random weights, where the usual one gives numbers too large to have a gradient."""
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "n_inner": 48,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "num_layers": 3,
    "num_heads": 4,
    "d_ff": 48,
    "d_kv": 8,
    "ffn_dim": 48,
    "dff": 48,
    "n_ctx": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "encoder_num_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 16,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "embedding_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
    "sliding_window": 64,
    "max_seq_len": 128,
    "emb_dim": 32,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "n_group": 1,
    "topk_group": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "pronunciation_vocab_size": 20,
    "shape_vocab_size": 20,
    "pronunciation_embed_dim": 16,
    "shape_embed_dim": 16,
    "hidden_size_global": 32,
    # parts that read images and sounds
    "image_token_id": 190,
    "video_token_id": 191,
    "audio_token_id": 192,
    "image_size": 16,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 64,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
BERT: dict[str, Any] = {
    key: SMALL[key]
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DROPPED = None
"""A setting of SMALL that a type does not take."""
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE | {"mrope_section": [2, 1, 1]}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "dots1": {"n_shared_experts": 1},
    "encoder-decoder": {
        "encoder": {"model_type": "bert", **BERT},
        "decoder": {"model_type": "bert", **BERT, "is_decoder": True, "add_cross_attention": True},
        "decoder_start_token_id": 1,
        "pad_token_id": 0,
    },
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "falcon": {"head_dim": DROPPED},
    "gemma3n_text": {"num_hidden_layers": 5, "num_kv_shared_layers": 0, "intermediate_size": [48] * 5},
    "gemma4_text": {"head_dim": DROPPED, "num_kv_shared_layers": 0},
    "gemma4_unified_text": {"head_dim": DROPPED, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8, "use_mamba_kernels": False},
    "kimi_linear": LINEAR,
    "longcat_flash": {"head_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": {"block_size": 4},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 8, "n_groups": 1},
    "prophetnet": {"num_hidden_layers": DROPPED},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": LINEAR
    | {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "xlm": {"mask_token_id": 5},
    "xlnet": {"max_position_embeddings": DROPPED, "n_ctx": DROPPED},
    "xlstm": {"hidden_size": 128, "v_head_dim": DROPPED, "head_dim": DROPPED},  # its cache rounds sizes up to 64
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        "head_dim": DROPPED,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "chunk_size": 8,
        "use_mamba_kernels": False,
        "head_dim": DROPPED,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def every_type() -> list[str]:
    """Names such as "CausalLM:llama", one for each model type that transformers can build with such a head."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    pairs = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return [f"CausalLM:{name}" for name in causal] + [f"Seq2SeqLM:{name}" for name in pairs]


def tiny_config(kind: type, **given: Any) -> Any:
    """A configuration of a class with small sizes, in its parts too."""
    if kind is tf.EncoderDecoderConfig:
        return kind(**given)
    default = kind()
    fields = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", ()))
    values = {key: value for key, value in SMALL.items() if key in fields or _has(default, key)}
    if "qk_rope_head_dim" in values:  # compressed keys and values: each query head has its own
        values |= {"head_dim": DROPPED, "num_key_value_heads": SMALL["num_attention_heads"]}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, tf.PretrainedConfig):
            values[name] = tiny_config(type(part), **SETTINGS.get(part.model_type, {}))
    values |= given
    return kind(**{key: value for key, value in values.items() if value is not DROPPED})


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # a value that differs between layers
        return False


class NotTiny(Exception):
    """Why a type cannot be built here."""


def build(name: str) -> Any:
    """A model with random weights in float32, the same for the same name; spread so widely that positions matter.

    Raises:
        NotTiny: it cannot be built tiny from its configuration alone; with the reason.
    """
    head, model_type = name.split(":")
    try:
        config = tiny_config(CONFIG_MAPPING[model_type], **SETTINGS.get(model_type, {}))
        if head == "CausalLM" and _has(config, "is_decoder"):
            config.is_decoder = True  # of BERT and its kin
        auto = getattr(tf, f"AutoModelFor{head}")
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
        if size > LARGEST:
            raise NotTiny(f"{size / 1e6:.0f} million parameters")
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
    except NotTiny:
        raise
    except Exception as error:
        raise NotTiny(f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}") from error
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, SPREAD.get(model_type, 0.25), generator=generator)
    _plain_generation(model)
    return model.eval()


def _plain_generation(model: Any) -> None:
    """Only a decoder's first token is set: nothing ends a text early and no token is forced."""
    if getattr(model.config, "is_encoder_decoder", False):
        model.config.decoder_start_token_id = 2
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.decoder_start_token_id = 2
        generation.eos_token_id = generation.forced_eos_token_id = generation.forced_bos_token_id = None


if __name__ == "__main__":
    outcomes: dict[str, str] = {}
    for each in every_type():
        try:
            built = build(each)
            outcomes[each] = f"{type(built).__name__}, {sum(p.numel() for p in built.parameters())} parameters"
        except NotTiny as reason:
            outcomes[each] = f"not tiny: {reason}"
    print(json.dumps(outcomes, indent=1))
