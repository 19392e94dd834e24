"""Tiny models, tokenizers, datasets and configs on disk, made in about 0.1 s and without downloads.

Nothing here is special to QST but the ``model`` block of the configs: the directories look like
those that Hugging Face serves.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Config = dict[str, Any]

# Arguments of torchtune's llama3_2. 96 / 4 and 64 / 4 are the widths of the side network.
SIZES = {
    "vocab_size": 320,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 128,
    "rope_base": 10_000,
    "scale_factor": 1,
}
# Special tokens of Llama 3 have the ids 128000 and above, however few others there are.
LLAMA3_SIZES = {
    "vocab_size": 128_256,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 256,
    "rope_base": 500_000,
    "scale_factor": 32,
}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "brown"]


# Checkpoints.


def random_weights(sizes: Config = SIZES, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a tied Llama under Hugging Face names, large enough for a confident model."""
    generator = torch.Generator().manual_seed(seed)
    width, inner = sizes["embed_dim"], sizes["intermediate_dim"]
    kv_width = width // sizes["num_heads"] * sizes["num_kv_heads"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    def norm() -> torch.Tensor:
        return torch.rand(width, generator=generator) + 0.5

    weights = {
        "model.embed_tokens.weight": matrix(sizes["vocab_size"], width) * 2,
        "model.norm.weight": norm(),
    }
    for index in range(sizes["num_layers"]):
        layer = {
            "self_attn.q_proj": matrix(width, width),
            "self_attn.k_proj": matrix(kv_width, width),
            "self_attn.v_proj": matrix(kv_width, width),
            "self_attn.o_proj": matrix(width, width),
            "mlp.gate_proj": matrix(inner, width),
            "mlp.up_proj": matrix(inner, width),
            "mlp.down_proj": matrix(width, inner),
            "input_layernorm": norm(),
            "post_attention_layernorm": norm(),
        }
        weights.update((f"model.layers.{index}.{k}.weight", v) for k, v in layer.items())
    return weights


def hf_config(sizes: Config = SIZES, **changes: Any) -> Config:
    """A ``config.json`` of transformers for these sizes."""
    scaling = {
        "rope_type": "llama3",
        "factor": float(sizes["scale_factor"]),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes["vocab_size"],
        "num_hidden_layers": sizes["num_layers"],
        "hidden_size": sizes["embed_dim"],
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "intermediate_size": sizes["intermediate_dim"],
        "max_position_embeddings": sizes["max_seq_len"],
        "rope_theta": float(sizes["rope_base"]),
        "rope_scaling": scaling if sizes["scale_factor"] != 1 else None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        **changes,
    }


def write_checkpoint(
    directory: Path,
    weights: dict[str, torch.Tensor] | None = None,
    *,
    sizes: Config = SIZES,
    num_shards: int = 1,
    **config_changes: Any,
) -> list[str]:
    """Write ``config.json`` and the weights; returns the names of the weight files."""
    weights = random_weights(sizes) if weights is None else weights
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(sizes, **config_changes)))
    names = ["model.safetensors"]
    if num_shards > 1:
        total = f"{num_shards:05}"
        names = [f"model-{i + 1:05}-of-{total}.safetensors" for i in range(num_shards)]
    keys = sorted(weights)
    for index, name in enumerate(names):
        shard = {key: weights[key].contiguous() for key in keys[index::num_shards]}
        save_file(shard, directory / name, metadata={"format": "pt"})
    return names


def read_checkpoint(directory: Path) -> dict[str, torch.Tensor]:
    """All weights of a directory, under Hugging Face names."""
    return {
        k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


# Tokenizers.


def byte_level_bpe(texts: list[str], special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_chat_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of 300 tokens with a ChatML template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    tokenizer = byte_level_bpe(["system user assistant what is the colour of box it is"], special)
    tokenizer.save(str(directory / "tokenizer.json"))
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "chat_template": CHATML,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(content))


def write_tiktoken(path: Path) -> None:
    """A ``tokenizer.model`` as Llama 3 has it, with a token for each byte and no merges."""
    ranks = (f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(ranks))


# Data.


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def colour_rows(count: int, prefix: str = "") -> list[dict[str, str]]:
    """Questions with answers of different lengths, to be learnt by heart."""
    return [
        {
            "input": f"{prefix}what is the colour of box {i}",
            "output": f"it is {COLOURS[i % 8]}" + "!" * (i % 3),
        }
        for i in range(count)
    ]


# Configs.


def write_model_directory(directory: Path, **kwargs: Any) -> Path:
    """A checkpoint with its chat tokenizer."""
    write_checkpoint(directory, **kwargs)
    write_chat_tokenizer(directory)
    return directory


def finetune_config(root: Path) -> Config:
    """A config of qst_finetune; writes what it refers to into ``root`` unless it is there."""
    if not root.joinpath("model").exists():
        write_model_directory(root / "model")
        write_jsonl(root / "train.jsonl", colour_rows(8))
        write_jsonl(root / "val.jsonl", colour_rows(5, prefix="tell me "))
    return {
        "output_dir": str(root / "run"),
        "model": {
            "_component_": "qst_tune.models.qst_llama3_2",
            **SIZES,
            "reduction_factor": 4,
            "rank": 4,
        },
        "tokenizer": {
            "_component_": "qst_tune.data.hf_chat_tokenizer",
            "path": "${checkpointer.checkpoint_dir}",
            "max_seq_len": 64,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(root / "model"),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": "${output_dir}",
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "dataset": _dataset(root / "train.jsonl", root / "cache"),
        "dataset_val": _dataset(root / "val.jsonl", root / "cache"),
        "run_val_every_n_steps": None,
        "seed": 0,
        "shuffle": True,
        "batch_size": 4,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.01},
        "lr_scheduler": None,
        "loss": {"_component_": "qst_tune.modules.LinearCrossEntropyLoss"},
        "epochs": 1,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1,
        "clip_grad_norm": None,
        "compile": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
        },
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": False,
    }


def generate_config(root: Path) -> Config:
    """A config of qst_generate on the model of :func:`finetune_config`."""
    config = finetune_config(root)
    kept = ("model", "tokenizer", "checkpointer", "device", "dtype", "seed", "output_dir")
    return {
        "side_network": None,
        "prompt": "what is the colour of box 1",
        "compare_with_base": False,
        "max_new_tokens": 12,
        "temperature": 0.0,
        **{key: config[key] for key in kept},
    }


def write_config(path: Path, config: Config) -> Path:
    OmegaConf.save(OmegaConf.create(config), path)
    return path


def _dataset(path: Path, cache: Path) -> Config:
    return {
        "_component_": "torchtune.datasets.instruct_dataset",
        "source": "json",
        "data_files": str(path),
        "cache_dir": str(cache),  # otherwise the home directory of whoever runs the tests
    }
