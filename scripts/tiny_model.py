"""Writes untrained chat models with a byte tokenizer, for tests and measurements. Downloads nothing."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write_chat_model(folder: Path, **changes: Any) -> Path:
    """Write a tiny Llama model with random weights, the same every time, and return its folder.

    `changes` are fields of its LlamaConfig.
    """
    tokenizer = write_tokenizer(folder)
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16384,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**(shape | changes))).save_pretrained(folder)
    return folder


def write_shape(folder: Path, shape: Path) -> Path:
    """Write a model without weights that has a real architecture's config.json, for vLLM's `load_format: dummy`.

    Return its folder.
    """
    config = json.loads(shape.read_text())
    write_tokenizer(folder, config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tokenizer(folder: Path, size: int = 0) -> PreTrainedTokenizerFast:
    """Write a tokenizer with one token per byte and return it. Unused tokens fill its vocabulary up to `size`."""
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *byte_tokens]
    tokens += [f"<{index}>" for index in range(len(tokens), size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    return fast
