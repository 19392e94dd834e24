"""Directories of the authors' code become ours and theirs again, bit for bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.models.gemma import gemma
from torchtune.models.qwen2 import qwen2

from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.models import qst_builder
from qst_tune.models.build import build_on_meta
from qst_tune.modules.meta_device import materialize
from qst_tune.results.authors.checkpoint import (
    Weights,
    read_authors_directory,
    side_to_authors,
    write_authors_directory,
)
from qst_tune.results.authors.conversion import export_authors, import_authors
from qst_tune.results.tuned_directory import Provenance, save_tuned
from tests.support import opt_models
from tests.support.checkpoints import SIZES
from tests.support.numbers import TINY
from tests.support.shared_data import AUTHORS_LLAMA as GOLDEN
from tests.support.shared_data import needs

needs_golden = needs(GOLDEN)
BACKBONE = BackboneId("somewhere", "0" * 64, "nf4")

LLAMA = {"_component_": "qst_tune.models.qst_llama3_2", **SIZES}
# 288 / 17 and 288 / 18 are both 16; 300 / 17 and 300 / 18 are not the same.
AMBIGUOUS = {**LLAMA, "num_heads": 2, "embed_dim": 288, "intermediate_dim": 300}
OPT = {"_component_": "qst_tune.models.qst_from_hf", "checkpoint_dir": opt_models.OPT_DIRECTORY}
CLASSIFIER = {"_component_": "qst_tune.models.qst_classifier", "num_labels": 3}
LLAMA_CLASSIFIER = {**LLAMA, **CLASSIFIER, "backbone": "torchtune.models.llama3_2.llama3_2"}
OPT_CLASSIFIER = {**OPT, **CLASSIFIER, "backbone": "qst_tune.models.backbone_from_hf"}
GOLDEN_BLOCK = {
    "_component_": "qst_tune.models.qst_llama2",
    "vocab_size": 128,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 160,
    "max_seq_len": 64,
}


def config(block: dict[str, Any]) -> DictConfig:
    """The model block of a training config; the settings of the side network are to be ignored."""
    ignored = {"downsample": "avgpool", "dropout": 0.1}
    if "num_labels" in block:
        ignored["num_labels"] = 7
    return OmegaConf.create({**block, **ignored})


def random_side(block: dict[str, Any], dtype=torch.float32):
    model = build_on_meta(OmegaConf.create(block), torch.float32)
    materialize(model.side, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.side.parameters():
            parameter.normal_()
    return model.side.to(dtype)


def random_state(block: dict[str, Any], dtype=torch.float32) -> Weights:
    """A side network under the names of the authors' model."""
    side = random_side({"variant": "authors", **block}, dtype)
    attn = side.blocks[0].attn
    family = "opt" if "checkpoint_dir" in block else "llama"
    heads = {"num_heads": attn.num_heads, "num_kv_heads": attn.num_kv_heads}
    return side_to_authors(side.state_dict(), family, **heads)


def save(directory: Path, side, block: dict[str, Any]) -> None:
    save_tuned(directory, side, Provenance(BACKBONE, block, ""))


def assert_same_tensors(actual: Weights, expected: Weights) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block", "reduction_factor", "rank"),
    [
        (LLAMA, 4, 5),
        (LLAMA, 1, 64),
        (AMBIGUOUS, 17, 3),
        (AMBIGUOUS, 18, 3),
        (OPT, 3, 6),
        (LLAMA_CLASSIFIER, 4, 5),
        (OPT_CLASSIFIER, 3, 6),
    ],
    ids=["llama", "full width", "first r", "second r", "opt", "classifier", "opt classifier"],
)
def test_theirs_to_ours_and_back_is_exact_and_finds_the_shapes(
    block, reduction_factor, rank, dtype, tmp_path: Path
):
    chosen = {**block, "reduction_factor": reduction_factor, "rank": rank}
    expected = random_state(chosen, dtype)
    write_authors_directory(tmp_path / "theirs", expected)
    assert len(list((tmp_path / "theirs").iterdir())) == (7 if "num_labels" in block else 6)
    model, found = import_authors(tmp_path / "theirs", config(block))
    assert found == {**chosen, "variant": "authors"}
    save(tmp_path / "ours", model.side, found)
    state, settings = export_authors(tmp_path / "ours", config(block))
    assert (settings["r"], settings["peft_hidden_size"]) == (reduction_factor, rank)
    assert settings.get("num_labels") == block.get("num_labels")
    write_authors_directory(tmp_path / "again", state)
    again = read_authors_directory(tmp_path / "again", classifier="num_labels" in block)
    assert_same_tensors(again, expected)


@needs_golden
def test_a_directory_of_theirs_comes_back_bit_for_bit(tmp_path: Path):
    model, found = import_authors(GOLDEN / "authors_qst_state", config(GOLDEN_BLOCK))
    assert (found["reduction_factor"], found["rank"]) == (4, 8)
    save(tmp_path / "ours", model.side, found)
    write_authors_directory(tmp_path / "again", export_authors(tmp_path / "ours", config(found))[0])
    files = {path.name for path in (GOLDEN / "authors_qst_state").iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == files
    for name in files:
        theirs, ours = (
            torch.load(directory / name, weights_only=True)
            for directory in (GOLDEN / "authors_qst_state", tmp_path / "again")
        )
        assert isinstance(ours, torch.nn.Parameter) == isinstance(theirs, torch.nn.Parameter)
        bare = isinstance(theirs, torch.Tensor)
        assert_same_tensors({"": ours} if bare else ours, {"": theirs} if bare else theirs)


def test_a_trained_side_network_of_ours_goes_there_and_comes_back(tmp_path: Path):
    block = {**LLAMA, "variant": "authors", "reduction_factor": 4, "rank": 5, "initial_gamma": 0.0}
    side = random_side(block)
    save(tmp_path / "ours", side, block)
    state, _ = export_authors(tmp_path / "ours", config(LLAMA))
    write_authors_directory(tmp_path / "theirs", state)
    model, _ = import_authors(tmp_path / "theirs", config(LLAMA))
    assert_same_tensors(model.side.state_dict(), side.state_dict())


@pytest.mark.parametrize(
    ("block", "start"), [(LLAMA_CLASSIFIER, 1.0), (OPT_CLASSIFIER, 0.0)], ids=["llama", "opt"]
)
def test_a_gate_that_their_code_did_not_write_has_its_start_and_is_said_to(
    block, start, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """As every classifier's directory of theirs is; the export holds it, since they ask for it."""
    reduction_factor = 4 if start else 3  # which divide 64 and 48
    state = random_state({**block, "reduction_factor": reduction_factor, "rank": 5})
    write_authors_directory(tmp_path / "theirs", state)
    (gate_file,) = (tmp_path / "theirs").glob("score_z*")
    gate_file.unlink()
    model, found = import_authors(tmp_path / "theirs", config(block))
    assert f"taking its start {start:g}" in caplog.text
    save(tmp_path / "ours", model.side, found)
    exported, _ = export_authors(tmp_path / "ours", config(block))
    gate = torch.full_like(state["score_z"], start)
    assert_same_tensors(exported, {**state, "score_z": gate})
    write_authors_directory(tmp_path / "again", exported)
    assert (tmp_path / "again" / gate_file.name).exists()


# What cannot be imported.


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    directory = tmp_path / "theirs"
    write_authors_directory(directory, random_state({**LLAMA, "reduction_factor": 4, "rank": 5}))
    return directory


def refused(directory: Path, block: dict[str, Any] = LLAMA) -> str:
    with pytest.raises(UserError) as error:
        import_authors(directory, config(block))
    message = str(error.value)
    assert "\n" not in message
    return message


def edit(path: Path, change) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_another_backbone_is_named_with_both_sizes(theirs: Path):
    message = refused(theirs, {**LLAMA, "num_layers": 4})
    assert "is for a backbone of 3 layers of width 64, the config's has 4 of width 64" in message
    message = refused(theirs, {**LLAMA, "embed_dim": 128})
    assert "the config's has 3 of width 128: name the backbone" in message


def test_other_heads_or_mlp_widths_are_refused_with_a_tensor_that_shows_it(theirs: Path):
    message = refused(theirs, {**LLAMA, "intermediate_dim": 200})
    assert "blocks.0.mlp.w1.weight is (24, 16) and not (50, 16)" in message
    message = refused(theirs, {**LLAMA, "num_kv_heads": 4})
    assert "blocks.0.attn.k_proj.weight is (8, 16) and not (16, 16)" in message


def test_side_blocks_that_our_attention_cannot_split_are_refused(tmp_path: Path):
    """r = 8 gives width 8, and 4 heads of 2: theirs computes that, ours takes 2 heads of 4."""
    state = random_state({**LLAMA, "reduction_factor": 8, "rank": 5})
    write_authors_directory(tmp_path / "theirs", state)
    assert "cannot be computed here: side blocks have {'num_heads': 2" in refused(
        tmp_path / "theirs"
    )


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("qst_upsample_parameters.pt", lambda c: c.pop("weight"), "upsample.weight is absent"),
        (
            "qst_upsample_parameters.pt",
            lambda c: c.update(weight=torch.ones(3)),
            "upsample.weight is of shape (3,)",
        ),
        (
            "qst_upsample_parameters.pt",
            lambda c: c.update(weight=torch.ones(64, 96)),
            "no reduction_factor gives over qst_tune.models.qst_llama3_2: their side network has "
            "width 96",
        ),
        ("qst_z_parameters.pt", lambda c: c.pop("1"), "gates.1.gamma is absent and not (16,)"),
        ("qst_z_parameters.pt", lambda c: c.update(x=torch.ones(1)), "no side network over this"),
        ("qst_layers_parameters.pt", lambda c: c.update(x=torch.ones(1)), "no side network over"),
        (
            "qst_norm_parameters.pt",
            lambda c: c.update(weight=torch.ones(17)),
            "norm.scale is (17,) and not (16,)",
        ),
        ("qst_norm_parameters.pt", lambda c: c.update(weight=3), "it has more than tensors"),
    ],
)
def test_tensors_of_no_side_network_are_refused(theirs: Path, file, change, expected):
    edit(theirs / file, change)
    assert expected in refused(theirs)


# What cannot be exported.


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "normalize_hidden True in it, False in theirs"),
        (
            {"variant": "authors", "downsample": "lora"},
            "downsample 'lora' in it, 'adapter' in theirs",
        ),
        ({"variant": "authors", "num_side_blocks": 2}, "layers [0, 2] in it, [0, 1, 2] in theirs"),
        ({"variant": "paper"}, "output_mix 'alpha' in it, 'sigmoid' in theirs"),
        ({"variant": "authors", "activation": "relu"}, "activation 'relu' in it, 'silu' in theirs"),
        ({"variant": "authors", "min_head_dim": 8}, "num_heads 2 in it, 4 in theirs"),
    ],
)
def test_what_their_code_does_not_compute_is_not_exported(settings, expected, tmp_path: Path):
    block = {**LLAMA, "reduction_factor": 4, "rank": 5, **settings}
    save(tmp_path / "ours", random_side(block), block)
    with pytest.raises(UserError, match="is nothing that the authors' code computes: ") as error:
        export_authors(tmp_path / "ours", config(LLAMA))
    assert expected in str(error.value)


@pytest.mark.parametrize("settings", [{}, {"num_side_blocks": 0}])
def test_lora_is_not_exported(settings, tmp_path: Path):
    block = {**LLAMA, "variant": "authors", "lora_layers": 1, "lora_rank": 2, **settings}
    save(tmp_path / "ours", random_side(block), block)
    with pytest.raises(UserError, match="has LoRA in the last 1 of 3 layers, which the authors'"):
        export_authors(tmp_path / "ours", config(LLAMA))


@pytest.mark.parametrize("block", [LLAMA, LLAMA_CLASSIFIER], ids=["language model", "classifier"])
def test_a_config_of_the_other_kind_is_refused_both_ways(block, tmp_path: Path):
    chosen = {**block, "variant": "authors", "reduction_factor": 4, "rank": 5}
    other = LLAMA if "num_labels" in block else LLAMA_CLASSIFIER
    write_authors_directory(tmp_path / "theirs", random_state(chosen))
    (tmp_path / "theirs" / "score_z_path.pt").unlink(missing_ok=True)
    save(tmp_path / "ours", random_side(chosen), chosen)
    with pytest.raises(UserError, match=r"is a .*'s, and the config's model is not: name its own"):
        export_authors(tmp_path / "ours", config(other))
    message = refused(tmp_path / "theirs", other)
    assert ("is a classifier's" if block is LLAMA_CLASSIFIER else "score_param") in message


def test_an_export_for_another_backbone_is_refused(tmp_path: Path):
    block = {**LLAMA, "reduction_factor": 4, "rank": 5, "variant": "authors"}
    save(tmp_path / "ours", random_side(block), block)
    with pytest.raises(UserError, match="tensors differ, for example"):
        export_authors(tmp_path / "ours", config({**LLAMA, "embed_dim": 128}))


def test_a_builder_that_a_directory_names_is_never_called(tmp_path: Path):
    block = {**LLAMA, "reduction_factor": 4, "rank": 5, "variant": "authors"}
    hostile = {**block, "_component_": "os.mkdir", "path": str(tmp_path / "owned")}
    save(tmp_path / "ours", random_side(block), hostile)
    export_authors(tmp_path / "ours", config(LLAMA))
    assert not (tmp_path / "owned").exists()


# Their norm multiplies by 1 + scale, which no tensor shows; Qwen's rotary pairs are others.
qst_gemma = partial(qst_builder(gemma), **TINY, head_dim=16)
qst_qwen2 = partial(qst_builder(qwen2), **TINY)


@pytest.mark.parametrize("builder", ["qst_gemma", "qst_qwen2"])
def test_a_family_that_their_code_lacks_is_refused_both_ways(builder, theirs, tmp_path: Path):
    block = {"_component_": f"{__name__}.{builder}", "reduction_factor": 4, "rank": 5}
    block["variant"] = "authors"
    save(tmp_path / "ours", random_side(block), block)
    for convert, directory in ((export_authors, tmp_path / "ours"), (import_authors, theirs)):
        with pytest.raises(UserError, match="the authors' code is for LLaMA and OPT"):
            convert(directory, config(block))
