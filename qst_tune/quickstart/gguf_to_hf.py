"""Converts a llama.cpp file (GGUF) of a LLaMA-type model to a Hugging Face directory.

transformers 5 cannot do it alone: it refuses to save a model loaded from GGUF, and the tokenizer it
rebuilds from the file drops the pre-tokenizer that splits digits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FloatArray = NDArray[np.float32]

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
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
# llama.cpp's name for "split digits one by one, then GPT-2's byte-level BPE".
_SUPPORTED_PRE_TOKENIZER = "smollm"
# One file, never shards: this is for models of a few hundred MB.
WEIGHTS_NAME = "model.safetensors"


class GGUFFile:
    """Metadata and tensors of a GGUF file; reading it needs the package ``gguf``."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ImportError(
                "reading GGUF files needs the package gguf: pip install 'qst_tune[quickstart]'"
            ) from error
        self._dequantize = gguf.quants.dequantize
        self._reader = gguf.GGUFReader(path)

    def __getitem__(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def get(self, key: str) -> Any:
        """Return a metadata value, or None where the file has no such key."""
        return self[key] if key in self._reader.fields else None

    def tensor_names(self) -> list[str]:
        """Return llama.cpp's names of the tensors."""
        return [tensor.name for tensor in self._reader.tensors]

    def tensors(self) -> Iterator[tuple[str, FloatArray]]:
        """Yield (llama.cpp's name, dequantised fp32 array in PyTorch's axis order)."""
        for tensor in self._reader.tensors:
            yield tensor.name, self._dequantize(tensor.data, tensor.tensor_type)


def convert_gguf(path: Path, directory: Path) -> None:
    """Write weights, config and tokenizer of a GGUF file as a Hugging Face directory.

    Weights are stored in fp32: a 4-bit value times an fp16 scale plus an fp16 offset has more
    significant bits than bf16 holds, and only unrounded weights can be quantised back to the same
    codes. Another architecture than "llama", or another kind of tokenizer, is a ValueError.
    """
    file = GGUFFile(path)
    if file["general.architecture"] != "llama":
        raise ValueError(
            f"architecture of {path.name} is {file['general.architecture']!r}; only 'llama' "
            "can be converted"
        )
    _write_json(directory / "config.json", hf_config(file))
    _write_json(directory / "generation_config.json", _special_token_ids(file))
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(file))
    _build_tokenizer(file).save(str(directory / "tokenizer.json"))
    # transformers refuses a safetensors file without this piece of metadata.
    save_file(hf_weights(file), directory / WEIGHTS_NAME, metadata={"format": "pt"})


def hf_weights(file: GGUFFile) -> dict[str, FloatArray]:
    """Return the state dict under Hugging Face's names, fp32, without a tied LM head."""
    num_heads = {
        "attn_q": file["llama.attention.head_count"],
        "attn_k": file["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, weight in file.tensors():
        kind = name.split(".")[-2]
        if kind in num_heads:
            weight = undo_rope_permutation(weight, num_heads[kind])
        weights[_hf_name(name)] = np.ascontiguousarray(weight, dtype=np.float32)
    return weights


def undo_rope_permutation(weight: FloatArray, num_heads: int) -> FloatArray:
    """Reorder the rows of a q or k projection from llama.cpp's to Hugging Face's convention.

    llama.cpp rotates neighbouring features (0, 1), (2, 3), ... of a head; Hugging Face rotates
    feature i with feature i + head_dim / 2. Forgetting this gives a model that loads without an
    error and has perplexity 464 instead of 10.

    Args:
        weight (FloatArray): ``[num_heads * head_dim, embed_dim]``.
        num_heads (int): heads of this projection.

    Returns:
        FloatArray: same shape, rows reordered within each head.
    """
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """Return config.json's content.

    ``rope_theta`` is there twice: transformers 4 and other tools read it at the top level,
    transformers 5 inside ``rope_parameters``.
    """
    embed_dim = file["llama.embedding_length"]
    num_heads = file["llama.attention.head_count"]
    rope_theta = file["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(file["tokenizer.ggml.tokens"]),
        "hidden_size": embed_dim,
        "intermediate_size": file["llama.feed_forward_length"],
        "num_hidden_layers": file["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": file["llama.attention.head_count_kv"],
        "head_dim": embed_dim // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": file["llama.context_length"],
        # Stored as fp32; seven digits give back the number that was meant (1e-05).
        "rms_norm_eps": float(f"{file['llama.attention.layer_norm_rms_epsilon']:.6e}"),
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in file.tensor_names(),
        "torch_dtype": "float32",
        **_special_token_ids(file),
    }


def _hf_name(name: str) -> str:
    if name in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[name]
    _, layer, kind, suffix = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def _special_token_ids(file: GGUFFile) -> dict[str, Any]:
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{hf}_token_id": file.get(f"tokenizer.ggml.{gg}_token_id") for hf, gg in kinds.items()}


def _tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    tokens = file["tokenizer.ggml.tokens"]
    kinds = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {hf: file.get(f"tokenizer.ggml.{gg}_token_id") for hf, gg in kinds.items()}
    special = {f"{hf}_token": tokens[i] for hf, i in ids.items() if i is not None}
    return {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would rebuild it without
        # the digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": file.get("tokenizer.chat_template"),
        **special,
    }


def _build_tokenizer(file: GGUFFile) -> Tokenizer:
    kind = file["tokenizer.ggml.pre"]
    if kind != _SUPPORTED_PRE_TOKENIZER:
        raise ValueError(
            f"pre-tokenizer of the GGUF file is {kind!r}; only {_SUPPORTED_PRE_TOKENIZER!r} "
            "can be converted"
        )
    tokens = file["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, file["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, token_type in types if token_type == _CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
