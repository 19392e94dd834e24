"""Times and memory on one GPU, offline, with random weights: ``python -m benchmarks.gpu``.

``pieces``    decoding, products of few tokens and the loss, by our kernels and by others
``train``     steps of QST, with Triton's kernels and with the tables, and of torchtune's QLoRA
``generate``  tokens a second of the backbone alone and with a side network
``long``      a step of one long row

LLaMA-2-7B's shape in bf16, layers in NF4. A figure is the median of a few steps of one process.
Every row is printed, and added to ``benchmarks/results/gpu.jsonl`` with device and versions;
docs/benchmarks_gpu.md explains them. ``--tiny`` runs all of it on any device in seconds, which
shows that it runs and nothing else.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torchtune import training
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from benchmarks.backbones import BACKBONES, DTYPE, Backbone, dense_backbone
from benchmarks.decoding import Decoding
from benchmarks.methods import LORA_RANK, Batch, Trainee, ignore_known_warnings, random_batch
from benchmarks.peers import add_lora
from qst_tune.models import qst_decoder
from qst_tune.modules import LinearCrossEntropyLoss, torchtune_backbone
from qst_tune.modules.loss import connect_loss
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.qst_model import QSTModel
from qst_tune.quantization import kernels
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4
from qst_tune.training.methods import parameter_groups

RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
LLAMA2_7B = Backbone(
    num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=32, intermediate_dim=11_008,
    max_seq_len=65_536,
)  # fmt: skip
Row = dict[str, Any]


class Bench:
    """A device, the sizes that are measured on it, and its clock."""

    def __init__(self, *, tiny: bool, rounds: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone = BACKBONES["tiny"] if tiny else LLAMA2_7B
        self.shapes = [(2, 64)] if tiny else [(4, 384), (16, 384), (4, 2048), (16, 2048)]
        self.long_rows = [128] if tiny else [8192, 32_768, 65_536]
        self.weight_shape = (256, 192) if tiny else (11_008, 4096)
        self.loss_tokens = 128 if tiny else 8192
        self.rounds = rounds

    def wait(self) -> None:
        """Let the device finish."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], object], times: int | None = None) -> list[float]:
        """Time a function ``times`` times, after two runs to warm up."""
        taken = []
        for number in range(2 + (times or self.rounds)):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            if number > 1:
                taken.append(1000 * (time.perf_counter() - start))
        return taken

    def forget(self) -> None:
        """Return unused memory, and count the peak from now on."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Return the most that the device's allocator has held."""
        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)


@contextmanager
def tables() -> Iterator[None]:
    """Decode without Triton's kernels."""
    with mock.patch.object(kernels, "_runs_triton_on", return_value=False):
        yield


@contextmanager
def for_each_part() -> Iterator[None]:
    """Decode a weight anew for each part of a batch, which needs less memory."""
    with mock.patch.object(torchtune_backbone, "decoding_once", nullcontext):
        yield


def qst(bench: Bench) -> QSTModel:
    """Build the default QST model over random NF4 weights, which are made on the device."""
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = qst_decoder(llama3_2(**bench.backbone.builder_arguments()))
    fill_(model, bench.device)
    model.initialize_side(bench.device)
    return model


@torch.no_grad()
def fill_(model: nn.Module, device: torch.device) -> None:
    """Give every module of a backbone on meta random weights on the device, in place."""
    for name, module in model.named_modules():
        if name.startswith("side"):
            continue
        if isinstance(module, NF4Linear):
            shape = (module.out_features, module.in_features)
            module.quantize_(torch.randn(shape, device=device, dtype=DTYPE).mul_(0.02))
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.ones(parameter.shape, device=device, dtype=DTYPE)
                value = value.normal_(std=0.02) if value.ndim > 1 else value
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()


def qst_trainee(model: QSTModel) -> Trainee:
    """Do what the recipe does once the backbone is loaded."""
    model.side.recompute = True
    model.train()
    loss = LinearCrossEntropyLoss()
    connect_loss(loss, model)
    optimizer = AdamW(parameter_groups(model.side), lr=1e-4, fused=True)
    return Trainee(model, loss, optimizer, clip_grad_norm=1.0)


def qlora_trainee(bench: Bench) -> Trainee:
    """Build torchtune's QLoRA with activation checkpointing, on the device."""
    with bench.device:
        model: Any = dense_backbone(bench.backbone)
        with training.set_default_dtype(DTYPE):
            add_lora(model, rank=LORA_RANK, quantize=True)
    set_trainable_params(model, get_adapter_params(model))
    policy: Any = {TransformerSelfAttentionLayer}
    training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    loss = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Trainee(model, loss, AdamW(trained, lr=1e-4, fused=True))


def train(bench: Bench) -> Iterator[Row]:
    """Steps at each shape."""
    trainee = qst_trainee(qst(bench))
    for shape in bench.shapes:
        yield from _qst_steps(bench, trainee, shape)
    del trainee
    bench.forget()
    trainee = qlora_trainee(bench)
    for shape in bench.shapes:
        bench.forget()
        run = partial(trainee.step, _batch(bench, shape))
        times = bench.milliseconds(run, times=min(3, bench.rounds))
        yield _row("train", "torchtune QLoRA, checkpointed", shape, times, bench)


def long(bench: Bench) -> Iterator[Row]:
    """Steps of one row each."""
    trainee = qst_trainee(qst(bench))
    for length in bench.long_rows:
        bench.forget()
        run = partial(trainee.step, _batch(bench, (1, length)))
        times = bench.milliseconds(run, times=min(3, bench.rounds))
        yield _row("long", "QST", (1, length), times, bench)


def _qst_steps(bench: Bench, trainee: Trainee, shape: tuple[int, int]) -> Iterator[Row]:
    run = partial(trainee.step, _batch(bench, shape))
    for method, setting in (
        ("QST", nullcontext),
        ("QST, decoded for each part", for_each_part),
        ("QST, tables", tables),
    ):
        bench.forget()
        with setting():
            times = bench.milliseconds(run)
        yield _row("train", method, shape, times, bench)


def _batch(bench: Bench, shape: tuple[int, int]) -> Batch:
    batch = random_batch(bench.backbone, *shape, seed=0)
    return {name: value.to(bench.device) for name, value in batch.items()}


def _row(
    section: str, method: str, shape: tuple[int, int], times: list[float], bench: Bench
) -> Row:
    return {
        "section": section,
        "method": method,
        "shape": f"{shape[0]} x {shape[1]}",
        "ms": round(median(times), 3),
        "least_ms": round(min(times), 3),
        "peak_gib": bench.peak_gib(),
    }


@torch.no_grad()
def pieces(bench: Bench) -> Iterator[Row]:
    """Single kernels on one weight, and the loss."""
    dense = torch.randn(bench.weight_shape, device=bench.device, dtype=DTYPE).mul_(0.02)
    weight = quantize_nf4(dense)
    decoded = dequantize_nf4(weight)
    with tables():
        equal = torch.equal(decoded, dequantize_nf4(weight))
    shape = bench.weight_shape
    measure = partial(bench.milliseconds, times=4 * bench.rounds)
    yield {
        **_row("pieces", "decode NF4", shape, measure(partial(dequantize_nf4, weight)), bench),
        "bit_equal_to_tables": equal,
    }
    with tables():
        times = measure(partial(dequantize_nf4, weight))
    yield _row("pieces", "decode NF4, tables", shape, times, bench)
    times = measure(weight.get_original_weight)
    yield _row("pieces", "decode NF4, torchao", shape, times, bench)
    linear = NF4Linear(dense)
    for num_tokens in (1, 8, 1536):
        x = torch.randn(num_tokens, shape[1], device=bench.device, dtype=DTYPE)
        times = measure(partial(linear, x))
        yield _row("pieces", f"NF4Linear, {num_tokens} tokens", shape, times, bench)
        times = measure(partial(F.linear, x, dense))
        yield _row("pieces", f"bf16 linear, {num_tokens} tokens", shape, times, bench)
    yield _loss(bench)


@torch.enable_grad()
def _loss(bench: Bench) -> Row:
    sizes = bench.backbone
    shape = (sizes.vocab_size, sizes.embed_dim)
    head = nn.Linear(shape[1], shape[0], bias=False, device=bench.device, dtype=DTYPE)
    head.requires_grad_(False)
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(mock.Mock(output=head))
    hidden = torch.randn(
        1, bench.loss_tokens, shape[1], device=bench.device, dtype=DTYPE, requires_grad=True
    )
    labels = torch.randint(shape[0], (1, bench.loss_tokens), device=bench.device)
    run = partial(_forward_backward, loss, hidden, labels)
    return _row(
        "pieces", f"loss of {bench.loss_tokens} tokens", shape, bench.milliseconds(run), bench
    )


def _forward_backward(loss: Any, hidden: torch.Tensor, labels: torch.Tensor) -> None:
    hidden.grad = None
    loss(hidden, labels).backward()


def generate(bench: Bench) -> Iterator[Row]:
    """One token of each row behind 128 in the caches."""
    model = qst(bench)
    model.eval()
    for num_rows in (1, 8):
        for method, disabled, context in (
            ("with the side network", False, None),
            ("backbone alone", True, None),
            ("with the side network, tables", False, tables()),
        ):
            prepare = partial(setattr, model.side, "disabled", disabled)
            with context or bench.device, bench.device:
                decoding = Decoding(
                    model, prepare, num_rows=num_rows, num_prompt_tokens=min(
                        128, bench.backbone.max_seq_len // 2
                    )
                )  # fmt: skip
                times = bench.milliseconds(decoding.step)
            row = _row("generate", method, (num_rows, 1), times, bench)
            yield {**row, "tokens_per_s": round(1000 * num_rows / median(times), 1)}


SECTIONS = {"pieces": pieces, "train": train, "generate": generate, "long": long}


def main(arguments: list[str] | None = None) -> None:
    """Run the sections that are asked for, print and store their rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    ignore_known_warnings()
    bench = Bench(tiny=asked.tiny, rounds=asked.rounds)
    for name in asked.sections.split(","):
        bench.forget()
        for row in SECTIONS[name](bench):
            stored = {**row, **_where(bench)}
            print(json.dumps(row), flush=True)
            with asked.results.open("a") as file:
                file.write(json.dumps(stored) + "\n")


def _where(bench: Bench) -> Row:
    is_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
