"""The checkpoint's config.json against the model: every property that shapes cannot show."""

import json
from pathlib import Path

import pytest
import torch
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_2 import llama3_2

from qst_tune.backbone.architecture_check import check_architecture
from qst_tune.errors import UserError
from tests.support.checkpoints import SIZES, hf_config


def write(directory: Path, **changes) -> Path:
    (directory / "config.json").write_text(json.dumps(hf_config(**changes)))
    return directory


def model(**changes):
    with torch.device("meta"):
        return llama3_2(**{**SIZES, **changes})


def test_the_checkpoints_own_model_passes(tmp_path: Path) -> None:
    check_architecture(model(), write(tmp_path))


def test_directory_without_a_config_passes(tmp_path: Path) -> None:
    check_architecture(model(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, "vocab_size is 320 in the checkpoint and 100 in the model"),
        ({"num_layers": 1}, "num_layers is 3 in the checkpoint and 1 in the model"),
        ({"embed_dim": 32}, "embed_dim is 64 in the checkpoint and 32 in the model"),
        ({"num_heads": 8}, "num_heads is 4 in the checkpoint and 8 in the model"),
        ({"num_kv_heads": 4}, "num_kv_heads is 2 in the checkpoint and 4 in the model"),
        ({"intermediate_dim": 64}, "intermediate_dim is 96 in the checkpoint and 64 in the mod"),
        ({"rope_base": 20_000}, r"rope_base is 10000\.0 in the checkpoint and 20000\.0 in the"),
        ({"scale_factor": 32}, r"rope scale_factor is 1\.0 in the checkpoint and 32\.0 in the"),
    ],
)
def test_each_difference_is_named_with_both_values(changes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"model block does not fit {tmp_path}: .*{message}"):
        check_architecture(model(**changes), write(tmp_path))


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_layers is .*; rope_base is "):
        check_architecture(model(num_layers=1, rope_base=1), write(tmp_path))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_rotary_base_is_found_where_either_transformers_writes_it(rope, tmp_path: Path) -> None:
    check_architecture(model(rope_base=500), write(tmp_path, **rope))
    with pytest.raises(UserError, match=r"rope_base is 500\.0"):
        check_architecture(model(), write(tmp_path, **rope))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_rotary_embedding_is_found_under_both_names(key: str, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 10_000.0}
    check_architecture(model(scale_factor=32), write(tmp_path, **{key: rope}))
    with pytest.raises(UserError, match=r"rope scale_factor is 32\.0"):
        check_architecture(model(), write(tmp_path, **{key: rope}))


def test_plain_rotary_embedding_of_llama2_is_known(tmp_path: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "scale_factor"}
    with torch.device("meta"):
        check_architecture(llama2(**sizes), write(tmp_path))


def test_config_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        check_architecture(model(), tmp_path)
