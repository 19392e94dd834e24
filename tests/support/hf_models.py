"""Tiny models of transformers, saved as directories: three or more of each family we read."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from qst_tune.backbone.hf_checkpointer import HFCheckpointer
from qst_tune.backbone.torchtune_loading import load_backbone
from tests.support import numbers
from tests.support.numbers import randomize_

# 307 is prime and more than the tokens of `write_chat_tokenizer`; 100 is not 4 x 48.
SIZES = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 100,
    "max_position_embeddings": 64,
}
OPT_SIZES = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 100,
    "max_position_embeddings": 64,
}
# Within rows of 24 tokens, so that each kind of scaling changes most of the frequencies.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
# 6 of a head's 12 channels turn, so there are 3 frequencies.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.1, 2.0, 3.5],
    "long_factor": [2.0, 9.0, 30.0],
    "partial_rotary_factor": 0.5,
}

# "<family> <what is special>": (class of transformers' config, its arguments)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama tied llama3": ("LlamaConfig", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama head_dim biases linear": (
        "LlamaConfig",
        {"head_dim": 20, "attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR},
    ),
    "llama yarn": ("LlamaConfig", {"rope_parameters": YARN, "rms_norm_eps": 1e-2}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral head_dim tied": (
        "MistralConfig",
        {"head_dim": 20, "tie_word_embeddings": True, "sliding_window": None},
    ),
    "mistral window dynamic": (
        "MistralConfig",
        {"num_key_value_heads": 1, "sliding_window": 24, "rope_parameters": DYNAMIC},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2 tied linear": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "qwen2 window yarn": (
        "Qwen2Config",
        {
            "rope_parameters": YARN,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "qwen3 tied yarn": (
        "Qwen3Config",
        {"head_dim": 12, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "qwen3 biases": ("Qwen3Config", {"head_dim": 12, "attention_bias": True}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 4, "sliding_window": 24}),
    "phi3 grouped tied": ("Phi3Config", {"tie_word_embeddings": True}),
    "phi3 longrope partial": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
    ),
    "gemma": ("GemmaConfig", {"head_dim": 20, "num_key_value_heads": 1}),
    "gemma grouped": ("GemmaConfig", {"head_dim": 12}),
    "gemma dynamic": ("GemmaConfig", {"head_dim": 12, "rope_parameters": DYNAMIC}),
    # Caps so low that most scores and logits reach them.
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 20,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.0,
            "sliding_window": 24,
        },
    ),
    "gemma2 uncapped": (
        "Gemma2Config",
        {
            "head_dim": 12,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window": 64,
        },
    ),
    "gemma2 one kv head": ("Gemma2Config", {"head_dim": 12, "num_key_value_heads": 1}),
    "opt": ("OPTConfig", OPT_SIZES),
    "opt post-norm narrow": (
        "OPTConfig",
        {**OPT_SIZES, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
    ),
    "opt narrow": ("OPTConfig", {**OPT_SIZES, "word_embed_proj_dim": 20}),
}
# One of each family, the one that asks most.
FAMILIES = {
    "llama": "llama tied llama3",
    "mistral": "mistral window dynamic",
    "qwen2": "qwen2 window yarn",
    "qwen3": "qwen3 tied yarn",
    "phi3": "phi3 longrope partial",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "opt": "opt post-norm narrow",
}


def hf_model(case: str) -> Any:
    """transformers' model of a case, every parameter random, norms and biases too."""
    name, arguments = CASES[case]
    sizes = {} if name == "OPTConfig" else SIZES
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
    config = getattr(transformers, name)(**{**sizes, **tokens, **arguments})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize_(model)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".bias"):
                parameter.normal_(std=0.3)  # positive ones would drown the tokens
    if name == "OPTConfig":
        nn.init.normal_(model.model.decoder.embed_positions.weight)
    return model.float().eval()


def save_hf_model(directory: Path, case: str, **settings: Any) -> Any:
    """Save a case as transformers does; ``settings`` go into its ``config.json``."""
    model = hf_model(case)
    model.save_pretrained(directory)
    edit_config(directory, **settings)
    return model


def loaded(builder, directory: Path, **arguments):
    """A model as recipes make it: built on meta, filled file by file."""
    cpu = torch.device("cpu")
    with torch.device("meta"):
        model = builder(str(directory), **arguments)
    load_backbone(model, HFCheckpointer(str(directory)), dtype=torch.float32, device=cpu)
    if hasattr(model, "initialize_side"):
        model.initialize_side(cpu)
    return model.eval()


def edit_config(directory: Path, *removed: str, **settings: Any) -> None:
    path = directory / "config.json"
    content = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in removed}))


def write_old_style(directory: Path) -> None:
    """Change ``config.json`` to what transformers 4 wrote, as in most published ones."""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    rope = content.pop("rope_parameters", None)
    content["torch_dtype"] = content.pop("dtype")
    content.pop("layer_types", None)
    if rope is not None:
        content["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            content["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        rope["type"] = rope.pop("rope_type")
        content["rope_scaling"] = None if rope["type"] == "default" else rope
    path.write_text(json.dumps(content))


def padded_batch(side: str, lengths: tuple[int, ...] = (24, 9, 1)):
    """Token ids and a mask of rows of these lengths, padded on one side with id 3."""
    return numbers.padded_batch(side, lengths, pad_id=3, vocab_size=SIZES["vocab_size"])
