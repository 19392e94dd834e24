"""A backbone from the cache is the one that was quantised, and a damaged cache is made anew."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training

from qst_tune.backbone import quantized_cache as module
from qst_tune.backbone.experts import QuantizedExperts
from qst_tune.backbone.hf_checkpointer import HFCheckpointer
from qst_tune.backbone.quantized_cache import BackboneCache, backbone_cache
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.models import peqa_from_hf, qst_from_hf
from qst_tune.quantization.table import QuantizedTable
from tests.backbone.model_types import tiny_model
from tests.hf_models import edit_config, padded_batch, save_hf_model

CPU = torch.device("cpu")
MODELS = {
    "nf4": (qst_from_hf, {"reduction_factor": 4}),
    "fp4": (qst_from_hf, {"reduction_factor": 4, "base_quantization": "fp4"}),
    "int8": (qst_from_hf, {"reduction_factor": 4, "base_quantization": "int8"}),
    "int8 embedding": (qst_from_hf, {"reduction_factor": 4, "embedding_quantization": "int8"}),
    "peqa": (peqa_from_hf, {"bits": 3, "group_size": 32}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf_model(tmp_path / "model", "qwen3 biases")
    return tmp_path / "model"


def build(folder: Path, kind: str = "nf4", dtype=torch.float32):
    builder, arguments = MODELS[kind]
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = builder(str(folder), **arguments)
    checkpointer = HFCheckpointer(str(folder), cache_dir=str(folder.parent / "cache"))
    return model, checkpointer, backbone_cache(checkpointer, model, dtype)


def loaded(folder: Path, kind: str = "nf4", dtype=torch.float32):
    model, checkpointer, cache = build(folder, kind, dtype)
    fingerprint = load_backbone(model, checkpointer, dtype=dtype, device=CPU)
    return model, fingerprint, cache


def contents(model) -> dict[str, torch.Tensor]:
    """All tensors of a backbone, quantised ones decoded."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: decoded(t) for name, t in named if not name.startswith("side.")}


def decoded(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, QuantizedTable):
        return tensor.dense()
    if isinstance(tensor, QuantizedExperts):
        return tensor.dense()
    return tensor.get_original_weight() if isinstance(tensor, NF4Tensor) else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_the_backbone_comes_back_to_the_last_bit(kind: str, dtype, folder: Path) -> None:
    expected, fingerprint, cache = loaded(folder, kind, dtype)
    cache.save(expected, fingerprint)
    model, _, cache = build(folder, kind, dtype)
    assert cache.load(model, CPU) == fingerprint
    for each in (model, expected) if kind == "peqa" else ():
        each.train_scales()  # as the recipe does once it is loaded
    for (name, actual), (_, wanted) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert actual.requires_grad == wanted.requires_grad, name
    actual, wanted = contents(model), contents(expected)
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert actual[name].dtype == wanted[name].dtype, name
        assert torch.equal(actual[name], wanted[name]), name


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss", "qwen3_5_text"])
@torch.no_grad()
def test_a_model_from_the_cache_computes_the_same(model_type: str, tmp_path: Path) -> None:
    """Tied and untied heads, tables of two kinds of layers, experts, states."""
    folder = tmp_path / "model"
    tiny_model(model_type, vocab_size=307).save_pretrained(folder)
    expected, fingerprint, cache = loaded(folder)
    cache.save(expected, fingerprint)
    model, _, cache = build(folder)
    cache.load(model, CPU)
    tokens, _ = padded_batch("left", (10,))
    for each in (model, expected):
        each.initialize_side(CPU)
    assert torch.equal(model(tokens), expected(tokens))


def test_another_folder_format_or_dtype_has_another_file(folder: Path) -> None:
    paths = {build(folder, kind)[2].path for kind in MODELS}
    paths.add(build(folder, dtype=torch.bfloat16)[2].path)
    first = build(folder)[2].path
    edit_config(folder, rope_theta=3.0)
    paths.add(build(folder)[2].path)
    weights = folder / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    paths.add(build(folder)[2].path)
    assert first in paths
    assert len(paths) == len(MODELS) + 3


def test_there_is_no_file_at_first_and_none_without_a_folder_for_it(folder: Path) -> None:
    model, _, cache = build(folder)
    assert cache.load(model, CPU) is None
    assert backbone_cache(HFCheckpointer(str(folder)), model, torch.float32) is None
    with torch.device("meta"):
        dense = qst_from_hf(str(folder), reduction_factor=4, quantize_base=False)
    checkpointer = HFCheckpointer(str(folder), cache_dir=str(folder))
    assert backbone_cache(checkpointer, dense, torch.float32) is None


@pytest.mark.parametrize("damage", ["cut off", "no fingerprint", "another model's"])
def test_a_damaged_file_is_passed_over(damage: str, folder: Path, caplog) -> None:
    expected, fingerprint, cache = loaded(folder)
    cache.save(expected, fingerprint)
    if damage == "cut off":
        cache.path.write_bytes(cache.path.read_bytes()[:-1])
    elif damage == "no fingerprint":
        save_file(load_file(cache.path), cache.path)
    else:
        save_hf_model(folder.parent / "other", "qwen2")
        other, fingerprint, _ = loaded(folder.parent / "other")
        BackboneCache(cache.path).save(other, fingerprint)
    model, _, cache = build(folder)
    assert cache.load(model, CPU) is None
    assert f"{cache.path} is damaged" in caplog.text
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_full_disk_is_a_warning_and_leaves_nothing(folder: Path, monkeypatch, caplog) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    model, fingerprint, cache = loaded(folder)
    cache.save(model, fingerprint)
    assert "cannot be kept in" in caplog.text
    assert list(cache.path.parent.iterdir()) == []
