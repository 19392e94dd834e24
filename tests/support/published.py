"""``config.json`` of published models, as far as it says what they compute, and their sizes.

Transcribed; the number of parameters that each model's page gives checks it.
"""

import json
from pathlib import Path
from typing import Any

from tests.support.checkpoints import hf_config

_LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _sizes(layers: int, width: int, inner: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _qwen2_5(*sizes: int, vocab_size: int = 152_064, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        **_sizes(*sizes),
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32_768,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }


def _qwen3(*sizes: int, tied: bool = False) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        **_sizes(*sizes),
        "vocab_size": 151_936,
        "head_dim": 128,
        "attention_bias": False,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "max_window_layers": 36,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }


def _gemma(*sizes: int) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        **_sizes(*sizes),
        "vocab_size": 256_000,
        "head_dim": 256,
        "attention_bias": False,
        "hidden_act": "gelu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
    }


def _gemma2(*sizes: int, head_dim: int = 256, scalar: int = 256) -> dict[str, Any]:
    return {
        **_gemma(*sizes),
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    }


def _phi3(*sizes: int, **further: Any) -> dict[str, Any]:
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        **_sizes(*sizes),
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        **further,
    }


def _opt(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        "vocab_size": 50_272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "do_layer_norm_before": True,
    }


# name of our config: (config.json, number of parameters)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "llama3_3/70B": (
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **_sizes(80, 8192, 28_672, 64, 8),
            "vocab_size": 128_256,
            "head_dim": 128,
            "attention_bias": False,
            "hidden_act": "silu",
            "max_position_embeddings": 131_072,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": _LLAMA3_SCALING,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": False,
        },
        70_553_706_496,
    ),
    "mistral/7B": (
        {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            **_sizes(32, 4096, 14_336, 32, 8),
            "vocab_size": 32_768,
            "hidden_act": "silu",
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        7_248_023_552,
    ),
    "qwen2_5/0.5B": (_qwen2_5(24, 896, 4864, 14, 2, vocab_size=151_936, tied=True), 494_032_768),
    "qwen2_5/1.5B": (_qwen2_5(28, 1536, 8960, 12, 2, vocab_size=151_936, tied=True), 1_543_714_304),
    "qwen2_5/3B": (_qwen2_5(36, 2048, 11_008, 16, 2, vocab_size=151_936, tied=True), 3_085_938_688),
    "qwen2_5/7B": (_qwen2_5(28, 3584, 18_944, 28, 4), 7_615_616_512),
    "qwen2_5/14B": (_qwen2_5(48, 5120, 13_824, 40, 8), 14_770_033_664),
    "qwen2_5/32B": (_qwen2_5(64, 5120, 27_648, 40, 8), 32_763_876_352),
    "qwen2_5/72B": (_qwen2_5(80, 8192, 29_568, 64, 8), 72_706_203_648),
    "qwen3/0.6B": (_qwen3(28, 1024, 3072, 16, 8, tied=True), 596_049_920),
    "qwen3/1.7B": (_qwen3(28, 2048, 6144, 16, 8, tied=True), 1_720_574_976),
    "qwen3/4B": (_qwen3(36, 2560, 9728, 32, 8, tied=True), 4_022_468_096),
    "qwen3/8B": (_qwen3(36, 4096, 12_288, 32, 8), 8_190_735_360),
    "qwen3/14B": (_qwen3(40, 5120, 17_408, 40, 8), 14_768_307_200),
    "qwen3/32B": (_qwen3(64, 5120, 25_600, 64, 8), 32_762_123_264),
    "gemma/2B": (_gemma(18, 2048, 16_384, 8, 1), 2_506_172_416),
    "gemma/7B": (_gemma(28, 3072, 24_576, 16, 16), 8_537_680_896),
    "gemma2/2B": (_gemma2(26, 2304, 9216, 8, 4), 2_614_341_888),
    "gemma2/9B": (_gemma2(42, 3584, 14_336, 16, 8), 9_241_705_984),
    "gemma2/27B": (_gemma2(46, 4608, 36_864, 32, 16, head_dim=128, scalar=144), 27_227_128_320),
    "phi3/mini": (
        _phi3(
            *(32, 3072, 8192, 32, 32),
            vocab_size=32_064,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            rope_theta=10_000.0,
            sliding_window=2047,
        ),
        3_821_079_552,
    ),
    "phi4/14B": (
        _phi3(
            *(40, 5120, 17_920, 40, 10),
            vocab_size=100_352,
            max_position_embeddings=16_384,
            original_max_position_embeddings=16_384,
            rope_theta=250_000,
            sliding_window=None,
        ),
        14_659_507_200,
    ),
    "opt/125M": (_opt(12, 768, 12), 125_239_296),
    "opt/1.3B": (_opt(24, 2048, 32), 1_315_758_080),
    "opt/2.7B": (_opt(32, 2560, 32), 2_651_596_800),
    "opt/6.7B": (_opt(32, 4096, 32), 6_658_473_984),
    "opt/13B": (_opt(40, 5120, 40), 12_853_473_280),
    "opt/30B": (_opt(48, 7168, 56), 29_974_540_288),
    "opt/66B": (_opt(64, 9216, 72), 65_719_701_504),
}


_SMOLLM2_135M = {
    "vocab_size": 49_152,
    "num_layers": 30,
    "num_heads": 9,
    "num_kv_heads": 3,
    "embed_dim": 576,
    "intermediate_dim": 1536,
    "max_seq_len": 8192,
    "rope_base": 100_000,
    "scale_factor": 1,
}


def write_published(directory: Path, config_name: str) -> str:
    """Write the ``config.json`` of one of our configs' models; SmolLM2-135M's for ``auto/*``."""
    model = config_name.rpartition("_")[0]
    is_any = config_name.startswith("auto/")
    settings = hf_config(_SMOLLM2_135M) if is_any else PUBLISHED[model][0]
    (directory / "config.json").write_text(json.dumps(settings))
    return str(directory)
