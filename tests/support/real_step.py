"""What a real training step allocates, by torch's own profiler, beside what the estimate says.

    python -m tests.support.real_step

prints the table of docs/estimation.md.
"""

import gc
import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torchao.dtypes.nf4tensor import NF4Tensor

from benchmarks.estimate import METHODS
from qst_tune.config.schema import TrainingConfig
from qst_tune.estimation.step import Setup, Shape, make_optimizer, trace_step, train_step
from qst_tune.modules.meta_device import build_rotary_caches
from qst_tune.quantization.nf4 import quantize_nf4
from qst_tune.quantization.table import QuantizedTable, quantize_table
from tests.support.configs import typed_config

MIB = 1024**2
# Widths of SmolLM2-135M with few layers, a Llama 3.2 with shared key-value heads and a large
# vocabulary, and a Llama 2 with as many key-value heads as heads.
MODELS = {
    "SmolLM2-135M, 4 layers": {
        "_component_": "qst_tune.models.qst_llama3_2",
        "vocab_size": 49152,
        "num_layers": 4,
        "num_heads": 9,
        "num_kv_heads": 3,
        "embed_dim": 576,
        "intermediate_dim": 1536,
        "max_seq_len": 2048,
        "scale_factor": 1,
    },
    "Llama 3.2, narrow": {
        "_component_": "qst_tune.models.qst_llama3_2",
        "vocab_size": 16000,
        "num_layers": 6,
        "num_heads": 8,
        "num_kv_heads": 2,
        "embed_dim": 512,
        "intermediate_dim": 2048,
        "max_seq_len": 2048,
        "reduction_factor": 8,
    },
    "Llama 2, narrow": {
        "_component_": "qst_tune.models.qst_llama2",
        "vocab_size": 4000,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 4,
        "embed_dim": 256,
        "max_seq_len": 2048,
        "reduction_factor": 4,
        "intermediate_dim": 704,
    },
}
SHAPES = (Shape(1, 128), Shape(2, 512), Shape(4, 256))
COMPARED = {
    "qst_stored": "QST, nothing recomputed",
    "qst_recomputed": "QST, side recomputed",
    "peqa": "PEQA",
    "peqa_checkpointed": "PEQA, checkpointed",
    "qlora": "QLoRA",
    "qlora_checkpointed": "QLoRA, checkpointed",
}


def training_config(model: dict[str, object], **changes: object) -> TrainingConfig:
    """The keys of a training config that a step reads."""
    return typed_config(
        {
            "model": model,
            "loss": {"_component_": "qst_tune.modules.LinearCrossEntropyLoss"},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
            "clip_grad_norm": 1.0,
            "device": "cpu",
            "dtype": "bf16",
            "batch_size": 1,
            "tokenizer": {"max_seq_len": 128},
            **changes,
        }
    )


def allocate_real(module: nn.Module) -> None:
    """Replace, in place, the meta tensors of a module by random ones."""
    build_rotary_caches(module, torch.device("cpu"))
    real: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if id(parameter) not in real:
                dense = torch.randn(parameter.shape, dtype=parameter.dtype) * 0.02
                new = nn.Parameter(
                    _stored_as(parameter, dense), requires_grad=parameter.requires_grad
                )
                real[id(parameter)] = (parameter, new)
            setattr(child, name, real[id(parameter)][1])
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(child, name, torch.ones_like(buffer, device="cpu"))


def _stored_as(parameter: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, QuantizedTable):
        return quantize_table(dense)
    return quantize_nf4(dense) if isinstance(parameter, NF4Tensor) else dense


def measured_step_bytes(setup: Setup, cfg: TrainingConfig, shape: Shape) -> int:
    """Highest number of bytes that a real step has allocated above what was there before it."""
    allocate_real(setup.model)
    optimizer = make_optimizer(setup, cfg, "cpu")
    train_step(setup, optimizer, setup.batch(shape), 1.0)  # tables, warm-up
    batch = setup.batch(shape)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train_step(setup, optimizer, batch, 1.0)
    highest = current = 0
    for num_bytes in _allocations(profiler):
        current += num_bytes
        highest = max(highest, current)
    return highest


def _allocations(profiler: profile) -> Iterator[int]:
    """Signed bytes of every allocation and release, in order of time."""
    events = profiler.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    for event in sorted(memory, key=lambda event: event.start_ns()):
        yield event.nbytes()


def estimated_step_bytes(setup: Setup, cfg: TrainingConfig, shape: Shape) -> int:
    """The same by the estimate."""
    memory = trace_step(setup, cfg, shape, device="cpu")[0].memory
    return memory.num_bytes - memory.start_bytes


def rows() -> Iterator[str]:
    """The table of docs/estimation.md, a line at a time."""
    yield "| model | batch | method | estimate, MiB | real, MiB | ratio |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, model in MODELS.items():
        cfg = training_config(model)
        for shape in SHAPES:
            for method, title in COMPARED.items():
                estimate = estimated_step_bytes(METHODS[method](cfg), cfg, shape)
                real = measured_step_bytes(METHODS[method](cfg), cfg, shape)
                yield (
                    f"| {name} | {shape.batch_size} x {shape.seq_len} | {title} "
                    f"| {estimate / MIB:.1f} | {real / MIB:.1f} | {estimate / real:.3f} |"
                )


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(row + "\n")
        sys.stdout.flush()
