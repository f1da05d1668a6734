"""Tiny tasks for heads: a tokenizer with sub-tokens, special tokens and types, rows of each task, models on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support.tiny_models import BERT, LLAMA

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PEOPLE, PLACES = ["ann", "bob", "carol", "dave"], ["rome", "paris", "oslo", "lima"]
PIECES = ["lives", "in", "who", "where", "?", "is", ".", "today", "new", "##york", "##er", "##s", "very", "film"]
PIECES += ["fine", "great", "lovely", "dull", "awful", "poor", "plot"]
LETTERS = [f"{start}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for start in ("", "##")]
HEADS = ("sequence-classification", "token-classification", "question-answering")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words of several tokens, [CLS] and [SEP], and types of a pair, as BERT's tokenizer has them."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *PEOPLE, *PLACES, *PIECES, *LETTERS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The same words without any token around a text, as decoders have them."""
    tokenizer = Tokenizer(wordpiece_tokenizer().backend_tokenizer.model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]"
    )


def tagged(count: int = 48) -> list[dict[str, Any]]:
    """People and places in a sentence; a place may have two words, and words may have several tokens."""
    rows = []
    for i in range(count):
        person, place = PEOPLE[i % 4], PLACES[i // 4 % 4]
        words, tags = [person, "lives", "in"], ["B-PER", "O", "O"]
        words += ["new", f"{place}s"] if i % 3 == 0 else [place]
        tags += ["B-LOC", "I-LOC"] if i % 3 == 0 else ["B-LOC"]
        words += ["today"] * (i % 2)
        rows.append({"tokens": words, "tags": tags + ["O"] * (i % 2)})
    return rows


def questions(count: int = 48, *, before: int = 0) -> list[dict[str, Any]]:
    """Who lives in a place, in SQuAD's form; the answer follows so many other words."""
    rows = []
    for i in range(count):
        person, place = PEOPLE[i % 4], PLACES[i // 4 % 4]
        context = f"{'very ' * (before + i % 3)}{person} lives in {place} ."
        who = i % 2 == 0
        answer = person if who else place
        rows.append(
            {
                "question": "who is in ?" if who else "where is ?",
                "context": context,
                "answers": {"text": [answer], "answer_start": [context.index(answer)]},
            }
        )
    return rows


def save_model(folder: Path, kind: str) -> Path:
    """A decoder or an encoder without a head of these tasks, and its tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)) if kind == "decoder" else BertModel(BertConfig(**BERT))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # spread wide enough that texts matter
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    (plain_tokenizer() if kind == "decoder" else wordpiece_tokenizer()).save_pretrained(folder)
    return folder
