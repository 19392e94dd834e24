"""Section ``unsloth``: Unsloth's QLoRA, in a process of its own, after the others.

Unsloth replaces functions of transformers, PEFT and torch when it is imported, and loads a model
from a directory only: one of random weights is written for it. This module is also the program of
that process, which imports Unsloth first.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu.bench import Bench, Row

UNSLOTH = "Unsloth QLoRA"
LIMIT_S = 90
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def unsloth(bench: "Bench") -> Iterator["Row"]:
    """Start the process, and pass its rows on; they belong to the section ``train``."""
    with TemporaryDirectory() as directory:
        size = "tiny" if bench.sizes.is_tiny else "full"
        lines, error = output_of(directory, str(bench.rounds), size)
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    yield from rows
    if not rows:
        shape = "{} x {}".format(*bench.sizes.shapes[0])
        yield {"section": "train", "method": UNSLOTH, "shape": shape, "error": error}


def output_of(directory: str, *arguments: str) -> tuple[list[str], str]:
    """Run the process; returns what it printed, and the last line of its errors."""
    quiet = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    quiet["UNSLOTH_COMPILE_LOCATION"] = f"{directory}/compiled"
    command = [sys.executable, "-m", "benchmarks.gpu.unsloth", directory, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **quiet},
    ) as process:
        try:
            out, errors = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            errors += f"\nTimeoutError: stopped after {LIMIT_S} s"
    return out.splitlines(), (errors.strip() or "no error").splitlines()[-1][:200]


# The process.


def _main(directory: Path, rounds: int, *, tiny: bool) -> None:
    import unsloth  # before all that it changes

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.trainer_step import trainer_step
    from benchmarks.gpu.turns import Held, Runner

    print(f"unsloth {unsloth.__version__}", file=sys.stderr)
    bench = Bench(tiny=tiny, rounds=rounds)
    bench.begin(LIMIT_S - 40)
    _write_directory(directory, bench)
    model = _load(directory)
    held = Held(model, bench.clock.allocated())
    runner = Runner(UNSLOTH, lambda: held, trainer_step)
    for shape in bench.sizes.shapes:
        for row in bench.steps("train", [runner], shape, min(2, rounds)):
            print(json.dumps(row), flush=True)


def _load(directory: Path) -> Any:
    """Load the model as Unsloth's notebooks do."""
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(directory), max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules=list(LINEARS),
        use_gradient_checkpointing="unsloth",
    )


def _write_directory(directory: Path, bench: "Bench") -> None:
    """Write a Llama of random weights as transformers saves one in bitsandbytes' NF4."""
    from safetensors.torch import save_file

    save_file(_weights(bench), directory / "model.safetensors", metadata={"format": "pt"})
    backbone = bench.sizes.backbone
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": backbone.vocab_size,
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_kv_heads,
        "intermediate_size": backbone.intermediate_dim,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }
    (directory / "config.json").write_text(json.dumps(config))
    _write_tokenizer(directory, backbone.vocab_size)


def _weights(bench: "Bench") -> dict[str, "torch.Tensor"]:
    """Quantise one weight of each shape; all of that shape are the same."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    sizes = bench.sizes.backbone
    width, inner, cached = sizes.embed_dim, sizes.intermediate_dim, sizes.num_kv_heads
    cached *= sizes.head_dim
    shapes = dict.fromkeys(LINEARS, (width, width))
    shapes |= {"k_proj": (cached, width), "v_proj": (cached, width), "down_proj": (width, inner)}
    shapes |= {"gate_proj": (inner, width), "up_proj": (inner, width)}
    parts: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    for shape in set(shapes.values()):
        dense = bench.weights.dense(torch.Size(shape))
        codes, state = quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        parts[shape] = {"weight": codes.cpu()}
        for key, value in state.as_dict(packed=True).items():
            parts[shape][f"weight.{key}"] = value.cpu()
    ends = {"model.embed_tokens.weight", "lm_head.weight"}
    tensors = {name: bench.weights.dense(torch.Size((sizes.vocab_size, width))) for name in ends}
    tensors["model.norm.weight"] = bench.weights.dense(torch.Size((width,)))
    for layer in range(sizes.num_layers):
        for name, shape in shapes.items():
            block = "self_attn" if name in LINEARS[:4] else "mlp"
            for key, value in parts[shape].items():
                tensors[f"model.layers.{layer}.{block}.{name}.{key}"] = value.clone()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a tokenizer of numbered words, without which Unsloth loads no model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{number}" for number in range(4, vocab_size))]
    numbered = {word: number for number, word in enumerate(words)}
    tokenizer: Any = Tokenizer(models.WordLevel(numbered, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), tiny=sys.argv[3] == "tiny")
