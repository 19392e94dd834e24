"""What each ``model_type`` of transformers is here: which builder, with which numbers.

To add a family, write a function like those below and name it in :data:`FAMILIES`. It takes every
setting that changes the computation from the config, with the default of transformers' own class,
and refuses the values that its builder cannot express; docs/models.md has an example.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torchtune.models.gemma import gemma as torchtune_gemma
from torchtune.modules import TransformerDecoder

from qst_tune.models.gemma2 import gemma2 as gemma2_decoder
from qst_tune.models.hf.config import HFConfig
from qst_tune.models.hf.folder import read_settings
from qst_tune.models.hf.rope import (
    Rope,
    can_turn_neighbours,
    halves_rope,
    neighbours_rope,
    read_rope,
)
from qst_tune.models.hf.weights import GEMMA2_MODULES, LLAMA_MODULES, WeightConversion, Weights
from qst_tune.models.opt import opt as opt_decoder
from qst_tune.models.opt_weights import opt_hf_to_tune
from qst_tune.models.rotary_decoder import rotary_decoder

_SILU = {"silu": "silu", "swish": "silu"}
_NOT_TEXT_ALONE = ("vision_config", "audio_config", "text_config")
# transformers reads the plain name of the first Gemma as the approximation that was meant.
_GELU_TANH = {"gelu_pytorch_tanh": "tanh", "gelu": "tanh"}


@dataclass(frozen=True)
class Architecture:
    """A model as its ``config.json`` describes it.

    Args:
        build (Callable[[int], TransformerDecoder]): makes the decoder for so many positions, with
            random weights or on meta.
        convert (Callable[[Weights], Weights]): from Hugging Face's names to the decoder's, of any
            subset of the weights.
        limits (dict[str, int]): settings that bound the length of a row; beyond, the decoder would
            compute something else than the model.
        tied (bool): whether the LM head is the embedding.
    """

    build: Callable[[int], TransformerDecoder]
    convert: Callable[[Weights], Weights]
    limits: dict[str, int]
    tied: bool


def takes_torchtune(folder: Path) -> bool:
    """Tell whether a directory is of a family that is built from torchtune's modules.

    Args:
        folder (Path): a Hugging Face directory.

    Returns:
        bool: by ``model_type`` alone; a setting may still be refused.

    Raises:
        UserError: if there is no ``config.json``.
    """
    settings = read_settings(folder)
    is_text = not any(settings.get(name) for name in _NOT_TEXT_ALONE)
    return is_text and settings.get("model_type") in FAMILIES


def read_architecture(folder: Path) -> Architecture:
    """Read a folder's ``config.json``.

    Args:
        folder (Path): a Hugging Face folder.

    Returns:
        Architecture: every setting of the file is understood.

    Raises:
        UserError: if there is no such file, or the model is not supported, in whole or in one
            setting, naming it.
    """
    settings = read_settings(folder)
    config = HFConfig(folder, settings)
    model_type = config.take("model_type")
    further = [name for name in _NOT_TEXT_ALONE if settings.get(name)]
    if further:
        raise config.problem(
            f"{further[0]}: model_type={model_type!r} is of more than text, which is not supported"
        )
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise config.problem(f"model_type={model_type!r} is not supported, only {known}")
    config.take("quantization_config")  # how weights are stored, not what is computed
    family = FAMILIES[model_type]
    classes = config.take("architectures", [family.model_class])
    if classes != [family.model_class]:
        raise config.problem(f"architectures={classes} is not supported, only {family.model_class}")
    config.choice("is_encoder_decoder", False)
    architecture = family.read(config)
    config.finish()
    return architecture


# Families of Llama's shape.


def _llama(config: HFConfig) -> Architecture:
    config.choice("rope_interleaved", False)
    bias = config.flag("attention_bias", False)
    return _rotary(
        config,
        neighbours=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )


def _mistral(config: HFConfig) -> Architecture:
    config.choice("attention_bias", False)  # which transformers does not read here
    return _rotary(config, neighbours=True, window=_window(config, 4096))


def _qwen2(config: HFConfig) -> Architecture:
    for switch in ("use_mrope", "attention_bias"):
        config.choice(switch, False)
    return _rotary(config, neighbours=False, window=_qwen_window(config), qkv_bias=True)


def _qwen3(config: HFConfig) -> Architecture:
    bias = config.flag("attention_bias", False)
    return _rotary(
        config,
        neighbours=False,
        window=_qwen_window(config),
        head_dim=128,
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
    )


def _phi3(config: HFConfig) -> Architecture:
    config.take("auto_map")  # Phi-3's own code, from before transformers had it
    for switch in ("attention_bias", "mlp_bias", "lm_head_bias"):
        config.choice(switch, False)
    for factor in ("full_attn_mod", "interpolate_factor"):
        config.choice(factor, 1)
    return _rotary(
        config,
        neighbours=False,
        window=_window(config, None),
        norm_eps=1e-5,
        default_original=4096,
        may_be_partial=True,
    )


def _rotary(
    config: HFConfig,
    *,
    neighbours: bool,
    window: int | None = None,
    head_dim: int | None = None,
    norm_eps: float = 1e-6,
    default_original: int | None = None,
    may_be_partial: bool = False,
    **features: bool,
) -> Architecture:
    """A decoder of :func:`rotary_decoder`; ``features`` are its switches.

    ``neighbours``: as torchtune's Llama, where the rotary embedding can be; else as its Qwen2.
    """
    config.choice("hidden_act", "silu", _SILU)
    sizes = _sizes(config, head_dim, norm_eps)
    tied = config.flag("tie_word_embeddings", False)
    rope = read_rope(config, default_original)
    _check_rope(config, rope, sizes["head_dim"], may_be_partial)
    neighbours = neighbours and can_turn_neighbours(rope)
    make_rope = partial(neighbours_rope, like_llama3=tied) if neighbours else halves_rope

    def build(max_seq_len: int) -> TransformerDecoder:
        return rotary_decoder(
            **sizes,
            max_seq_len=max_seq_len,
            rope=make_rope(rope, sizes["head_dim"], max_seq_len),
            tie_word_embeddings=tied,
            **features,
        )

    convert = _conversion(sizes, LLAMA_MODULES, turns_neighbours=neighbours)
    return Architecture(build, convert, _limits(rope, window), tied)


# Gemma.


def _gemma(config: HFConfig) -> Architecture:
    config.choice("hidden_act", "gelu_pytorch_tanh", _GELU_TANH)
    config.choice("hidden_activation", "gelu_pytorch_tanh", _GELU_TANH)
    return _any_gemma(config, torchtune_gemma, LLAMA_MODULES, window=None)


def _gemma2(config: HFConfig) -> Architecture:
    for other_name in ("hidden_act", "sliding_window_size"):  # which transformers does not read
        config.take(other_name)
    config.choice("hidden_activation", "gelu_pytorch_tanh")
    build = partial(
        gemma2_decoder,
        query_pre_attn_scalar=config.number("query_pre_attn_scalar", 256),
        attention_cap=config.limit("attn_logit_softcapping", 50.0),
        logit_cap=config.limit("final_logit_softcapping", 30.0),
    )
    window, slides = _window(config, 4096), _slides(config)
    window = window if slides else None
    return _any_gemma(config, build, GEMMA2_MODULES, window=window)


def _any_gemma(
    config: HFConfig,
    builder: Callable[..., TransformerDecoder],
    modules: dict[str, str],
    *,
    window: int | None,
) -> Architecture:
    config.choice("attention_bias", False)
    config.choice("use_bidirectional_attention", False)
    config.choice("tie_word_embeddings", True)
    sizes = _sizes(config, head_dim=256, norm_eps=1e-6)
    rope = read_rope(config)
    _check_rope(config, rope, sizes["head_dim"], may_be_partial=False)
    if rope.kind not in ("default", "dynamic"):
        raise config.problem(f"rope_scaling of type {rope.kind!r} is not supported for Gemma")

    def build(max_seq_len: int) -> TransformerDecoder:
        return builder(**sizes, max_seq_len=max_seq_len, rope_base=rope.base)

    convert = _conversion(sizes, modules, turns_neighbours=True)
    return Architecture(build, convert, _limits(rope, window), tied=True)


# OPT.


def _opt(config: HFConfig) -> Architecture:
    config.choice("activation_function", "relu")
    config.choice("enable_bias", True)
    config.choice("layer_norm_elementwise_affine", True)
    config.choice("_remove_final_layer_norm", False)
    config.choice("tie_word_embeddings", True)
    embed_dim = config.whole("hidden_size")
    token_dim = config.whole("word_embed_proj_dim", embed_dim)
    longest = config.whole("max_position_embeddings")
    make = partial(
        opt_decoder,
        num_layers=config.whole("num_hidden_layers"),
        num_heads=config.whole("num_attention_heads"),
        embed_dim=embed_dim,
        intermediate_dim=config.whole("ffn_dim"),
        token_dim=None if token_dim == embed_dim else token_dim,
        post_norm=not config.flag("do_layer_norm_before", True),
        vocab_size=config.whole("vocab_size"),
        max_seq_len=longest,
    )

    def build(max_seq_len: int) -> TransformerDecoder:
        decoder = make()  # its table of positions has the size of the checkpoint's
        decoder.max_seq_len = max_seq_len
        return decoder

    convert = partial(opt_hf_to_tune, keep_head=True)
    return Architecture(build, convert, {"max_position_embeddings": longest}, tied=True)


# What several families share.


def _sizes(config: HFConfig, head_dim: int | None, norm_eps: float) -> dict[str, Any]:
    """Arguments of the builders that have one name in all families; the defaults are theirs."""
    embed_dim = config.whole("hidden_size")
    num_heads = config.whole("num_attention_heads")
    return {
        "vocab_size": config.whole("vocab_size"),
        "num_layers": config.whole("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": config.whole("num_key_value_heads", num_heads),
        "head_dim": config.whole("head_dim", head_dim or embed_dim // num_heads),
        "embed_dim": embed_dim,
        "intermediate_dim": config.whole("intermediate_size"),
        "norm_eps": config.number("rms_norm_eps", norm_eps),
    }


def _conversion(
    sizes: dict[str, Any], modules: dict[str, str], *, turns_neighbours: bool
) -> WeightConversion:
    return WeightConversion(
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        turns_neighbours=turns_neighbours,
        modules=modules,
    )


def _check_rope(config: HFConfig, rope: Rope, head_dim: int, may_be_partial: bool) -> None:
    if rope.partial != 1 and not may_be_partial:
        raise config.problem(f"partial_rotary_factor={rope.partial} is not supported for this type")
    dim = int(head_dim * rope.partial)
    if dim % 2 or not 0 < dim <= head_dim:
        raise config.problem(
            f"{dim} of {head_dim} channels of a head would turn, not pairs of them"
        )
    for name in ("short_factor", "long_factor"):
        factors = rope.settings.get(name)
        if factors is not None and len(factors) != dim // 2:
            raise config.problem(f"rope_scaling: {name} has {len(factors)} numbers, not {dim // 2}")


def _window(config: HFConfig, default: int | None) -> int | None:
    window = config.limit("sliding_window", default)
    return None if window is None else int(window)


def _qwen_window(config: HFConfig) -> int | None:
    config.take("max_window_layers")  # which layers have the window; for us, whether any has
    window, slides = _window(config, 4096), _slides(config)
    return window if config.flag("use_sliding_window", False) and slides else None


def _slides(config: HFConfig) -> bool:
    """Tell whether a layer may have a sliding window."""
    kinds = config.take("layer_types", ["sliding_attention"])
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.problem(f"layer_types: {kind!r} is not supported")
    return "sliding_attention" in kinds


def _limits(rope: Rope, window: int | None) -> dict[str, int]:
    name = (
        "original_max_position_embeddings" if rope.kind == "longrope" else "max_position_embeddings"
    )
    return {name: rope.longest, **({"sliding_window": window} if window else {})}


class Family(NamedTuple):
    """A row of the table below.

    Args:
        model_class (str): of transformers, as ``architectures`` names it.
        read (Callable[[HFConfig], Architecture]): takes every setting of the type.
    """

    model_class: str
    read: Callable[[HFConfig], Architecture]


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama),
    "mistral": Family("MistralForCausalLM", _mistral),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3),
    "phi3": Family("Phi3ForCausalLM", _phi3),
    "gemma": Family("GemmaForCausalLM", _gemma),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2),
    "opt": Family("OPTForCausalLM", _opt),
}
