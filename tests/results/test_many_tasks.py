"""Several directories over one loaded backbone."""

from pathlib import Path

import pytest
import torch

from qst_tune.errors import UserError
from qst_tune.results.described_model import load_described
from qst_tune.results.many_tasks import load_side_networks
from tests.support.directories import CPU, side_network_directory
from tests.support.numbers import random_tokens


@torch.no_grad()
def test_each_row_has_the_logits_of_its_directories_own_model(tmp_path: Path) -> None:
    directories, alone = {}, {}
    for seed, (name, settings) in enumerate(
        {"narrow": {}, "wide": {"reduction_factor": 2}}.items()
    ):
        directories[name], alone[name] = side_network_directory(
            tmp_path, name, seed=seed, **settings
        )
    model, backbone = load_described(
        directories["narrow"], tmp_path / "model", dtype=torch.float32, device=CPU
    )
    before = [parameter.data_ptr() for parameter in model.layers.parameters()]
    side = load_side_networks(model, directories, backbone=backbone)
    assert before == [parameter.data_ptr() for parameter in model.layers.parameters()]
    tokens = random_tokens(batch=3, vocab_size=300)
    side.use(["wide", "narrow", "wide"])
    together = model(tokens)
    for row, name in enumerate(["wide", "narrow", "wide"]):
        expected = alone[name](tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_directories_that_do_not_go_together_are_told(tmp_path: Path) -> None:
    all_layers, _ = side_network_directory(tmp_path, "all")
    one_layer, _ = side_network_directory(tmp_path, "one", num_side_blocks=1)
    model, backbone = load_described(
        all_layers, tmp_path / "model", dtype=torch.float32, device=CPU
    )
    with pytest.raises(UserError, match="one: side networks must read the same layers"):
        load_side_networks(model, {"a": all_layers, "b": one_layer}, backbone=backbone)
