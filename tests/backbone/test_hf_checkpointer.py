"""Weights of a directory arrive, in whatever files they are; a cache gives back the very bits."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training

from qst_tune.backbone import hf_checkpointer as module
from qst_tune.backbone.experts import QuantizedExperts
from qst_tune.backbone.hf_checkpointer import BackboneCache, HFCheckpointer, backbone_cache
from qst_tune.backbone.torchtune_loading import fingerprint_backbone, load_backbone
from qst_tune.errors import UserError
from qst_tune.file_lock import LOCK_NAME, locked
from qst_tune.models import backbone_from_hf, peqa_from_hf, qst_from_hf, qst_llama2
from qst_tune.quantization.table import QuantizedTable
from tests.support.hf_models import edit_config, loaded, padded_batch, save_hf_model
from tests.support.model_types import tiny_model
from tests.support.numbers import TINY

TOKENS = torch.arange(3, 15)[None]
TIED = ["llama tied llama3", "gemma2 uncapped", "qwen3 tied yarn", "opt"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    return loaded(backbone_from_hf, directory)(TOKENS)


def edit_weights(directory: Path, edit) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def as_bin(directory: Path, **settings) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin", **settings)


@pytest.mark.parametrize("case", ["phi3 longrope partial", "qwen3 tied yarn"])
@torch.no_grad()
def test_every_layout_of_files_gives_the_same_model(case: str, tmp_path: Path) -> None:
    """Shards; .bin; .bin as torch wrote it before 1.6. Fingerprints follow names, not files."""
    theirs = save_hf_model(tmp_path / "one", case)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name, settings in (("bin", {}), ("old", {"_use_new_zipfile_serialization": False})):
        theirs.save_pretrained(tmp_path / name)
        as_bin(tmp_path / name, **settings)
    expected = theirs(TOKENS).logits
    prints = set()
    for name in ("one", "shards", "bin", "old"):
        torch.testing.assert_close(logits(tmp_path / name), expected, **CLOSE)
        model = backbone_from_hf(str(tmp_path / name))
        prints.add(fingerprint_backbone(model, HFCheckpointer(str(tmp_path / name))))
    assert len(prints) == 1


def test_nothing_in_a_bin_file_is_run(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Trap(tmp_path / "touched"), file)
    with pytest.raises(UserError, match=r"bin is damaged, or has more than weights") as error:
        logits(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "touched").exists()


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_head_of_its_own_must_be_there_unless_it_is_tied(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "llama tied llama3")
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights.*lm_head\.weight"):
        logits(tmp_path)


@pytest.mark.parametrize("case", TIED)
@torch.no_grad()
def test_of_two_tied_weights_a_file_may_hold_either(case: str, tmp_path: Path) -> None:
    theirs = save_hf_model(tmp_path, case)
    embedding = next(name for name, _ in theirs.named_parameters() if "embed_tokens" in name)
    edit_weights(tmp_path, lambda w: w.update({"lm_head.weight": w.pop(embedding)}))
    torch.testing.assert_close(logits(tmp_path), theirs(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize("case", TIED)
@torch.no_grad()
def test_a_head_that_differs_from_a_tied_embedding_counts_as_transformers_has_it(
    case: str, tmp_path: Path
) -> None:
    theirs = save_hf_model(tmp_path, case)
    head = torch.randn_like(theirs.get_output_embeddings().weight)
    edit_weights(tmp_path, lambda w: w.update({"lm_head.weight": head}))
    expected = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)(TOKENS).logits
    assert (expected - theirs(TOKENS).logits).abs().max() > 0.1
    torch.testing.assert_close(logits(tmp_path), expected, **CLOSE)


def test_a_missing_shard_is_found_before_anything_is_read(tmp_path: Path) -> None:
    theirs = save_hf_model(tmp_path / "one", "llama")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    HFCheckpointer(str(tmp_path))
    (tmp_path / names[1]).unlink()
    message = f"lacks 1 of its {len(names)} weight files, for example {names[1]}"
    with pytest.raises(UserError, match=message):
        HFCheckpointer(str(tmp_path))


def test_weights_in_half_precision_are_loaded_as_what_the_recipe_wants(tmp_path: Path) -> None:
    theirs = save_hf_model(tmp_path, "gemma2 uncapped")
    theirs.half().save_pretrained(tmp_path)
    with torch.no_grad():
        # Read again: half() also rounds the tables of the rotary embedding.
        expected = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(logits(tmp_path), expected, **CLOSE)


def test_it_is_not_for_torchtunes_builders(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "llama")
    model = qst_llama2(**TINY, reduction_factor=4)
    checkpointer = HFCheckpointer(str(tmp_path))
    with pytest.raises(UserError, match=r"is for \*_from_hf; .*FullModelHFCheckpointer"):
        load_backbone(model, checkpointer, dtype=torch.float32, device=torch.device("cpu"))


CPU = torch.device("cpu")
MODELS = {
    "nf4": (qst_from_hf, {"reduction_factor": 4}),
    "fp4": (qst_from_hf, {"reduction_factor": 4, "base_quantization": "fp4"}),
    "int8": (qst_from_hf, {"reduction_factor": 4, "base_quantization": "int8"}),
    "int8 embedding": (qst_from_hf, {"reduction_factor": 4, "embedding_quantization": "int8"}),
    "peqa": (peqa_from_hf, {"bits": 3, "group_size": 32}),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_hf_model(tmp_path / "model", "qwen3 biases")
    return tmp_path / "model"


def build(directory: Path, kind: str = "nf4", dtype=torch.float32):
    builder, arguments = MODELS[kind]
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = builder(str(directory), **arguments)
    checkpointer = HFCheckpointer(str(directory), cache_dir=str(directory.parent / "cache"))
    return model, checkpointer, backbone_cache(checkpointer, model, dtype)


def filled(directory: Path, kind: str = "nf4", dtype=torch.float32):
    model, checkpointer, cache = build(directory, kind, dtype)
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
def test_the_backbone_comes_back_to_the_last_bit(kind: str, dtype, directory: Path) -> None:
    expected, fingerprint, cache = filled(directory, kind, dtype)
    cache.save(expected, fingerprint)
    model, _, cache = build(directory, kind, dtype)
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
    directory = tmp_path / "model"
    tiny_model(model_type, vocab_size=307).save_pretrained(directory)
    expected, fingerprint, cache = filled(directory)
    cache.save(expected, fingerprint)
    model, _, cache = build(directory)
    cache.load(model, CPU)
    tokens, _ = padded_batch("left", (10,))
    for each in (model, expected):
        each.initialize_side(CPU)
    assert torch.equal(model(tokens), expected(tokens))


def test_another_directory_format_or_dtype_has_another_file(directory: Path) -> None:
    paths = {build(directory, kind)[2].path for kind in MODELS}
    paths.add(build(directory, dtype=torch.bfloat16)[2].path)
    first = build(directory)[2].path
    edit_config(directory, rope_theta=3.0)
    paths.add(build(directory)[2].path)
    weights = directory / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    paths.add(build(directory)[2].path)
    assert first in paths
    assert len(paths) == len(MODELS) + 3


def test_there_is_no_file_at_first_and_none_without_a_directory_for_it(directory: Path) -> None:
    model, _, cache = build(directory)
    assert cache.load(model, CPU) is None
    assert backbone_cache(HFCheckpointer(str(directory)), model, torch.float32) is None
    with torch.device("meta"):
        dense = qst_from_hf(str(directory), reduction_factor=4, quantize_base=False)
    checkpointer = HFCheckpointer(str(directory), cache_dir=str(directory))
    assert backbone_cache(checkpointer, dense, torch.float32) is None


@pytest.mark.parametrize("damage", ["cut off", "no fingerprint", "another model's", "zeros"])
def test_a_damaged_file_is_passed_over(damage: str, directory: Path, caplog) -> None:
    expected, fingerprint, cache = filled(directory)
    cache.save(expected, fingerprint)
    content = cache.path.read_bytes()
    if damage == "cut off":
        cache.path.write_bytes(content[:-1])
    elif damage == "zeros":
        cache.path.write_bytes(content[:-2000] + bytes(2000))
    elif damage == "no fingerprint":
        save_file(load_file(cache.path), cache.path)
    else:
        save_hf_model(directory.parent / "other", "qwen2")
        other, fingerprint, _ = filled(directory.parent / "other")
        BackboneCache(cache.path).save(other, fingerprint)
    model, _, cache = build(directory)
    assert cache.load(model, CPU) is None
    assert f"{cache.path} is damaged" in caplog.text
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_bit_that_matters_is_checked(directory: Path) -> None:
    """A bit of every 7th byte of the header is flipped in turn, and of every 997th behind it."""
    expected, fingerprint, cache = filled(directory)
    cache.save(expected, fingerprint)
    content = cache.path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    unused = content.index(b'"format":"pt"')  # written for safetensors' own loaders
    wanted = module._all_parts(expected)
    for place in [*range(0, header, 7), *range(header, len(content), 997)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        cache.path.write_bytes(damaged)
        try:
            found, of_found = cache.read(wanted)
        except (SafetensorError, KeyError, TypeError, ValueError):
            continue
        is_padding = content[place : place + 1] == b" "
        assert is_padding or unused <= place < unused + len(b'"format":"pt"'), place
        assert of_found == fingerprint
        assert all(torch.equal(found[name], part) for name, part in wanted.items())


def test_a_file_that_another_process_writes_is_left_to_it(directory: Path, caplog) -> None:
    model, fingerprint, cache = filled(directory)
    with locked(cache.path.parent, wait=False) as is_held:
        assert is_held
        cache.save(model, fingerprint)
    assert "another process writes there" in caplog.text
    assert not cache.path.exists()
    cache.save(model, fingerprint)
    assert cache.path.is_file()


def test_a_full_disk_is_a_warning_and_leaves_nothing(directory: Path, monkeypatch, caplog) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    model, fingerprint, cache = filled(directory)
    cache.save(model, fingerprint)
    assert "cannot be kept in" in caplog.text
    assert [path.name for path in cache.path.parent.iterdir()] == [LOCK_NAME]
