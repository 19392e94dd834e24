"""Loading repairs what rounding took, nearly as well as the exact decomposition would."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune.models import convert_weights
from torchtune.models.llama3_2 import llama3_2

from qst_tune.backbone import repair as module
from qst_tune.backbone.calibration import calibration_tokens
from qst_tune.backbone.identity import Fingerprint
from qst_tune.backbone.repair import Repairs, mean_squares, repair_rank_of, repairable_linears
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder, qst_from_hf, qst_llama3_2
from qst_tune.models.build import build_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules.repair import Repair
from tests.support.checkpoints import (
    SIZES,
    finetune_config,
    read_checkpoint,
    write_chat_tokenizer,
    write_checkpoint,
)
from tests.support.hf_models import loaded
from tests.support.model_types import tiny_model
from tests.support.stored_models import save_stored

CPU = torch.device("cpu")
FORMATS_OF_LINEARS = [
    *("nf4", "int8"),
    *(pytest.param(form, marks=pytest.mark.slow) for form in ("fp4", "int4")),
]
TOKENS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repair")
    finetune_config(root)
    return root


@cache
def torchtune_model(root: Path, attempt: int = 0, **settings: Any) -> Any:
    """As the recipes load it, in fp32; nothing here writes to it. An attempt loads it anew."""
    config = OmegaConf.create(finetune_config(root))
    config.model.update(settings)
    model = build_on_meta(config.model, torch.float32)
    model.identity = load_frozen_backbone(
        model, config.checkpointer, dtype=torch.float32, device=CPU
    )
    model.initialize_side(CPU)
    return model.eval()


# The reference: torchtune's own dense decoder, and the whole decomposition in fp64.


def dense_decoder(root: Path) -> nn.Module:
    model = llama3_2(**SIZES)
    heads, kv_heads, dim = (SIZES[k] for k in ("num_heads", "num_kv_heads", "embed_dim"))
    weights = read_checkpoint(root / "model")
    model.load_state_dict(
        convert_weights.hf_to_tune(weights, num_heads=heads, num_kv_heads=kv_heads, dim=dim)
    )
    return model.eval()


@torch.no_grad()
def inputs_of(decoder: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear reads, ``[tokens, I]``."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, args, output: inputs.__setitem__(path, args[0].flatten(0, 1))

    for path, linear in decoder.layers.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_hook(keep(path))
    decoder(tokens)
    return inputs


def without_repair(linear: Any) -> torch.Tensor:
    """The rounded weight alone, decoded."""
    repair, linear.repair = linear.repair, None
    try:
        decoded: torch.Tensor = linear.dense_weight(torch.float64)
    finally:
        linear.repair = repair
    return decoded


@pytest.mark.parametrize("form", FORMATS_OF_LINEARS)
@pytest.mark.parametrize("rank", [4, 24])
def test_the_products_are_the_best_for_the_errors_of_outputs(
    form: str, rank: int, root: Path
) -> None:
    plain = torchtune_model(root, base_quantization=form)
    repaired = torchtune_model(root, base_quantization=form, repair_rank=rank)
    rounded, dense = dense_decoder(root), dense_decoder(root)
    linears = repairable_linears(plain.layers)
    with torch.no_grad():
        for path, linear in linears.items():
            rounded.layers.get_submodule(path).weight.copy_(linear.dense_weight(torch.float32))
    tokens = calibration_tokens(root / "model", SIZES["vocab_size"], SIZES["max_seq_len"])
    inputs = inputs_of(rounded, tokens)
    assert len(linears) == len(inputs) == 7 * SIZES["num_layers"]
    for path, x in inputs.items():
        weight = dense.layers.get_submodule(path).weight.detach().double()
        ours = repaired.layers.get_submodule(path)
        scale = x.double().square().mean(0).sqrt()
        weighed = (weight - without_repair(ours)) * scale
        values = torch.linalg.svdvals(weighed)
        best = values[rank:].square().sum().sqrt()
        left = ((weight - ours.dense_weight(torch.float64)) * scale).norm()
        assert ours.repair.rank == rank
        assert best * (1 - 1e-4) <= left <= 1.001 * best + 1e-6, path
        plain_error = ((weight - linears[path].dense_weight(torch.float64)) * scale).norm()
        searched = form in ("nf4", "fp4")
        assert weighed.norm() < 0.97 * plain_error if searched else weighed.norm() == plain_error


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS_OF_LINEARS)
def test_the_repaired_model_is_nearer_to_the_dense_one_on_other_tokens(
    form: str, root: Path
) -> None:
    dense = torchtune_model(root, base_quantization="none")(TOKENS)

    def distance(rank: int) -> float:
        model = torchtune_model(root, base_quantization=form, repair_rank=rank)
        return float((model(TOKENS) - dense).norm())

    assert distance(24) < 0.6 * distance(0)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS_OF_LINEARS)
def test_a_rank_that_is_full_gives_the_dense_model_back(form: str, root: Path) -> None:
    """Keys and values have 32 rows and get a product of that rank."""
    dense = torchtune_model(root, base_quantization="none")
    model = torchtune_model(root, base_quantization=form, repair_rank=64)
    assert model.layers[0].attn.k_proj.repair.rank == 32
    assert repair_rank_of(model) == 64
    for path, linear in repairable_linears(model.layers).items():
        weight = dense.layers.get_submodule(path).weight
        torch.testing.assert_close(linear.dense_weight(torch.float32), weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(TOKENS), dense(TOKENS), rtol=0, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_second_loading_gives_the_same_bits(form: str, root: Path) -> None:
    settings = {"base_quantization": form, "repair_rank": 24}
    models = [torchtune_model(root, attempt, **settings) for attempt in (0, 1)]
    assert models[0].identity == models[1].identity
    assert torch.equal(models[0](TOKENS), models[1](TOKENS))


@torch.no_grad()
def test_shards_are_read_twice_in_whatever_order(tmp_path: Path, root: Path) -> None:
    config = OmegaConf.create(finetune_config(root))
    config.model.repair_rank = 8
    names = write_checkpoint(tmp_path, num_shards=3)
    write_chat_tokenizer(tmp_path)
    config.checkpointer.update(checkpoint_dir=str(tmp_path), checkpoint_files=names)
    model = build_on_meta(config.model, torch.float32)
    load_frozen_backbone(model, config.checkpointer, dtype=torch.float32, device=CPU)
    model.initialize_side(CPU)
    assert torch.equal(model(TOKENS), torchtune_model(root, repair_rank=8)(TOKENS))


# transformers' models.


def hf_model(directory: Path, rank: int = 8, **settings: Any) -> Any:
    settings = {"reduction_factor": 4, "repair_rank": rank, **settings}
    return loaded(qst_from_hf, directory, **settings)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMATS_OF_LINEARS)
def test_both_libraries_repair_alike(form: str, root: Path) -> None:
    """Rows of queries and keys are in another order, so scales of scales differ a little."""
    theirs = hf_model(root / "model", 24, base_quantization=form)
    ours = torchtune_model(root, base_quantization=form, repair_rank=24)
    assert theirs.backbone.quantization == ours.backbone.quantization
    dense = torchtune_model(root, base_quantization="none")(TOKENS)
    distances = [float((model(TOKENS) - dense).norm()) for model in (theirs, ours)]
    assert distances[0] == pytest.approx(distances[1], rel=0.1)
    weights = [
        theirs.layers[0].mlp.down_proj.dense_weight(torch.float32),
        ours.layers[0].mlp.w2.dense_weight(torch.float32),
    ]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma2", "phi3", "opt", "falcon", "qwen3_5_text"])
def test_models_of_other_makes_are_repaired(model_type: str, tmp_path: Path, caplog: Any) -> None:
    tiny_model(model_type, vocab_size=307).save_pretrained(tmp_path)
    write_chat_tokenizer(tmp_path)
    plain, repaired = hf_model(tmp_path, 0), hf_model(tmp_path, 8)
    linears = repairable_linears(repaired.layers)
    assert all(isinstance(linear.repair, Repair) for linear in linears.values())
    assert f"{len(linears)} linears repaired with rank 8" in caplog.text
    dense = hf_model(tmp_path, 0, base_quantization="none")(TOKENS)
    before, after = ((model(TOKENS) - dense).norm() for model in (plain, repaired))
    assert after < before


@torch.no_grad()
@pytest.mark.parametrize("form", ["nf4", "int4"])
def test_experts_stay_as_they_were_rounded_and_are_counted(
    form: str, tmp_path: Path, caplog: Any
) -> None:
    tiny_model("qwen3_moe", vocab_size=307).save_pretrained(tmp_path)
    write_chat_tokenizer(tmp_path)
    model = hf_model(tmp_path, 8, base_quantization=form)
    repaired = [path for path, m in model.layers.named_modules() if isinstance(m, Repair)]
    assert repaired
    assert not any("expert" in path for path in repaired)
    count = re.search(r"(\d+) weights of experts stay as they were rounded", caplog.text)
    config = model.backbone.config
    assert int(count[1]) == 2 * config.num_experts * config.num_hidden_layers
    assert model(TOKENS).isfinite().all()


# The cache and the identity.


def test_the_cache_of_the_backbone_has_the_repair(root: Path, tmp_path: Path, caplog: Any) -> None:
    def load(rank: int) -> Any:
        block = OmegaConf.create(
            {
                "_component_": "qst_tune.training.HFCheckpointer",
                "checkpoint_dir": str(root / "model"),
                "cache_dir": str(tmp_path),
            }
        )
        with torch.device("meta"):
            model = qst_from_hf(str(root / "model"), reduction_factor=4, repair_rank=rank)
        load_frozen_backbone(model, block, dtype=torch.float32, device=CPU)
        model.initialize_side(CPU)
        return model.eval()

    first, other = load(8), load(4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    caplog.clear()
    again = load(8)
    assert "quantised backbone read from" in caplog.text
    assert "repaired" not in caplog.text
    assert torch.equal(first(TOKENS), again(TOKENS))
    assert not torch.equal(first(TOKENS), other(TOKENS))
    for file in tmp_path.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    caplog.clear()
    assert torch.equal(load(8)(TOKENS), first(TOKENS))
    assert "is damaged" in caplog.text
    assert "repaired with rank 8" in caplog.text


def test_the_identity_names_rank_search_and_text(root: Path) -> None:
    backbone = torchtune_model(root, repair_rank=8, embedding_quantization="int8").identity
    assert re.fullmatch(
        r"nf4 \+ rank 8, scales searched \(text [0-9a-f]{8}\); embedding int8",
        backbone.quantization,
    )
    assert torchtune_model(root).identity.quantization == "nf4"
    int8 = torchtune_model(root, repair_rank=24, base_quantization="int8").identity
    assert re.fullmatch(r"int8.* \+ rank 24 \(text [0-9a-f]{8}\)", int8.quantization)


# What is refused.


def on_meta(**settings: Any) -> Any:
    with torch.device("meta"):
        return qst_llama3_2(**SIZES, reduction_factor=4, rank=4, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repair_rank": -1}, r"repair_rank=-1 must be a whole number from 0"),
        ({"repair_rank": 1.5}, r"repair_rank=1\.5 must be a whole number from 0"),
        ({"repair_rank": True}, r"repair_rank=True must be"),
        ({"repair_rank": "8"}, r"repair_rank='8' must be"),
        ({"repair_rank": 65}, r"repair_rank=65 is more than the rank of any weight.*64 or less"),
        (
            {"repair_rank": 8, "base_quantization": "none"},
            r"repair_rank=8 repairs what rounding took .* set base_quantization to nf4",
        ),
        ({"repair_rank": 8, "quantize_base": False}, r"repair_rank=8 repairs what rounding took"),
    ],
)
def test_a_wrong_rank_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        on_meta(**settings)
    assert "\n" not in str(error.value)


def test_a_model_in_memory_is_refused() -> None:
    backbone = TransformersBackbone(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"read from the model's directory: build the model on"):
        qst_decoder(backbone, reduction_factor=4, repair_rank=8)


def test_a_directory_that_is_quantised_already_is_refused(tmp_path: Path) -> None:
    save_stored(tmp_path, "llama", "gptq")
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"repair_rank=8 needs the weights before they were round"),
    ):
        qst_from_hf(str(tmp_path), reduction_factor=4, repair_rank=8)


def test_no_repair_is_the_same_model_as_without_the_argument(root: Path) -> None:
    with torch.no_grad():
        assert torch.equal(
            torchtune_model(root, repair_rank=0)(TOKENS), torchtune_model(root)(TOKENS)
        )
    assert repair_rank_of(on_meta(repair_rank=0)) == 0
    assert repair_rank_of(on_meta(repair_rank=7)) == 7


def test_weights_that_change_between_the_readings_are_noticed(root: Path) -> None:
    model = torchtune_model(root, 2, repair_rank=8)
    repairs = Repairs(model, model.backbone, root / "model", 8)
    with pytest.raises(UserError, match="changed while they were read"):
        repairs.finish(Fingerprint("a", "b"), Fingerprint("c", "b"))


def test_inputs_that_are_not_finite_are_refused(root: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        module,
        "mean_squares",
        lambda run, linears: dict.fromkeys(linears, torch.tensor([torch.inf])),
    )
    with pytest.raises(UserError, match=r"not finite in torch\.float32: set dtype=bf16 or fp32"):
        torchtune_model(root, 1, repair_rank=8)


def test_a_linear_that_the_text_does_not_reach_counts_its_inputs_alike() -> None:
    linear, other = nn.Linear(3, 2), nn.Linear(3, 2)
    found = mean_squares(lambda: linear(torch.ones(5, 3) * 2), {"a": linear, "b": other})
    assert found.keys() == {"a"}
    assert torch.equal(found["a"], torch.full((3,), 4.0))
    assert not linear._forward_pre_hooks


def test_a_directory_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no tokenizer that can be read") as error:
        hf_model(tmp_path)
    assert "\n" not in str(error.value)
