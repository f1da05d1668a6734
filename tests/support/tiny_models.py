"""Tiny random models, one per architecture, in float64 where a test compares numbers: no weights are downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

VOCABULARY = 96
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
WINDOW = 5
"""Shorter than the rows of the tests."""


def _config(name: str, **values: Any) -> Callable[[], Any]:
    return lambda: getattr(tf, f"{name}Config")(**values)


GPT2: dict[str, Any] = COMMON | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 48}
BERT: dict[str, Any] = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
T5: dict[str, Any] = COMMON | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = COMMON | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": _config("Llama", **LLAMA),
    "mistral-window": _config("Mistral", **LLAMA, sliding_window=WINDOW),
    "qwen2": _config("Qwen2", **{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen3": _config("Qwen3", **LLAMA),
    "gemma": _config("Gemma", **LLAMA),
    "gemma2": _config("Gemma2", **LLAMA, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "gemma3": _config("Gemma3Text", **LLAMA, sliding_window=WINDOW, query_pre_attn_scalar=8),
    "phi3": _config("Phi3", **{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "olmo2": _config("Olmo2", **LLAMA),
    "gpt2": _config("GPT2", **GPT2),
    "opt": _config(
        "OPT",
        **COMMON,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "gpt-neox": _config("GPTNeoX", **BERT),
    "stablelm": _config("StableLm", **{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "mixtral": _config("Mixtral", **LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "smollm3": _config("SmolLM3", **{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "granite": _config("Granite", **{k: v for k, v in LLAMA.items() if k != "head_dim"}, embedding_multiplier=3.0),
    "cohere": _config("Cohere", **{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "gptj": _config("GPTJ", **GPT2, rotary_dim=4),
    "bloom": _config("Bloom", **COMMON, hidden_size=32, n_layer=2, n_head=4),
    "falcon": _config("Falcon", **COMMON, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True),
    "gpt-neo": _config(
        "GPTNeo",
        **COMMON,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    "mpt": _config("Mpt", **COMMON, d_model=32, n_layers=2, n_heads=4, max_seq_len=128, expansion_ratio=2),
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": _config("Bert", **BERT),
    "roberta": _config("Roberta", **BERT | {"pad_token_id": 1, "bos_token_id": 0}),
    "electra": _config("Electra", **BERT, embedding_size=32),
    "modernbert": _config(
        "ModernBert", **BERT, local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
}
ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": _config("T5", **T5, decoder_start_token_id=0),
    "bart": _config("Bart", **BART),
    "bart-scaled": _config("Bart", **BART, scale_embedding=True),
    "pegasus": _config("Pegasus", **{k: v for k, v in BART.items() if k != "forced_eos_token_id"}),
}
ALL = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}


def own_attention(name: str) -> bool:
    """Whether this version of transformers lets nobody replace a decoder's attention, so that it runs padded."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = DECODERS[name]()
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return not model._can_set_attn_implementation() or getattr(config, "alibi", False)


def changes_mask(name: str) -> bool:
    """Whether a decoder changes the mask that carries the packed layout, as StableLM does in transformers 5.0."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return hasattr(MODEL_MAPPING[type(DECODERS[name]())], "_update_causal_mask")


def build(name: str, head: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights, the same for the same name; spread wide enough that positions matter."""
    config = ALL[name]()
    torch.manual_seed(0)
    if head is None:
        head = "CausalLM" if name in DECODERS else "MaskedLM" if name in ENCODERS else "Seq2SeqLM"
    if name == "mixtral":  # the grouped product has no float64
        config._experts_implementation = "eager"
    model = getattr(tf, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        if name in ENCODER_DECODERS:  # the same weights however many numbers transformers draws before
            torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.to(dtype).eval()


def batch(rows: int = 4, tokens: int = 11, padding: str = "mixed") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of rows of different lengths, the first one full; ids at padding are random too."""
    ids = torch.randint(3, VOCABULARY, (rows, tokens))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        missing = row * 2 % tokens
        side = padding if padding != "mixed" else ("left", "right")[row % 2]
        if missing and side == "left":
            mask[row, :missing] = 0
        elif missing:
            mask[row, -missing:] = 0
    return ids, mask
