"""Estimated memory of the most used open models: the table of docs/models.md.

    python -m benchmarks.models
    python -m benchmarks.models --only Qwen/Qwen3-8B google/gemma-3-4b-it

No weights or hub are needed: :data:`MODELS` has the sizes of each published ``config.json``; what
is not named is the default of transformers' configuration class. The number of parameters of the
text model that is built from them is printed beside the published one.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig

from qst_tune.backbone.loading import backbone_on_meta
from qst_tune.config.file import parse_config
from qst_tune.config.keys import typed
from qst_tune.config.schema import EstimateConfig
from qst_tune.estimation.batch_peaks import Shorten, timeline_of_fewer_layers
from qst_tune.estimation.fake_device import allocate_fake, fake_tensors
from qst_tune.estimation.step import CUDA_GRANULARITY, Setup, Shape, own_setup, trace_step
from qst_tune.estimation.tracker import StorageTracker, Timeline
from qst_tune.modules.memory import GIB

CONFIG = Path(__file__).parent.parent / "configs" / "auto" / "qst.yaml"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """A published model.

    Args:
        billions (float): published parameters, of the text where that is published.
        config (dict[str, Any]): of ``config.json``.
    """

    billions: float
    config: dict[str, Any]


def _model(
    billions: float,
    model_type: str,
    sizes: tuple[int, ...],
    vocabulary: int,
    *,
    tied: bool = False,
    **more: Any,
) -> Model:
    """``sizes``: width, MLP width, layers, heads, key-value heads, channels a head if given."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    named = dict(zip((*names, "num_key_value_heads", "head_dim"), sizes, strict=False))
    # Token ids of the class's own vocabulary would lie beyond a smaller one.
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {"vocab_size": vocabulary, "tie_word_embeddings": tied, **ids}
    return Model(billions, {"model_type": model_type, **common, **named, **more})


def _with_images(model: Model, model_type: str) -> Model:
    """The same language model inside a vision-language model."""
    tied = model.config["tie_word_embeddings"]
    config = {"model_type": model_type, "tie_word_embeddings": tied, "text_config": model.config}
    return Model(model.billions, config)


def _mixture(experts: int, each: int, width: int, **more: Any) -> dict[str, Any]:
    return {"num_experts_per_tok": each, "moe_intermediate_size": width,
            "num_experts": experts, **more}  # fmt: skip


_GEMMA4: dict[str, Any] = {"final_logit_softcapping": 30.0, "global_head_dim": 512}
_GEMMA4_LARGE: dict[str, Any] = {
    **_GEMMA4,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
}
_GPT_OSS: dict[str, Any] = {"num_experts_per_tok": 4, "sliding_window": 128}
_GEMMA3: dict[str, Any] = {"sliding_window": 1024}

MODELS: dict[str, Model] = {
    "google/gemma-3-4b-it": _with_images(
        _model(3.88, "gemma3_text", (2560, 10240, 34, 8, 4, 256), 262208, tied=True, **_GEMMA3),
        "gemma3",
    ),
    "google/gemma-3-12b-it": _with_images(
        _model(11.8, "gemma3_text", (3840, 15360, 48, 16, 8, 256), 262208, tied=True, **_GEMMA3),
        "gemma3",
    ),
    "google/gemma-3-27b-it": _with_images(
        _model(27.0, "gemma3_text", (5376, 21504, 62, 32, 16, 128), 262208, tied=True, **_GEMMA3),
        "gemma3",
    ),
    "google/gemma-4-E4B-it": _with_images(
        _model(7.5, "gemma4_text", (2560, 10240, 42, 8, 2, 256), 262144, tied=True,
               num_kv_shared_layers=18, **_GEMMA4), "gemma4"),
    "google/gemma-4-26B-A4B-it": _with_images(
        _model(25.2, "gemma4_text", (2816, 2112, 30, 16, 8, 256), 262144, tied=True,
               num_global_key_value_heads=2, enable_moe_block=True, top_k_experts=8,
               **_GEMMA4_LARGE, num_experts=128, moe_intermediate_size=704), "gemma4"),
    "google/gemma-4-31B-it": _with_images(
        _model(30.7, "gemma4_text", (5376, 21504, 60, 32, 16, 256), 262144, tied=True,
               num_global_key_value_heads=4, **_GEMMA4_LARGE), "gemma4"),
    "openai/gpt-oss-20b": _model(
        20.9, "gpt_oss", (2880, 2880, 24, 64, 8, 64), 201088, num_local_experts=32, **_GPT_OSS
    ),
    "openai/gpt-oss-120b": _model(
        116.8, "gpt_oss", (2880, 2880, 36, 64, 8, 64), 201088, num_local_experts=128, **_GPT_OSS
    ),
    "Qwen/Qwen3-8B": _model(8.19, "qwen3", (4096, 12288, 36, 32, 8, 128), 151936),
    "Qwen/Qwen3-30B-A3B": _model(
        30.5, "qwen3_moe", (2048, 6144, 48, 32, 4, 128), 151936, **_mixture(128, 8, 768)
    ),
    "Qwen/Qwen3.5-9B": _with_images(
        _model(9, "qwen3_5_text", (4096, 12288, 32, 16, 4, 256), 248320), "qwen3_5"
    ),
    "Qwen/Qwen3.5-35B-A3B": _with_images(
        _model(35, "qwen3_5_moe_text", (2048, 512, 40, 16, 2, 256), 248320,
               **_mixture(256, 8, 512, shared_expert_intermediate_size=512)), "qwen3_5_moe"),
    "Qwen/Qwen2.5-7B-Instruct": _model(7.62, "qwen2", (3584, 18944, 28, 28, 4), 152064),
    "Qwen/Qwen3-VL-8B-Instruct": _with_images(
        _model(8.19, "qwen3_vl_text", (4096, 12288, 36, 32, 8, 128), 151936), "qwen3_vl"
    ),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": _with_images(
        _model(109, "llama4_text", (5120, 8192, 48, 40, 8, 128), 202048,
               intermediate_size_mlp=16384, num_local_experts=16, num_experts_per_tok=1,
               interleave_moe_layer_step=1), "llama4"),
    "meta-llama/Llama-3.1-8B-Instruct": _model(8.03, "llama", (4096, 14336, 32, 32, 8), 128256),
    "meta-llama/Llama-3.2-3B-Instruct": _model(
        3.21, "llama", (3072, 8192, 28, 24, 8, 128), 128256, tied=True
    ),
    "meta-llama/Llama-3.3-70B-Instruct": _model(70.55, "llama", (8192, 28672, 80, 64, 8), 128256),
    "meta-llama/Llama-2-7b-hf": _model(6.74, "llama", (4096, 11008, 32, 32, 32), 32000),
    "mistralai/Ministral-3-8B-Instruct-2512": _with_images(
        _model(8.4, "ministral3", (4096, 14336, 34, 32, 8, 128), 131072), "mistral3"
    ),
    "mistralai/Mistral-Small-24B-Instruct-2501": _model(
        23.57, "mistral", (5120, 32768, 40, 32, 8, 128), 131072, sliding_window=None
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": _model(
        7.25, "mistral", (4096, 14336, 32, 32, 8), 32768, sliding_window=None
    ),
    "HuggingFaceTB/SmolLM3-3B": _model(
        3.08, "smollm3", (2048, 11008, 36, 16, 4), 128256, tied=True
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _model(
        1.71, "llama", (2048, 8192, 24, 32, 32), 49152, tied=True
    ),
    "deepseek-ai/DeepSeek-V3": _model(
        671.0, "deepseek_v3", (7168, 18432, 61, 128, 128), 129280, n_routed_experts=256,
        moe_intermediate_size=2048, first_k_dense_replace=3, q_lora_rank=1536, kv_lora_rank=512
    ),
    "microsoft/phi-4": _model(14.66, "phi3", (5120, 17920, 40, 40, 10), 100352),
    "microsoft/Phi-3-mini-4k-instruct": _model(3.82, "phi3", (3072, 8192, 32, 32, 32), 32064),
    "google/gemma-2-9b-it": _model(
        9.24, "gemma2", (3584, 14336, 42, 16, 8, 256), 256000, tied=True
    ),
    "google/gemma-7b-it": _model(8.54, "gemma", (3072, 24576, 28, 16, 16, 256), 256000, tied=True),
    "allenai/OLMo-2-1124-7B-Instruct": _model(7.30, "olmo2", (4096, 11008, 32, 32, 32), 100352),
    "allenai/Olmo-3-7B-Instruct": _model(
        7.30, "olmo3", (4096, 11008, 32, 32, 32), 100278, sliding_window=4096
    ),
    "zai-org/GLM-4-9B-0414": _model(9.40, "glm4", (4096, 13696, 40, 32, 2, 128), 151552),
    "zai-org/GLM-4.5-Air": _model(
        106, "glm4_moe", (4096, 10944, 46, 96, 8, 128), 151552, n_routed_experts=128,
        moe_intermediate_size=1408, num_experts_per_tok=8, first_k_dense_replace=1,
        use_qk_norm=False, attention_bias=True
    ),
    "facebook/opt-6.7b": Model(6.66, {"model_type": "opt", "hidden_size": 4096, "ffn_dim": 16384,
        "num_hidden_layers": 32, "num_attention_heads": 32, "word_embed_proj_dim": 4096}),
}  # fmt: skip


def counted(directory: Path) -> float:
    """Parameters of a directory's text model, in billions; a tied head counts once."""
    model = backbone_on_meta(directory).model
    return float(sum(parameter.numel() for parameter in model.parameters())) / 1e9


def peak_gib(directory: Path, shape: Shape, embedding_quantization: str) -> float:
    """Estimated peak of a training step with ``auto/qst``, on CUDA in bf16.

    Of the layers between two side blocks one of each kind is run, and the weights of the others
    are added: as exact as all of them (tests/estimation/test_batch_peaks.py), and quicker.
    """
    raw = parse_config(["--config", str(CONFIG), f"checkpoint_dir={directory}",
                        f"model.embedding_quantization={embedding_quantization}"])  # fmt: skip
    cfg = typed(raw, EstimateConfig)
    build, left_out = partial(own_setup, cfg, DTYPE), 0

    def trace(shorten: Shorten) -> Timeline:
        nonlocal left_out
        left_out = weight_bytes(own_setup(cfg, DTYPE)) - weight_bytes(
            own_setup(cfg, DTYPE), shorten
        )
        return trace_step(build(), cfg, shape, device="cuda", shorten=shorten)[1]

    timeline = timeline_of_fewer_layers(build().model, trace)
    assert timeline is not None
    return float(max(timeline.peaks()) + left_out) / GIB


def weight_bytes(setup: Setup, shorten: Shorten | None = None) -> int:
    """Bytes of a model on CUDA, perhaps without the layers that are left out."""
    if shorten is not None:
        shorten(setup.model)
    tracker = StorageTracker(CUDA_GRANULARITY)
    with fake_tensors(DTYPE):
        allocate_fake(setup.model, "cuda")
        tracker.register([*setup.model.parameters(), *setup.model.buffers()], "frozen weights")
        return tracker.timeline().start_bytes


def rows(names: list[str], shape: Shape) -> Iterator[str]:
    """The table, a line at a time."""
    yield "| `checkpoint_dir` | billions counted, published | GiB | with int8 embedding |"
    yield "| --- | --- | --- | --- |"
    for name in names:
        with TemporaryDirectory() as made:
            directory = Path(made)
            AutoConfig.for_model(**MODELS[name].config).save_pretrained(directory)
            billions, published = counted(directory), MODELS[name].billions
            peaks = " | ".join(f"{peak_gib(directory, shape, form):.1f}" for form in FORMS)
        yield f"| `{name}` | {billions:.2f}, {published:g} | {peaks} |"


FORMS = ("none", "int8")


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, metavar="ORG/NAME", default=[*MODELS])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    asked = parser.parse_args(arguments)
    for row in rows(asked.only, Shape(asked.batch_size, asked.seq_len)):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
