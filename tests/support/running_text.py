"""Small tokenizers of the kinds that read a word otherwise in running text than alone."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def _fast(tokenizer: Tokenizer, bos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_bpe(*words: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's scheme: each of the words is one token, other text is bytes; digits are single tokens as in SmolLM2."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in words:
        parts = list(pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(word)[0][0])
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            vocab.setdefault("".join(pair), len(vocab))
            parts[:2] = ["".join(pair)]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, bos)


def prepending(*words: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """Llama 2's scheme: a space is put before every text, spaces are part of the words after them."""
    pieces = [f"▁{word}" for word in words] + ["▁", "\n", ":"]
    letters = sorted(set("".join(words)) - set(pieces))
    vocab = [(piece, 0.0) for piece in SPECIAL] + [(piece, -1.0) for piece in pieces]
    vocab += [(word, -2.0) for word in words if len(word) > 1] + [(letter, -9.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    return _fast(tokenizer, bos)
