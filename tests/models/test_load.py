"""Device, dtype and model of a config."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.errors import UserError
from qst_tune.models.build import build_on_meta
from qst_tune.models.load import load_frozen_backbone
from tests.support.checkpoints import finetune_config

CPU = torch.device("cpu")


@pytest.fixture
def cfg(tmp_path: Path):
    return OmegaConf.create(finetune_config(tmp_path))


def test_device_of_this_machine_is_taken() -> None:
    assert choose_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that the test lacks")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_absent_device_is_refused_and_not_replaced_by_the_cpu(device: str) -> None:
    with pytest.raises(UserError, match=f"device={device} cannot be used"):
        choose_device(device)


@pytest.mark.parametrize("device", ["abacus", "", "cpu:x"])
def test_device_of_nothing_is_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"device={device} cannot be used"):
        choose_device(device)


def test_dtype_is_one_of_three() -> None:
    assert choose_dtype("bf16", CPU) is torch.bfloat16
    assert choose_dtype("fp32", CPU) is torch.float32
    assert choose_dtype("fp16", CPU) is torch.float16
    for name in ("fp64", "float32", "int8", 16):
        with pytest.raises(UserError, match=f"dtype={name} is not supported: use bf16, fp16 or"):
            choose_dtype(name, CPU)


def test_model_is_built_without_memory_and_leaves_the_default_dtype(cfg) -> None:
    model = build_on_meta(cfg.model, torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.tok_embeddings.weight.dtype == torch.bfloat16
    assert model.side.upsample.weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_plain_torchtune_model_is_refused(cfg) -> None:
    cfg.model = {"_component_": "torchtune.models.llama3_2.llama3_2_1b"}
    with pytest.raises(UserError, match=r"llama3_2_1b does not build a QST model"):
        build_on_meta(cfg.model, torch.float32)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "nf4"),
        ({"base_quantization": "fp4"}, "fp4"),
        ({"base_quantization": "int4"}, "int4, groups of 64, rtn"),
        ({"base_quantization": "int8"}, "int8, per channel, rtn"),
        ({"base_quantization": "none"}, "none"),
        ({"quantize_base": False}, "none"),
    ],
)
def test_backbone_is_loaded_and_identified(settings, name: str, cfg) -> None:
    cfg.model.update(settings)
    model = build_on_meta(cfg.model, torch.float32)
    backbone = load_frozen_backbone(model, cfg.checkpointer, dtype=torch.float32, device=CPU)
    assert (backbone.name, backbone.quantization) == ("model", name)
    assert len(backbone.fingerprint) == len(backbone.sampled) == 64
    assert not model.tok_embeddings.weight.is_meta
