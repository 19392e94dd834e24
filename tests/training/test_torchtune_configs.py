"""torchtune's own LoRA and QLoRA configs become ours by their model block, as README says."""

from pathlib import Path

import pytest
import torchtune
from omegaconf import DictConfig, OmegaConf

from qst_tune.config.check import config_problems, read_config
from qst_tune.config.schema import TRAINING_KEYS, TrainingConfig
from qst_tune.errors import Problem, UserError

CONFIGS = Path(torchtune.__file__).parents[1] / "recipes" / "configs"
MODEL = {"_component_": "qst_tune.models.qst_llama2_7b", "reduction_factor": 16}
# What other recipes than LoRA's do: quantization-aware training, distillation, several datasets
# in one of torchtune's development recipes.
FOREIGN = ("quantizer", "teacher_model", "teacher_checkpointer", "kd_loss", "kd_ratio")
DEVELOPMENT = ("dev/11B_lora_multi_dataset.yaml",)


def with_our_model(path: Path) -> DictConfig:
    cfg = OmegaConf.load(path)
    cfg.model = MODEL
    return cfg


def is_expected(problem: Problem) -> bool:
    """A package of image models, and what other recipes do."""
    is_foreign = problem.key in FOREIGN and "; in qst_tune it is none" in problem.text
    return is_foreign or "No module named 'torchvision'" in problem.text


def test_all_of_them_pass() -> None:
    paths = [p for p in CONFIGS.rglob("*lora*.yaml") if not p.as_posix().endswith(DEVELOPMENT)]
    assert len(paths) == 86
    found = {
        path.name: [
            problem.text
            for problem in config_problems(with_our_model(path), TRAINING_KEYS)
            if not is_expected(problem)
        ]
        for path in paths
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("offload", [False, True])
def test_the_block_fsdp_is_accepted_as_torchtune_ships_it_only(offload: bool) -> None:
    cfg = with_our_model(CONFIGS / "llama2" / "7B_qlora.yaml")
    cfg.fsdp.cpu_offload = offload
    with pytest.raises(UserError, match="checkpoint_dir") as error:  # not on this machine
        read_config(cfg, TrainingConfig)
    advice = "fsdp.cpu_offload=True: use backbone_sharding=full and fsdp_cpu_offload=True"
    assert (advice in str(error.value)) == offload
    assert str(error.value).count("fsdp") == (2 if offload else 0)
