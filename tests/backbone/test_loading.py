"""Directories of transformers' models are loaded by its own means, or refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from qst_tune.backbone.identity import Fingerprint, fingerprint_files
from qst_tune.backbone.loading import backbone_on_meta, load_transformers_backbone
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.models import backbone_from_hf, qst_from_hf
from qst_tune.quantization.table import QuantizedTable
from tests.support.model_types import SIZES, tiny_model

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 27).view(2, 12)
MEMORY = Path(__file__).parents[1] / "support" / "loading_memory.py"


def load(directory: Path, **settings: Any) -> Any:
    with torch.device("meta"):
        model = qst_from_hf(str(directory), reduction_factor=4, **settings)
    load_transformers_backbone(model.backbone, directory, dtype=torch.float32, device=CPU)
    model.initialize_side(CPU)
    return model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    tiny_model("smollm3").save_pretrained(tmp_path)
    return tmp_path


def edit(directory: Path, change) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_the_modules_stay_those_that_were_built(directory: Path) -> None:
    """A loss takes the LM head of the model on meta, before it has weights."""
    with torch.device("meta"):
        model = qst_from_hf(str(directory), reduction_factor=4)
    head = model.output
    load_transformers_backbone(model.backbone, directory, dtype=torch.bfloat16, device=CPU)
    assert model.output is head
    assert head.weight.device == CPU


@torch.no_grad()
def test_embedding_and_tied_head_are_one_table(directory: Path) -> None:
    model = load(directory, base_quantization="none", embedding_quantization="int8")
    table = model.tok_embeddings.weight
    assert isinstance(table, QuantizedTable)
    assert model.output.weight is table
    plain = load(directory, base_quantization="none")
    assert (model(TOKENS) - plain(TOKENS)).abs().max() < 0.2 * plain(TOKENS).abs().max()
    assert model.backbone.quantization == "none; embedding int8"


@torch.no_grad()
@pytest.mark.parametrize("form", ["int8", "int4", "fp4"])
def test_other_formats_are_what_a_model_in_memory_is_rounded_to(form: str, directory: Path) -> None:
    from qst_tune.models import qst_decoder

    settings = {"reduction_factor": 4, "base_quantization": form}
    expected = qst_decoder(TransformersBackbone(tiny_model("smollm3")), **settings)
    assert torch.equal(load(directory, base_quantization=form)(TOKENS), expected(TOKENS))


def test_a_row_may_not_be_longer_than_the_models_positions(directory: Path) -> None:
    assert backbone_from_hf(str(directory)).max_seq_len == SIZES["max_position_embeddings"]
    assert backbone_from_hf(str(directory), max_seq_len=10).max_seq_len == 10
    with pytest.raises(UserError, match=r"max_seq_len=257 is more than the 256 positions"):
        backbone_from_hf(str(directory), max_seq_len=257)


def test_a_missing_weight_is_named(directory: Path) -> None:
    edit(directory, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load(directory)


def test_a_weight_of_another_shape_is_refused(directory: Path) -> None:
    edit(directory, lambda w: w.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(UserError, match=r"transformers cannot load this model.*smollm3"):
        load(directory)


def test_another_directory_than_the_one_described_is_refused(
    directory: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model("smollm3", num_hidden_layers=3, layer_types=None).save_pretrained(other)
    backbone = backbone_on_meta(directory)
    with pytest.raises(UserError, match="describes another model"):
        load_transformers_backbone(backbone, other, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "smoll"}, "transformers cannot read it"),
        ({"model_type": "t5"}, "only decoders"),
        ({"model_type": "vit"}, "writes no text"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method='hqq' is not supported"),
    ],
)
def test_what_cannot_be_a_backbone_is_one_line(settings, message, directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **settings}))
    with pytest.raises(UserError, match=message) as error:
        backbone_from_hf(str(directory))
    assert "\n" not in str(error.value)


def test_an_older_transformers_is_one_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", "4.57.6")
    with pytest.raises(UserError, match=r"needs transformers 5 \(found 4\.57\.6\): pip install"):
        backbone_on_meta(directory)


@torch.no_grad()
def test_a_head_that_scales_in_an_unknown_way_is_refused(directory: Path) -> None:
    backbone = backbone_on_meta(directory)
    backbone.model.lm_head.register_forward_hook(lambda module, args, output: output)
    backbone.config.logit_scale = 2.0  # which SmolLM3's code does not read
    wrong = TransformersBackbone(backbone.model, str(directory))
    with pytest.raises(UserError, match="its logits are more than its LM head"):
        load_transformers_backbone(wrong, directory, dtype=torch.float32, device=CPU)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
    "head_dim": 16,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def vision_language_model(model_type: str) -> Any:
    default = AutoConfig.for_model(model_type)
    text = {n: v for n, v in SIZES.items() if hasattr(default.text_config, n)}
    vision = {n: v for n, v in VISION.items() if hasattr(default.vision_config, n)}
    if model_type == "qwen3_vl":
        text["rope_parameters"] = MROPE
    further = {"mm_tokens_per_image": 4} if model_type == "gemma3" else {}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **further)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl", "mistral3"])
@torch.no_grad()
def test_of_a_vision_language_model_the_text_is_taken(model_type: str, tmp_path: Path) -> None:
    theirs = vision_language_model(model_type)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, base_quantization="none")
    expected = theirs(input_ids=TOKENS).logits
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)
    assert not any("vision" in name or "visual" in name for name, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.pretrained
def test_loading_takes_no_more_than_the_result_one_shard_and_a_fifth() -> None:
    directory = Path(os.path.expanduser("~/.cache/qst_tune/SmolLM2-135M-Instruct"))
    output = subprocess.run(
        [sys.executable, str(MEMORY), str(directory)], capture_output=True, text=True, check=True
    )
    peak, weights = map(int, output.stdout.split()[-2:])
    shard = (directory / "model.safetensors").stat().st_size
    assert peak < 1.2 * (weights + shard)


def with_nan(weight: torch.Tensor) -> torch.Tensor:
    weight.view(-1)[5] = torch.nan
    return weight


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, "has 1 of .* values that are not finite"),
        (lambda w: w.to(torch.int8), "is torch.int8, where floating-point numbers are expected"),
    ],
)
def test_integers_and_values_that_are_not_finite_are_named(
    name: str, change: Any, message: str, directory: Path
) -> None:
    edit(directory, lambda weights: weights.update({name: change(weights[name])}))
    with pytest.raises(UserError, match=rf"the backbone's weight {name} {message}"):
        load(directory)


def test_the_fingerprint_is_that_of_the_files_also_of_what_the_model_does_not_read(
    directory: Path,
) -> None:
    path = directory / "model.safetensors"

    def fingerprint() -> Fingerprint:
        backbone = backbone_on_meta(directory)
        backbone.quantize("nf4", "none")
        return load_transformers_backbone(backbone, directory, dtype=torch.float32, device=CPU)

    before = fingerprint()
    assert before == fingerprint_files([path])
    edit(directory, lambda weights: weights.update({"not.used": torch.ones(3)}))
    assert before != fingerprint() == fingerprint_files([path])
