"""Tiny models of transformers with random weights, of every model type that is tried."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from qst_tune.errors import UserError
from qst_tune.generation.batch import answer_batch
from qst_tune.generation.sampling import Sampling
from qst_tune.generation.sequence import CachedSequence

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 256,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 256,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "conv_dim": 64,
    "block_dim": 64,
    "altup_num_inputs": 2,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
}
# What a type needs in addition or instead; None: its own default.
MLA = {"head_dim": None, "num_key_value_heads": 4}
SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "minicpm3": MLA,
    "falcon": {"head_dim": None},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gemma4_text": {"head_dim": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    },
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"], "hybrid_layer_ids": [1, 3]},
}
TYPES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "phi3",
    "opt",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "llama4_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "mixtral",
    "ministral",
    "ministral3",
    "gpt_oss",
    "smollm3",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm",
    "glm4",
    "glm4_moe",
    "cohere",
    "cohere2",
    "exaone4",
    "lfm2",
    "lfm2_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "gpt_neox",
    "gptj",
    "gpt2",
    "gpt_neo",
    "gpt_bigcode",
    "stablelm",
    "starcoder2",
    "phi",
    "phimoe",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "ernie4_5",
    "ernie4_5_moe",
    "seed_oss",
    "apertus",
    "nemotron",
    "bloom",
    "mamba",
    "mamba2",
    "minimax",
    "arcee",
    "dots1",
    "bitnet",
    "helium",
    "diffllama",
    "qwen2_moe",
    "persimmon",
    "codegen",
    "mpt",
    "xglm",
    "biogpt",
    "jamba",
    "zamba2",
    "bamba",
    "nemotron_h",
    "flex_olmo",
    "vaultgemma",
    "minicpm3",
    "hyperclovax",
]


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A configuration of some thousand parameters."""
    default = AutoConfig.for_model(model_type)
    wanted = {**SIZES, **SPECIAL.get(model_type, {}), **changes}
    known = {
        name: value
        for name, value in wanted.items()
        if value is not None and (name in SPECIAL.get(model_type, {}) or hasattr(default, name))
    }
    return AutoConfig.for_model(model_type, **known)


def tiny_model(model_type: str, **changes: Any) -> Any:
    """A model with random weights, in evaluation mode, fp32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        tiny_config(model_type, **changes), dtype=torch.float32
    )
    # transformers leaves zeros for the padding token, which published models do not have. Where it
    # comes first all states are zero, and the gradient of each norm is 1 / eps.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.02)
    return model.eval()


def saved_models(root: Path, model_types: Iterable[str]) -> dict[str, Path]:
    """Directories of tiny models, by their types."""
    for model_type in model_types:
        tiny_model(model_type).save_pretrained(root / model_type)
    return {model_type: root / model_type for model_type in model_types}


# What a type cannot do, and why.
WITH_STATE = [
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "granitemoehybrid",
    "lfm2",
    "lfm2_moe",
    "falcon_h1",
    "falcon_mamba",
    "mamba",
    "mamba2",
    "minimax",
    "jamba",
    "zamba2",
    "bamba",
    "nemotron_h",
]
CANNOT_PACK = {
    **dict.fromkeys(WITH_STATE, "carries a state along the row"),
    "bloom": "separates packed samples in no way that is known here",  # ALiBi of the 2-d mask
}
CANNOT_GENERATE = {"minimax": "takes no cache but its own"}


def tokens_of(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(1))


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def two_samples() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Tokens of 20 and of 9, one longer than the sliding windows, and where both are in one row."""
    sample = torch.tensor([0] * 20 + [1] * 9)
    packed = {
        "mask": (torch.ones(29, 29).tril().bool() & (sample[:, None] == sample))[None],
        "input_pos": torch.cat([torch.arange(20), torch.arange(9)])[None],
    }
    return tokens_of(20, 1), tokens_of(9, 1), packed


@torch.no_grad()
def assert_rows_give_what_they_give_alone(
    model: Any, model_type: str, *, atol: float = 1e-5
) -> None:
    """Padded on the left, packed, over caches and in a batch of answers; fp32 on a CPU."""
    tokens = tokens_of(20)
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[1, :7] = False
    together = model(tokens * padding, mask=padding)
    torch.testing.assert_close(together[1:, 7:], model(tokens[1:, 7:]), rtol=0, atol=atol)
    first, second, packed = two_samples()
    both = torch.cat([first, second], dim=1)
    if model_type in CANNOT_PACK:
        with pytest.raises(UserError, match=CANNOT_PACK[model_type]):
            model(both, **packed)
    else:
        expected = torch.cat([model(first), model(second)], dim=1)
        torch.testing.assert_close(model(both, **packed), expected, rtol=0, atol=atol)
    if model_type in CANNOT_GENERATE:
        return
    row = first[0].tolist()
    torch.testing.assert_close(
        CachedSequence(model).next_logits(row), model(first)[0, -1], rtol=0, atol=atol
    )
    greedy: dict[str, Any] = {"sampling": Sampling(), "stop_tokens": [], "max_new_tokens": 3}
    answers = answer_batch(model, [row, row[5:12]], **greedy)
    assert answers == [answer_batch(model, [p], **greedy)[0] for p in (row, row[5:12])]
