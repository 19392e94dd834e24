"""Backbone and side network as one checkpoint, as torchtune's own recipes load it."""

from pathlib import Path

import pytest
import torch
from torchtune import training

from qst_tune.errors import UserError
from qst_tune.models import qst_llama3_2
from qst_tune.results.tuned_checkpointer import TunedCheckpointer
from tests.support.checkpoints import SIZES, random_weights, write_checkpoint
from tests.support.directories import side_network_directory
from tests.support.numbers import random_tokens


def checkpointer(directory: Path, backbone: Path, **settings: object) -> TunedCheckpointer:
    return TunedCheckpointer(
        str(directory),
        str(backbone),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(directory.parent / "unused"),
        **settings,
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"embedding_quantization": "int8"},
        {"base_quantization": "int8"},
        {"lora_layers": 2, "lora_rank": 2},
        {"lora_layers": 3, "num_side_blocks": 0},
    ],
)
def test_a_model_that_loads_it_as_stock_recipes_do_is_the_tuned_one(
    settings: dict[str, object], tmp_path: Path
) -> None:
    directory, expected = side_network_directory(tmp_path, **settings)
    state = checkpointer(directory, tmp_path / "model").load_checkpoint()[training.MODEL_KEY]
    model = qst_llama3_2(**SIZES, reduction_factor=4, rank=4, **settings)
    model.load_state_dict(state)  # strict: with every weight of both
    training.validate_expected_param_dtype(model.named_parameters(), dtype=torch.float32)
    model.eval()
    tokens = random_tokens(vocab_size=300)
    assert torch.equal(model(tokens), expected(tokens))


def test_a_repaired_backbone_is_refused_in_one_line(tmp_path: Path) -> None:
    directory, _ = side_network_directory(tmp_path, repair_rank=8)
    with pytest.raises(UserError, match=r"over a repaired backbone .*use qst_generate") as error:
        checkpointer(directory, tmp_path / "model").load_checkpoint()
    assert "\n" not in str(error.value)


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    directory, _ = side_network_directory(tmp_path)
    write_checkpoint(tmp_path / "other", random_weights(seed=1))
    with pytest.raises(UserError, match="was trained on another backbone"):
        checkpointer(directory, tmp_path / "other").load_checkpoint()
    write_checkpoint(tmp_path / "turned", rope_theta=77.0)
    with pytest.raises(UserError, match=r"rope_base is 77.0 in the checkpoint"):
        checkpointer(directory, tmp_path / "turned").load_checkpoint()
