"""Names of other programs' settings get the name that they have here."""

import re
from pathlib import Path

import pytest

from qst_tune.config.check import read_config
from qst_tune.config.file import parse_config
from qst_tune.config.other_names import OTHER_NAMES
from qst_tune.config.schema import TRAINING_KEYS, TrainingConfig
from qst_tune.errors import UserError

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2" / "135M_qst.yaml"


def problems(*overrides: str) -> list[str]:
    cfg = parse_config(["--config", str(CONFIG), *overrides])
    with pytest.raises(UserError) as error:
        read_config(cfg, TrainingConfig)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("learning_rate", "optimizer.lr=..."),
        ("num_train_epochs", "epochs=..."),
        ("per_device_train_batch_size", "batch_size=..."),
        ("lora_r", "none: a side network has model.reduction_factor=..."),
        ("bf16", "dtype=bf16"),
    ],
)
def test_the_name_here_is_reported(key: str, ours: str) -> None:
    (line,) = problems(f"{key}=1")
    assert line.startswith(f"config: unknown key {key!r}; in qst_tune it is {ours}")


def test_inside_a_block_too() -> None:
    (line,) = problems("model.load_in_4bit=True")
    assert line.endswith(
        "takes no argument 'load_in_4bit'; in qst_tune it is "
        "model.base_quantization=nf4, which QST has by default"
    )


def test_no_name_of_ours_is_taken_for_another_programs() -> None:
    assert not OTHER_NAMES.keys() & TRAINING_KEYS.keys()


def test_every_key_that_is_named_exists() -> None:
    """The first word of each hint: a key of a training config, of a recipe, or "none"."""
    recipe_keys = {"none", "temperature", "max_new_tokens", "checkpoint_dir"}
    named = {re.split(r"\W", hint)[0] for hint in OTHER_NAMES.values()}
    assert named <= {*TRAINING_KEYS, *recipe_keys}
