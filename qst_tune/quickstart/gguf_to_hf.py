"""Converts llama.cpp's file (GGUF) of SmolLM2-135M-Instruct to a Hugging Face directory.

transformers 5 cannot do it alone: it refuses to save a model loaded from GGUF, the tokenizer it
rebuilds from the file drops the pre-tokenizer that splits digits, and reading takes it 49 s. The
file is one that was checked by its hash, so what its metadata says of the model is written here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qst_tune.errors import UserError

FloatArray = NDArray[np.float32]

# One file, never shards: this is for a model of a few hundred MB.
WEIGHTS_NAME = "model.safetensors"
_NUM_HEADS, _NUM_KV_HEADS = 9, 3
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": _NUM_HEADS,
    "num_key_value_heads": _NUM_KV_HEADS,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    # Twice: transformers 4 and other tools read it here, transformers 5 inside rope_parameters.
    "rope_theta": 100000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    **_IDS,
}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Value of `tokenizer.ggml.token_type` for tokens such as <|im_start|> (gguf.TokenType.CONTROL).
_CONTROL_TOKEN = 3


def convert_gguf(path: Path, directory: Path) -> None:
    """Write weights, config and tokenizer of a GGUF file as a Hugging Face directory.

    Weights are stored in fp32: a 4-bit value times an fp16 scale plus an fp16 offset has more
    significant bits than bf16 holds, and only unrounded weights can be quantised back to the same
    codes.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            "reading GGUF files needs the package gguf: pip install 'qst_tune[quickstart]'"
        ) from error
    reader = GGUFReader(path)
    _write_json(directory / "config.json", _CONFIG)
    _write_json(directory / "generation_config.json", _IDS)
    tokenizer_config = {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would rebuild it without
        # the digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "chat_template"),
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _build_tokenizer(reader).save(str(directory / "tokenizer.json"))
    # transformers refuses a safetensors file without this piece of metadata.
    save_file(_weights(reader), directory / WEIGHTS_NAME, metadata={"format": "pt"})


def undo_rope_permutation(weight: FloatArray, num_heads: int) -> FloatArray:
    """Reorder the rows of a q or k projection from llama.cpp's to Hugging Face's convention.

    llama.cpp rotates neighbouring features (0, 1), (2, 3), ... of a head; Hugging Face rotates
    feature i with feature i + head_dim / 2. Forgetting this gives a model that loads without an
    error and has perplexity 464 instead of 10. ``weight`` is ``[num_heads * head_dim, embed_dim]``.
    """
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _weights(reader: Any) -> dict[str, FloatArray]:
    """Return the state dict under Hugging Face's names, fp32; the LM head is the embedding."""
    from gguf.quants import dequantize

    num_heads = {"attn_q": _NUM_HEADS, "attn_k": _NUM_KV_HEADS}
    weights = {}
    for tensor in reader.tensors:
        *layer, kind, _ = tensor.name.split(".")  # blk.3.attn_q.weight, output_norm.weight
        weight = dequantize(tensor.data, tensor.tensor_type)
        if kind in num_heads:
            weight = undo_rope_permutation(weight, num_heads[kind])
        name = f"model.layers.{layer[1]}.{_NAMES[kind]}" if layer else _NAMES[kind]
        weights[f"{name}.weight"] = np.ascontiguousarray(weight, dtype=np.float32)
    return weights


def _build_tokenizer(reader: object) -> Tokenizer:
    tokens = _field(reader, "tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, _field(reader, "token_type"), strict=True)
    control = [token for token, token_type in types if token_type == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def _field(reader: Any, name: str) -> Any:
    return reader.fields[f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}"].contents()


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
