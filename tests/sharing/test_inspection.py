"""What is said of a directory, and whether it belongs to a backbone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qst_tune.errors import UserError
from qst_tune.sharing.__main__ import main
from qst_tune.sharing.inspection import inspect_directory, verify_directory
from tests.support.checkpoints import random_weights, write_model_directory
from tests.support.directories import side_network_directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return side_network_directory(tmp_path_factory.mktemp("sharing"))[0]


def test_an_inspection_tells_provenance_results_sizes_and_gates(tmp_path: Path) -> None:
    directory, model = side_network_directory(tmp_path)
    told = inspect_directory(directory)
    side = model.side
    count = sum(p.numel() for p in side.parameters())
    betas = [f"{torch.sigmoid(gate.gamma).mean():.3f}" for gate in side.gates]
    for expected in (
        "QST side network",
        "model (nf4)",
        "qst_tune.models.qst_llama3_2",
        f"{count:,} ({4 * count / 1e6:.2f} MB)",
        f"{sum(p.numel() for p in side.downsample.parameters()):,}",
        " ".join(betas),
        "1.25",
    ):
        assert expected in told


def test_a_directory_that_belongs_is_verified_through_the_command(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = verify_directory(directory, directory.parent / "model")
    assert backbone.quantization == "nf4"
    main(["verify", str(directory), str(directory.parent / "model")])
    assert "belongs to model (nf4) and is whole" in capsys.readouterr().out


def test_what_does_not_belong_or_is_damaged_is_one_line(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_model_directory(tmp_path / "other", weights=random_weights(seed=1))
    with pytest.raises(UserError, match="was trained on another backbone"):
        verify_directory(directory, other)
    cut, _ = side_network_directory(tmp_path)
    weights = cut / "side_network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (["inspect", str(cut)], ["verify", str(cut), str(tmp_path / "model")]):
        with pytest.raises(SystemExit) as info:
            main(command)
        assert info.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert "damaged" in line
    with pytest.raises(UserError, match="is no result of qst_tune"):
        inspect_directory(tmp_path / "model")


def test_of_lora_its_layers_are_told_and_an_adapter_of_other_tensors_is_found(
    tmp_path: Path,
) -> None:
    directory, _ = side_network_directory(tmp_path, num_side_blocks=0, lora_layers=2, lora_rank=2)
    told = inspect_directory(directory)
    assert "LoRA in the last 2 of 3 layers" in told
    assert "gates" not in told
    verify_directory(directory, tmp_path / "model")
    adapter = directory / "peft/adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(adapter).items()}, adapter)
    with pytest.raises(UserError, match=r"is not what side_network\.safetensors beside it has"):
        verify_directory(directory, tmp_path / "model")
    both, _ = side_network_directory(tmp_path, "both", lora_layers=3, lora_rank=2)
    told = inspect_directory(both)
    assert "A QST side network with LoRA in all 3 layers" in told
    assert "gates (beta)" in told
