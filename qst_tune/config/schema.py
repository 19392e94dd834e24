"""The keys of configs: of the training recipes, and what several other recipes share.

A recipe with further keys declares them in its own file. ``python -m qst_tune.config.cli`` prints
the table of docs/training.md.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from omegaconf import DictConfig, ListConfig

from qst_tune.config.keys import RecipeConfig, key, keys_of

Block: TypeAlias = DictConfig  # with a _component_
Blocks: TypeAlias = DictConfig | ListConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RecipeConfig):
    """The keys of the training recipes, whose configs every recipe accepts."""

    model: Block = key("a builder of qst_tune.models")
    tokenizer: Block = key("a tokenizer of torchtune or qst_tune.data")
    checkpointer: Block = key("reads the weights of the frozen backbone")
    output_dir: Path = key("directory of the run")
    device: str = key("auto (cuda, mps or cpu), cpu, cuda, cuda:N", default="auto")
    dtype: str = key(
        "auto, bf16, fp16 or fp32: of what is neither quantized nor trainable", default="auto"
    )
    dataset: Blocks = key(
        "the training set: qst_tune.data.auto_dataset, a dataset of torchtune, or a list"
    )
    side_network: Path | None = key(
        "QST: start from this result; null: a new side network", default=None
    )
    scales: Path | None = key("PEQA: start from this result; null: the rounded model", default=None)
    reference: Literal["start", "backbone"] | None = key(
        "of qst_dpo; null: start if side_network is set, else backbone", default=None
    )
    batch_size: int = key("samples of a batch", least=1)
    shuffle: bool = key("another order of the samples in each epoch", default=True)
    seed: int | None = key(
        "of everything random; null: a new one, which is logged",
        default=None,
        least=0,
        # torchtune seeds each process with seed + rank, and NumPy takes 32 bits.
        most=2**32 - 2**16,
    )
    data_seed: int | None = key(
        "of the order of the samples and of val_fraction; null: seed",
        default=None,
        least=0,
        most=2**32 - 2**16,
    )
    trials: Blocks | None = key(
        "side networks over one pass of the backbone: list, grid or random (docs/trials.md)",
        default=None,
    )
    num_workers: int = key("processes that read samples; their order stays", default=0, least=0)
    collate_fn: str | None = key(
        "dotted name of torchtune's or your own; null: padding", default=None
    )
    on_bad_row: Literal["error", "skip"] = key(
        "skip leaves out samples that cannot be used, and reports how many and why",
        default="error",
    )
    epochs: int = key("passes over the training set", least=1)
    max_steps_per_epoch: int | None = key(
        "ends each epoch early; null: whole", default=None, least=1
    )
    gradient_accumulation_steps: int = key("batches of an optimizer step", default=1, least=1)
    optimizer: Block = key("one of torch.optim or torchao.optim")
    lr_scheduler: Block | None = key(
        "qst_tune.training.lr_schedulers.cosine_with_warmup, or one of torchtune's; null: "
        "constant optimizer.lr",
        default=None,
    )
    loss: Block = key("qst_tune.modules.LinearCrossEntropyLoss or torchtune's")
    clip_grad_norm: float | None = key(
        "largest norm of all gradients together; null: no clipping", default=None, above=0
    )
    skip_bad_steps: int = key(
        "skip at most this many steps with a loss or gradient that is not finite",
        default=0,
        least=0,
    )
    enable_activation_checkpointing: bool = key(
        "recompute in backward: the side network and each layer with LoRA (QST), each layer (PEQA)",
        default=False,
    )
    enable_activation_offloading: bool = key(
        "accepted when False: no method here needs it", default=False
    )
    compile: bool = key(
        "torch.compile the layers, except those with LoRA (`lora_layers`)", default=False
    )
    capture_steps: bool = key(
        "QST, on CUDA: steps of few tokens whose shapes repeat run as CUDA graphs", default=True
    )
    triton_kernels: bool = key(
        "on CUDA, decode weights and run frozen layers and the loss in Triton's kernels; False: "
        "in torch's operations",
        default=True,
    )
    hidden_state_cache: Path | None = key(
        "QST: directory for the backbone's hidden states, which later epochs then read",
        default=None,
    )
    backbone_sharding: Literal["full", "node"] | None = key(
        "processes share one backbone: all of them, or those of a node", default=None
    )
    fsdp_cpu_offload: bool = key("keep the shards of the backbone in CPU memory", default=False)
    dataset_val: Blocks | None = key(
        "the validation set, with what it leaves open as in dataset; or use val_fraction",
        default=None,
    )
    val_fraction: float | None = key(
        "share of dataset to validate on, chosen by seed", default=None, above=0, below=1
    )
    batch_size_val: int | None = key("of validation; null: batch_size", default=None, least=1)
    run_val_every_n_steps: int | None = key(
        "validate also between the start and the end of an epoch", default=None, least=1
    )
    early_stopping_patience: int | None = key(
        "stop after this many validations in a row without a best one", default=None, least=1
    )
    resume_from_checkpoint: bool = key(
        "resume from the newest good checkpoint in output_dir", default=False
    )
    save_every_n_steps: int | None = key(
        "checkpoints in addition to that of each epoch's end", default=None, least=1
    )
    keep_last_n_checkpoints: int | None = key(
        "and the best one in any case; null: all", default=2, least=1
    )
    dry_run: bool = key(
        "check everything, report steps and peak memory, write nothing", default=False
    )
    metric_logger: Block = key("one of torchtune.training.metric_logging")
    log_every_n_steps: int = key("steps of a log entry", default=1, least=1)
    log_peak_memory_stats: bool = key("peak memory in each log entry", default=False)
    profiler: Block | None = key("torchtune.training.setup_torch_profiler", default=None)
    # What torch.set_deterministic_debug_mode takes.
    cudnn_deterministic_mode: Literal[0, 1, 2, "default", "warn", "error"] | None = key(
        "torch's deterministic debug mode: 2 refuses kernels that vary from run to run",
        default=None,
    )
    fsdp: Block | None = key(
        "torchtune's block, accepted with cpu_offload: False; see fsdp_cpu_offload", default=None
    )
    save_adapter_weights_only: bool | None = key(
        "accepted, no effect: only trained weights are ever saved", default=None
    )
    low_cpu_ram: bool | None = key(
        "accepted, no effect: weights are quantized one by one as they are read", default=None
    )


TRAINING_KEYS = keys_of(TrainingConfig)


def training_key(name: str, **changes: object) -> Any:
    """Declare a key of the training recipes for another recipe, with a few differences.

    ``default=...`` changes the default; an annotation with None makes a required key optional.
    """
    declared = TrainingConfig.__dataclass_fields__[name]
    default = changes.pop("default", declared.default)
    return field(default=default, metadata={**declared.metadata, **changes})


# Stands for the output_dir in the default of a key.
RUN = Path("<output_dir>")


@dataclass(frozen=True, kw_only=True)
class TunedModelConfig(RecipeConfig):
    """What a recipe that uses a tuned model reads; the config of the training run has it all."""

    model: Block = training_key("model")
    tokenizer: Block = training_key("tokenizer")
    checkpointer: Block = training_key("checkpointer")
    device: str = training_key("device")
    dtype: str = training_key("dtype")
    triton_kernels: bool = training_key("triton_kernels")
    side_network: Path | None = key(
        "directory of a QST run's result; null: the base model", default=RUN / "side_network"
    )
    scales: Path | None = key(
        "directory of a PEQA run's result; null: the base model", default=RUN / "scales"
    )
    output_dir: Path | None = training_key("output_dir", default=None)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(TunedModelConfig):
    """How a tuned model answers."""

    system_prompt: str | None = key("begins each conversation", default=None)
    max_new_tokens: int = key("longest answer", default=200, least=1)
    temperature: float = key("of the softmax; 0 takes the likeliest token", default=0.0, least=0)
    top_k: int | None = key("draw among the k likeliest tokens; null: all", default=None, least=1)
    top_p: float | None = key(
        "draw among the likeliest tokens that together have this probability; null: all",
        default=None,
        above=0,
        most=1,
    )
    seed: int | None = training_key("seed")


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(RecipeConfig):
    """What an estimate of memory and cost reads of a training config, and its own questions."""

    fit_gib: float | None = key(
        "look for the largest batch within so many GiB", default=None, above=0
    )
    attention: Literal["fused", "plain"] = key(
        "plain holds the scores, fused never does", default="fused"
    )
    num_processes: int = key("that share the work, as backbone_sharding has it", default=1, least=1)
    depths: bool = key("price every depth of LoRA, model.lora_layers", default=True)
    model: Block = training_key("model")
    tokenizer: Block = training_key("tokenizer")
    batch_size: int = training_key("batch_size")
    optimizer: Block = training_key("optimizer")
    loss: Block = training_key("loss")
    output_dir: Path = training_key("output_dir")
    device: str = training_key("device")
    dtype: str = training_key("dtype")
    clip_grad_norm: float | None = training_key("clip_grad_norm")
    enable_activation_checkpointing: bool = training_key("enable_activation_checkpointing")
    backbone_sharding: Literal["full", "node"] | None = training_key("backbone_sharding")
    gradient_accumulation_steps: int = training_key("gradient_accumulation_steps")
    side_network: Path | None = training_key("side_network")
    reference: Literal["start", "backbone"] | None = training_key("reference")
    trials: Blocks | None = training_key("trials")


# What one training step is made from.
StepConfig: TypeAlias = TrainingConfig | EstimateConfig
