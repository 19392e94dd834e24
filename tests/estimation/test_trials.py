"""What trials cost is what a step of all of them takes on fake tensors, to the byte."""

import pytest
import torch
from omegaconf import OmegaConf

from qst_tune.config.schema import EstimateConfig
from qst_tune.estimation.step import Setup, Shape, own_setup, trace_step
from qst_tune.estimation.trials import _trace, run_turns, trials_cost
from qst_tune.modules.meta_device import build_rotary_caches
from tests.support.checkpoints import SIZES
from tests.support.configs import typed_config

SHAPE = Shape(4, 64)
BF16 = torch.bfloat16


def config(rate: float = 1e-3, **model: object) -> EstimateConfig:
    block = {"_component_": "qst_tune.models.qst_llama3_2", **SIZES, "reduction_factor": 4, **model}
    raw = {
        "model": block,
        "tokenizer": {"_component_": "qst_tune.data.hf_chat_tokenizer", "path": "x"},
        "batch_size": 4,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": rate},
        "loss": {"_component_": "qst_tune.modules.LinearCrossEntropyLoss"},
        "output_dir": "x",
        "device": "cpu",
    }
    return typed_config(OmegaConf.create(raw), EstimateConfig)


def test_one_trial_takes_what_a_run_takes() -> None:
    cost = trials_cost([config()], BF16, SHAPE, "cpu")
    alone, _ = trace_step(own_setup(config(), BF16), config(), SHAPE, device="cpu")
    assert cost.first_flops == alone.flops_per_token * 4 * 64
    assert cost.runs(1) == 1
    # Besides f, which is kept for the next one.
    assert 0 <= cost.peak_bytes(1) - alone.memory.num_bytes <= 4 * 64 * SIZES["embed_dim"] * 2


@pytest.mark.parametrize(
    "kinds",
    [[{}, {"rank": 8}], [{"lora_layers": 1}, {"num_side_blocks": 1, "downsample": "avgpool"}]],
    ids=str,
)
def test_many_trials_take_what_all_of_them_take_in_one_step(kinds: list[dict[str, object]]) -> None:
    configs = [config(rate, **kind) for kind in kinds for rate in (1e-3, 1e-2, 1e-1)]
    cost = trials_cost(configs, BF16, SHAPE, "cpu")
    found = _trace([own_setup(c, BF16) for c in configs], configs, SHAPE, "cpu", "fused")
    assert cost.peak_bytes(6) == found.peak_bytes
    assert cost.runs(6) == pytest.approx(sum(found.flops) / found.flops[0], rel=1e-12)


def real_setup(cfg: EstimateConfig) -> Setup:
    setup = own_setup(cfg, BF16)
    setup.model.to_empty(device="cpu")
    for tensor in (*setup.model.parameters(), *setup.model.buffers()):
        tensor.detach().zero_()
    build_rotary_caches(setup.model, torch.device("cpu"))
    return setup


def test_memory_grows_by_side_networks_and_their_optimizers_alone_on_real_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = torch.zeros(SHAPE.batch_size, SHAPE.seq_len, dtype=torch.int64)
    # The estimate's own has the label of no token, which it counts as one.
    monkeypatch.setattr(Setup, "batch", lambda *_: {"tokens": tokens, "labels": tokens.clone()})
    configs = [config(rate, base_quantization="none") for rate in (1e-4, 1e-3, 1e-2, 1e-1)]
    found = {
        count: run_turns(
            [real_setup(cfg) for cfg in configs[:count]], configs[:count], SHAPE, device="cpu"
        )
        for count in (2, 4)
    }
    own = found[4].own_bytes
    assert found[4].peak_bytes - found[2].peak_bytes == sum(own[2:]) > 0
    # AdamW keeps two numbers and a counter for each trained one.
    trained = sum(p.numel() for p in real_setup(configs[0]).model.side.parameters())
    assert own[0] == pytest.approx(3 * 4 * trained, rel=0.1)
    # The batch itself, 4096 bytes, is no fake tensor here.
    expected = trials_cost(configs, BF16, SHAPE, "cpu").peak_bytes(4)
    assert found[4].peak_bytes == pytest.approx(expected, abs=4096)


def test_as_many_fit_as_their_peak_says() -> None:
    cost = trials_cost([config(rate) for rate in (1e-4, 1e-3, 1e-2, 1e-1)], BF16, SHAPE, "cpu")
    assert cost.most_that_fit(cost.peak_bytes(3)) == 3
    assert cost.most_that_fit(cost.peak_bytes(3) - 1) == 2
    assert cost.most_that_fit(0) == 0
    assert "4 trials: peak" in cost.line()
    assert cost.line(1.0).endswith("of them 4 fit in 1 GiB")
