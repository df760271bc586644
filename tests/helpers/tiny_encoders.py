"""Folders of tiny random encoders, as sentence-transformers writes them: the oracle is transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_models
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

WORDS = ("the", "a", "cat", "dog", "sat", "slept", "on", "mat", "red", "blue", "ball", "lost", "her", "his", "it")
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 66,
}
KINDS = {
    "bert": (BertModel, BertConfig),
    "roberta": (RobertaModel, RobertaConfig),
    "xlm": (XLMRobertaModel, XLMRobertaConfig),
}


def save(folder: Path, kind: str = "bert", *, pooling: str | None = "mean_tokens", **changes: Any) -> PreTrainedModel:
    """Make an encoder with its tokenizer, write both to `folder`, and return the encoder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_truncation(8)  # as many such files have; neither counts
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    network, config = KINDS[kind]
    sizes = {**SIZES, "vocab_size": len(vocabulary), "type_vocab_size": 2 if kind == "bert" else 1, "pad_token_id": 0}
    model = tiny_models.make(kind, lambda: network(config(**sizes | changes)))
    model.save_pretrained(folder)
    if pooling is not None:
        write_pooling(folder, pooling)
    return model


def write_pooling(folder: Path, pooling: str) -> None:
    """Write how embeddings are made, as sentence-transformers does."""
    types = ("Transformer", "Pooling", "Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}
        for index, (name, path) in enumerate(zip(types, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {
        f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **flags}))


def expected(model: PreTrainedModel, token_ids: tuple[int, ...], mode: str) -> torch.Tensor:
    """The pooled hidden states of a text alone."""
    with torch.no_grad():
        hidden = model(torch.tensor([token_ids])).last_hidden_state[0]
    return {"mean_tokens": hidden.mean(0), "cls_token": hidden[0], "lasttoken": hidden[-1]}[mode]
