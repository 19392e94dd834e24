"""The weights of a directory arrive, in whatever files they are, and broken ones are named."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qst_tune.backbone.hf_checkpointer import HFCheckpointer
from qst_tune.backbone.torchtune_loading import fingerprint_backbone, load_backbone
from qst_tune.errors import UserError
from qst_tune.models import backbone_from_hf, qst_llama2
from tests.support.hf_models import edit_config, loaded, save_hf_model
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
