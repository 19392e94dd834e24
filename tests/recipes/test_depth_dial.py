"""LoRA in the last layers through ``qst_finetune``: kept states, resuming, bf16, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.torchtune_backbone import TorchtuneBackbone
from tests.support.checkpoints import SIZES, Config, finetune_config
from tests.support.nine_steps import RESUME, SETTINGS, assert_identical, cut
from tests.support.recipe_runs import FinetuneResult, finetune

pytestmark = pytest.mark.usefixtures("no_plots")

# A side block at every layer: one reads the state that LoRA begins at.
DIAL = ["model.lora_layers=1", "model.lora_rank=4", "model.lora_dropout=0.3"]
TWO_EPOCHS = ["epochs=2", "batch_size=2", "gradient_accumulation_steps=2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return finetune_config(tmp_path_factory.mktemp("dial"))


def assert_same(run: FinetuneResult, expected: FinetuneResult) -> None:
    assert run.train_loss.tolist() == expected.train_loss.tolist()
    assert run.val_loss == expected.val_loss
    assert run.weights_file.read_bytes() == expected.weights_file.read_bytes()


@pytest.mark.parametrize("recompute", [True, False])
def test_later_epochs_read_the_layers_below_lora_and_end_with_the_same_bits(
    recompute: bool, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [*DIAL, *TWO_EPOCHS, f"enable_activation_checkpointing={recompute}"]
    kept.append(f"hidden_state_cache={tmp_path / 'states'}")
    ran: list[int] = []
    prefix = TorchtuneBackbone.prefix

    def counted(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        ran.append(kwargs["until"])
        return prefix(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TorchtuneBackbone, "prefix", counted)
        run = finetune(config, tmp_path / "run", *kept)
    # Four batches and the validation set's three, each once.
    assert ran == [2] * 7
    monkeypatch.setattr(
        HiddenStateCache,
        "run",
        lambda self, compute, embed, tokens, *, taps, visit, **_: compute(taps=taps, visit=visit),
    )
    assert_same(run, finetune(config, tmp_path / "computed", *kept))


def test_what_another_depth_kept_is_not_read(config: Config, tmp_path: Path) -> None:
    kept = f"hidden_state_cache={tmp_path / 'states'}"
    for depth in (1, 2):
        run = finetune(config, tmp_path / f"{depth}", kept, f"model.lora_layers={depth}")
    assert_same(run, finetune(config, tmp_path / "plain", "model.lora_layers=2"))
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_kept_states_with_lora_in_all_layers_are_refused(config: Config, tmp_path: Path) -> None:
    everywhere = f"model.lora_layers={SIZES['num_layers']}"
    with pytest.raises(UserError) as error:
        finetune(config, tmp_path / "run", everywhere, f"hidden_state_cache={tmp_path / 's'}")
    told = "has nothing to keep: lora_layers=3 are all layers; set it to null, or train fewer"
    assert str(error.value) == f"hidden_state_cache={tmp_path / 's'} {told}"
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["enable_activation_checkpointing=True", "dtype=bf16"],
        pytest.param(["dataset.packed=True", "seed=null"], marks=pytest.mark.slow),
        pytest.param(["model.num_side_blocks=0", "model.lora_layers=3"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits_and_keeps_its_lora(
    settings: list[str], nine_steps: Config, tmp_path: Path
) -> None:
    settings = [*SETTINGS, *DIAL, *settings]
    run = finetune(nine_steps, tmp_path / "whole", *settings)
    step = len(run.train_loss) // 2
    resumed = finetune(nine_steps, cut(run, tmp_path / "cut", step), *settings, RESUME)
    assert_identical(resumed, run)
    for change in ("lora_layers=2", "lora_rank=2", "lora_alpha=1", "lora_dropout=0.1"):
        key, value = change.split("=")
        with pytest.raises(UserError, match=f"model.{key}: .* when saved, {value}.* now") as error:
            finetune(nine_steps, resumed.directory, *settings, RESUME, f"model.{change}")
        assert "\n" not in str(error.value)


def test_bf16_trains_as_fp32_does(config: Config, tmp_path: Path) -> None:
    """A bf16 number has 8 bits: 0.4 % of a loss of 6, and nothing that is not finite."""
    runs = [
        finetune(config, tmp_path / dtype, *DIAL[:2], "epochs=4", f"dtype={dtype}")
        for dtype in ("fp32", "bf16")
    ]
    torch.testing.assert_close(runs[1].train_loss, runs[0].train_loss, rtol=0.02, atol=0)
    assert all(tensor.isfinite().all() for tensor in runs[1].weights.values())
    assert runs[1].train_loss[-1] < 0.9 * runs[1].train_loss[0]
