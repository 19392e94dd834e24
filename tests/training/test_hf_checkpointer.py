"""The weights of a folder arrive, in whatever files they are, and broken ones are named."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune import training
from torchtune.training import FullModelHFCheckpointer

from qst_tune.errors import UserError
from qst_tune.models import backbone_from_hf, qst_from_hf
from qst_tune.training.backbone_loading import fingerprint_backbone, load_backbone
from qst_tune.training.hf_checkpointer import HFCheckpointer
from tests.checkpoints import random_weights, write_checkpoint
from tests.hf_models import edit_config, padded_batch, save_hf_model

CPU = torch.device("cpu")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return HFCheckpointer(str(folder)).load_checkpoint()[training.MODEL_KEY]


def load(folder: Path) -> torch.nn.Module:
    with torch.device("meta"):
        model = backbone_from_hf(str(folder))
    load_backbone(model, HFCheckpointer(str(folder)), dtype=torch.float32, device=CPU)
    return model.eval()


def edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_weights_are_torchtunes_own_checkpointers(tmp_path: Path) -> None:
    files = write_checkpoint(tmp_path / "model", num_shards=3)
    theirs = FullModelHFCheckpointer(
        str(tmp_path / "model"), files, model_type="LLAMA3_2", output_dir=str(tmp_path / "out")
    )
    expected = theirs.load_checkpoint()[training.MODEL_KEY]
    actual = read(tmp_path / "model")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with torch.device("meta"):
        model = qst_from_hf(str(tmp_path / "model"), reduction_factor=4)
    ours = HFCheckpointer(str(tmp_path / "model"))
    assert fingerprint_backbone(model, ours) == fingerprint_backbone(model, theirs)


@pytest.mark.parametrize("case", ["phi3 longrope partial", "qwen3 tied yarn"])
def test_every_layout_of_files_gives_the_same_weights(case: str, tmp_path: Path) -> None:
    theirs = save_hf_model(tmp_path / "one", case)
    expected = read(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    write_bin(tmp_path / "bin", theirs, tmp_path / "one" / "config.json")
    for name in ("shards", "bin"):
        actual = read(tmp_path / name)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


def write_bin(folder: Path, model, config: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(config.read_text())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def test_one_file_is_read_at_a_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_shards=3)
    sizes = [len(part) for part in HFCheckpointer(str(tmp_path)).load_files()]
    assert len(sizes) == 3
    assert sum(sizes) == len(random_weights())


def test_nothing_in_a_bin_file_is_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Trap(tmp_path / "touched"), file)
    with pytest.raises(UserError, match=r"bin is damaged, or holds more than weights") as error:
        load(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "touched").exists()


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}),
            r"the checkpoint has a weight that the model lacks: layers\.0\.attn\.q_norm\.scale",
        ),
        (
            lambda w: w.update({"visual.merger.weight": torch.ones(2)}),
            r"model\.safetensors does not fit its config\.json: it has a weight visual\.merger\.w",
        ),
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks 1 of the model's 29 weights, for example layers\.1\.mlp\.w3\.weight",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(5)}),
            r"norm\.scale has shape \(5,\) in the checkpoint and \(64,\) in the model",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(edit, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit_weights(tmp_path, edit)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_head_of_its_own_must_be_there_unless_it_is_tied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lacks 1 of the model's 30 weights.*output\.weight"):
        load(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    load(tmp_path)


@pytest.mark.parametrize("case", ["llama tied llama3", "gemma2 uncapped", "qwen3 tied yarn", "opt"])
def test_of_two_tied_weights_a_file_may_hold_either(case: str, tmp_path: Path) -> None:
    theirs = save_hf_model(tmp_path, case)
    embedding = next(name for name, _ in theirs.named_parameters() if "embed_tokens" in name)
    edit_weights(tmp_path, lambda w: w.update({"lm_head.weight": w.pop(embedding)}))
    ours = load(tmp_path)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    edit_weights(tmp_path, lambda w: w.update({"lm_head.weight": torch.randn(320, 64)}))
    with pytest.raises(UserError, match=r"lm_head\.weight that differs.*tie_word_embeddings"):
        load(tmp_path)


def test_a_bin_file_from_before_torch_1_6_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    expected = read(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    actual = read(tmp_path)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_missing_shard_is_found_before_anything_is_read(tmp_path: Path) -> None:
    names = write_checkpoint(tmp_path, num_shards=2)
    index = {"weight_map": dict.fromkeys("ab", names[0]) | {"c": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    HFCheckpointer(str(tmp_path))
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=f"lacks 1 of its 2 weight files, for example {names[1]}"):
        HFCheckpointer(str(tmp_path))


def test_weights_in_half_precision_are_loaded_as_what_the_recipe_wants(tmp_path: Path) -> None:
    theirs = save_hf_model(tmp_path, "gemma2 uncapped")
    theirs.half().save_pretrained(tmp_path)
    with torch.device("meta"):
        model = backbone_from_hf(str(tmp_path))
    load_backbone(model, HFCheckpointer(str(tmp_path)), dtype=torch.float32, device=CPU)
    tokens, _ = padded_batch("left", (10,))
    with torch.no_grad():
        actual = model(tokens)
        # Read again: half() also rounds the tables of the rotary embedding.
        expected = type(theirs).from_pretrained(tmp_path, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_saving_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(NotImplementedError, match="only reads"):
        HFCheckpointer(str(tmp_path)).save_checkpoint({}, epoch=0)
