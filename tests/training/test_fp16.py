"""fp16 trains without a gradient scaler: the loss is a sum, whose gradients stay in its range."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from qst_tune.config.components import instantiate
from qst_tune.models.build import build_any_on_meta
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.table import quantize_table
from qst_tune.training.language_modelling import build_language_modelling
from qst_tune.training.methods import load_peqa, load_qst
from tests.support.checkpoints import SIZES, finetune_config
from tests.support.configs import typed_config

CPU = torch.device("cpu")
PEQA = "qst_tune.models.peqa_llama3_2"
NUM_LABELS = 8192


def gradients(
    root: Path,
    dtype: torch.dtype,
    factor: float = 1.0,
    loss: str = "qst_tune.modules.LinearCrossEntropyLoss",
    **model_block: Any,
) -> dict[str, torch.Tensor]:
    """Of the loss of 8192 labels; ``factor`` multiplies it before backward, and is taken back."""
    cfg = OmegaConf.create(finetune_config(root))
    cfg.loss._component_ = loss
    cfg.model = model_block if "_component_" in model_block else {**cfg.model, **model_block}
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    model = build_any_on_meta(cfg.model, dtype)
    settings = typed_config(cfg)
    task, _ = build_language_modelling(settings, tokenizer, model, seed=0, device=CPU)
    load = load_peqa if "peqa" in cfg.model._component_ else load_qst
    torch.manual_seed(0)
    method = load(model, settings, dtype=dtype, device=CPU)
    if load is load_qst:
        torch.manual_seed(0)
        nn.init.normal_(model.side.upsample.weight, std=1e-3)
        for name, parameter in model.side.named_parameters():
            if name.endswith(".b"):  # of LoRA
                nn.init.normal_(parameter, std=1e-2)
    generator = torch.Generator().manual_seed(0)
    tokens, labels = (torch.randint(320, (64, 128), generator=generator) for _ in range(2))
    loss_sum, count = task.loss(model, {"tokens": tokens, "labels": labels})
    assert count == NUM_LABELS
    (loss_sum * factor).backward()
    trained = [p for group in method.parameter_groups() for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: p.grad.double() / factor for p in trained}


def errors(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([(actual[n] - exact[n]).norm() / exact[n].norm() for n in exact])


EIGHT_BITS = {"base_quantization": "int8", "embedding_quantization": "int8"}


@pytest.mark.parametrize(
    "block",
    [
        EIGHT_BITS,
        pytest.param({"_component_": PEQA, "bits": 4, **SIZES}, marks=pytest.mark.slow),
        pytest.param({**EIGHT_BITS, "lora_layers": 2}, marks=pytest.mark.slow),
    ],
    ids=["qst", "peqa", "dial"],
)
def test_gradients_of_8192_labels_are_nearer_to_the_exact_ones_than_in_bf16(
    tmp_path: Path, block: dict[str, Any]
) -> None:
    exact = gradients(tmp_path, torch.float32, **block)
    fp16 = errors(gradients(tmp_path, torch.float16, **block), exact)
    bf16 = errors(gradients(tmp_path, torch.bfloat16, **block), exact)
    # Relative, of each tensor. fp16 has three bits more. The largest, 0.043, is of a gate's gamma,
    # one number that nearly cancels (bf16: 0.14); of LoRA's matrices it is 0.004.
    assert fp16.max() < 0.05
    assert fp16.median() < bf16.median() / 4


@pytest.mark.parametrize(
    "loss",
    [
        "qst_tune.modules.LinearCrossEntropyLoss",
        pytest.param("torch.nn.CrossEntropyLoss", marks=pytest.mark.slow),
    ],
)
def test_a_mean_before_backward_would_lose_the_gradients_that_a_sum_keeps(
    tmp_path: Path, loss: str
) -> None:
    exact = gradients(tmp_path, torch.float32, loss=loss, **EIGHT_BITS)
    of_sum = errors(gradients(tmp_path, torch.float16, loss=loss, **EIGHT_BITS), exact)
    mean = {"factor": 1 / NUM_LABELS, "loss": loss}
    of_mean = errors(gradients(tmp_path, torch.float16, **mean, **EIGHT_BITS), exact)
    assert of_sum.max() < 0.03
    assert of_mean.median() > 0.1


def test_product_with_codes_stays_in_range() -> None:
    """3000 in each of 512 columns: with codes it is above 65504, with the weight it is not."""
    x = torch.full((2, 512), 3000.0, dtype=torch.float16, requires_grad=True)
    layer = PEQALinear(torch.rand(8, 512) * 1e-3, bits=8)
    layer(x).sum().backward()
    expected = x.detach().float() @ layer.dense_weight(torch.float32).T
    torch.testing.assert_close(layer(x).float(), expected, rtol=2e-3, atol=0)
    scale_grad = layer.weight_scale.grad
    assert scale_grad is not None
    assert scale_grad.isfinite().all()
    table = quantize_table(torch.rand(8, 512) * 1e-3, dtype=torch.float16)
    expected = x.detach().float() @ table.dense(torch.float32).T
    torch.testing.assert_close(table.scores(x.detach()).float(), expected, rtol=2e-3, atol=0)
