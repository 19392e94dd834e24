"""Directories of other programs' formats become the same model; damaged ones one line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qst_tune.backbone.experts import ExpertLinears
from qst_tune.backbone.loading import backbone_on_meta, load_transformers_backbone
from qst_tune.backbone.quantizers import quantized_share
from qst_tune.backbone.stored_weights import LazyWeight, StoredWeight
from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import QuantizedLinear
from qst_tune.quantization.gptq import from_gptq
from tests.reference import stored_formats as formats
from tests.support.stored_models import FORMATS, save_mxfp4, save_stored

CPU = torch.device("cpu")
DECODED = ("fp8", "ct_fp8")
TAKEN = [form for form in FORMATS if form not in DECODED]


def load(directory: Path, base_quantization: Any = "auto", dtype=torch.float32):
    backbone = backbone_on_meta(directory)
    backbone.quantize(base_quantization, "none")
    load_transformers_backbone(backbone, directory, dtype=dtype, device=CPU)
    return backbone


@torch.no_grad()
def logits(backbone: TransformersBackbone, tokens: torch.Tensor) -> torch.Tensor:
    return backbone.head(backbone.run(tokens, taps=(), visit=lambda h: None))


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


def dense_weights(backbone: TransformersBackbone) -> dict[str, torch.Tensor]:
    """The weights of the layers' linears and experts, decoded."""
    decoded = {}
    for name, module in backbone.model.named_modules():
        if isinstance(module, QuantizedLinear):
            decoded[f"{name}.weight"] = module.dense_weight(torch.float32)
    for name, module in backbone.model.named_modules():
        if isinstance(module, ExpertLinears):
            decoded = {n: w for n, w in decoded.items() if not n.startswith(name)}
            decoded[name] = module.dense()
    return decoded


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    """What is logged by our loader."""
    logger = logging.getLogger("qst_tune.backbone.placing")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("form", TAKEN)
def test_a_mixture_is_taken_over_exactly_with_its_experts(form: str, tmp_path: Path) -> None:
    """Linears of attention, and experts that transformers stacks and joins while it loads."""
    reference = save_stored(tmp_path, "qwen3_moe", form)
    backbone = load(tmp_path)
    expected = dict(reference.named_parameters())
    decoded = dense_weights(backbone)
    assert len(decoded) == 2 * (4 + 2)
    for name, weight in decoded.items():
        assert torch.equal(weight, expected[name]), name
    # Integers per channel are scaled behind the product: fp32 in another order.
    torch.testing.assert_close(logits(backbone, tokens()), reference(tokens()).logits)
    assert quantized_share(backbone.layers) > 0.9


@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        ("llama", "bnb_nf4"),
        ("llama", "gptq_act_order"),
        ("qwen2", "gptq_sym"),  # with biases
        ("qwen2", "ct_int4_asym"),
        ("mistral", "awq"),
        ("mistral", "bnb_nf4_plain"),
    ],
)
def test_a_dense_model_is_taken_over_exactly(model_type: str, form: str, tmp_path: Path) -> None:
    reference = save_stored(tmp_path, model_type, form)
    backbone = load(tmp_path)
    named_on_meta = backbone_on_meta(tmp_path)
    named_on_meta.quantize("auto", "none")
    assert backbone.quantization == named_on_meta.quantization
    torch.testing.assert_close(logits(backbone, tokens()), reference(tokens()).logits)


@pytest.mark.parametrize("form", ["bnb_nf4", "gptq", "awq"])
def test_in_bf16_the_model_is_as_near_as_its_dense_weights_in_bf16(
    form: str, tmp_path: Path
) -> None:
    reference = save_stored(tmp_path, "llama", form)
    exact = reference(tokens()).logits
    ours = logits(load(tmp_path, dtype=torch.bfloat16), tokens()).float()
    theirs = reference.bfloat16()(tokens()).logits.float()
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


@pytest.mark.parametrize("form", ["bnb_nf4", "gptq_act_order", "awq", "ct_int4", *DECODED])
def test_weights_can_be_decoded_to_a_dense_model(form: str, tmp_path: Path) -> None:
    reference = save_stored(tmp_path, "qwen2", form)
    backbone = load(tmp_path, "none")
    assert torch.equal(logits(backbone, tokens()), reference(tokens()).logits)


@pytest.mark.parametrize(("form", "base_quantization"), [("gptq", "nf4"), ("fp8", "auto")])
def test_rounding_to_another_format_is_said_with_its_error(
    form: str, base_quantization: str, tmp_path: Path, said: Any
) -> None:
    reference = save_stored(tmp_path, "qwen3_moe", form)
    backbone = load(tmp_path, base_quantization)
    expected = dict(reference.named_parameters())
    rounded = {
        f"{name}.weight": module.dense_weight(torch.float32)
        for name, module in backbone.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    experts = {n: p.dense() for n, p in backbone.model.named_parameters() if "experts" in n}
    squares = [
        ((w - expected[n]).square().sum(), expected[n].square().sum())
        for n, w in {**rounded, **experts}.items()
    ]
    error, norm = (sum(column) for column in zip(*squares, strict=True))
    percent = 100 * (error / norm).sqrt()
    assert f"12 weights decoded and rounded to nf4, which adds an error of {percent:.2f} %" in (
        said.text
    )
    assert 5 < percent < 13  # NF4 of random weights


def test_codes_that_are_taken_over_are_counted(tmp_path: Path, said: Any) -> None:
    save_stored(tmp_path, "llama", "gptq")
    load(tmp_path)
    assert "GPTQ int4, groups of 32: 14 weights taken over as they are" in said.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_experts_are_taken_over_exactly(
    dtype: torch.dtype, tmp_path: Path, said: Any
) -> None:
    """In bf16 too: levels and powers of two are exact in it."""
    reference = save_mxfp4(tmp_path)
    backbone = load(tmp_path, dtype=dtype)
    assert "MXFP4: 16 weights taken over as they are" in said.text
    on_meta = backbone_on_meta(tmp_path)
    on_meta.quantize("auto", "none")
    assert backbone.quantization == on_meta.quantization == "mxfp4"
    experts = {n: m for n, m in backbone.model.named_modules() if isinstance(m, ExpertLinears)}
    assert len(experts) == 4
    for name, module in experts.items():
        assert torch.equal(module.dense().float(), reference.get_parameter(name)), name
    expected = reference.to(dtype)(tokens()).logits
    # bf16: transformers' default adds experts up in another order.
    atol = 5e-3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits(backbone, tokens()), expected, rtol=0, atol=atol)
    linear = backbone.layers[0].self_attn.q_proj
    assert type(linear) is torch.nn.Linear  # listed in modules_to_not_convert


def test_mxfp4_can_be_decoded_or_rounded(tmp_path: Path, said: Any) -> None:
    reference = save_mxfp4(tmp_path)
    assert torch.equal(logits(load(tmp_path, "none"), tokens()), reference(tokens()).logits)
    assert load(tmp_path, "nf4").quantization == "nf4"
    assert "MXFP4: 4 weights decoded and rounded to nf4, which adds an error of" in said.text


@pytest.mark.parametrize("base_quantization", ["auto", "nf4"])
@pytest.mark.parametrize(
    ("form", "key", "listed"),
    [
        ("bnb_nf4", "llm_int8_skip_modules", ["lm_head", "model.layers.1.mlp"]),
        ("awq", "modules_to_not_convert", ["model.layers.1.mlp"]),
        ("fp8", "modules_to_not_convert", ["model.layers.1.mlp"]),
        ("ct_int4", "ignore", ["lm_head", "re:.*layers.1.mlp.*"]),
        ("gptq", "dynamic", {"-:.*layers.1.mlp.*": {}}),
    ],
)
def test_modules_that_are_not_quantised_stay_so(
    form: str, key: str, listed: Any, base_quantization: str, tmp_path: Path
) -> None:
    reference = save_stored(tmp_path, "llama", form, left_out=("layers.1.mlp",))
    edit(tmp_path, **{key: listed})
    backbone = load(tmp_path, base_quantization)
    dense = {name for name, m in backbone.layers.named_modules() if type(m) is torch.nn.Linear}
    assert dense == {f"1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert torch.equal(
        backbone.layers[1].mlp.up_proj.weight, reference.model.layers[1].mlp.up_proj.weight
    )


def test_a_dense_weight_that_no_list_names_stays_dense(tmp_path: Path) -> None:
    reference = save_stored(tmp_path, "llama", "gptq", left_out=("layers.0.self_attn",))
    backbone = load(tmp_path)
    assert type(backbone.layers[0].self_attn.k_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(backbone, tokens()), reference(tokens()).logits)


def test_zeros_that_autogptq_wrote_as_biases_change_nothing(tmp_path: Path) -> None:
    reference = save_stored(tmp_path, "llama", "gptq")
    add(tmp_path, {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})
    torch.testing.assert_close(logits(load(tmp_path), tokens()), reference(tokens()).logits)


# Wrong and damaged directories.


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


def add(directory: Path, tensors: dict[str, Any]) -> None:
    path = directory / "model.safetensors"
    weights = {**load_file(path), **tensors}
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, path, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{Q}.scales": None}, f"damaged: {Q}.qweight is there, {Q}.scales not"),
        ({f"{Q}.qzeros": None}, f"{Q}.weight is damaged: its tensor 'qzeros' is missing"),
        (
            {f"{Q}.scales": torch.ones(3, 64)},
            rf"{Q}.weight cannot be read: scales \(64, 3\) and zero points \(64, 2\) are not",
        ),
        ({f"{Q}.bias": torch.ones(64)}, f"has a bias that the model lacks: {Q}.bias"),
        ({"model.norm.weight": None}, "lacks 1 of the model's weights, for example model.norm"),
    ],
)
def test_damaged_weights_are_one_line(tensors, message: str, tmp_path: Path) -> None:
    save_stored(tmp_path, "llama", "gptq")
    add(tmp_path, tensors)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_directory_that_is_not_as_its_config_says_is_one_line(tmp_path: Path) -> None:
    save_stored(tmp_path, "llama", "gptq")
    (tmp_path / "model.safetensors").write_bytes(
        (tmp_path / "dense/model.safetensors").read_bytes()
    )
    with pytest.raises(
        UserError, match=r"is of GPTQ int4, groups of 32, but no weight is stored so"
    ):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(tmp_path)


def test_codes_of_another_shape_than_the_models_are_one_line(tmp_path: Path) -> None:
    save_stored(tmp_path, "llama", "gptq")
    weights = load_file(tmp_path / "model.safetensors")
    other = "model.layers.0.mlp.up_proj"
    parts = ("qweight", "qzeros", "scales", "g_idx")
    add(tmp_path, {f"{Q}.{part}": weights[f"{other}.{part}"].clone() for part in parts})
    with pytest.raises(UserError, match=r"q_proj.weight has shape \(128, 64\).*\(64, 64\)"):
        load(tmp_path)


def weights(count: int, out_dim: int = 16) -> tuple[list[StoredWeight], torch.Tensor]:
    generator = torch.Generator().manual_seed(out_dim)
    pairs = [formats.gptq(out_dim, 64, generator) for _ in range(count)]
    stored = [from_gptq(parts, bits=4, form="gptq") for parts, _ in pairs]
    tensors = [StoredWeight([[s]], s.shape, torch.float32) for s in stored]
    return tensors, torch.stack([dense for _, dense in pairs])


def test_codes_stay_through_renaming_a_dtype_and_a_parameter() -> None:
    (weight,), dense = weights(1)
    for same in (weight.detach(), weight.to(torch.float32), nn.Parameter(weight).data):
        assert isinstance(same, StoredWeight)
        assert same.pieces[0][0] is weight.pieces[0][0]
    half = weight.to(torch.bfloat16)
    assert isinstance(half, StoredWeight)
    assert torch.equal(half.dense(), dense[0].bfloat16())


def test_experts_keep_their_codes_through_stacking_and_joining() -> None:
    gates, dense_gates = weights(3, out_dim=16)
    ups, dense_ups = weights(3, out_dim=24)
    joined = torch.cat([torch.stack(gates, dim=0), torch.stack(ups)], dim=1)
    assert isinstance(joined, StoredWeight)
    assert joined.is_stack
    assert joined.shape == (3, 40, 64)
    assert torch.equal(joined.dense(), torch.cat([dense_gates, dense_ups], dim=1))


def test_every_other_operation_sees_the_dense_weight() -> None:
    (one, other), dense = weights(2)
    for ours, plain in [
        (one[2:5], dense[0][2:5]),
        (one.T.contiguous(), dense[0].T),
        (torch.cat([one, other]), torch.cat(list(dense))),
        (torch.stack([one, other], dim=1), dense.transpose(0, 1)),
        (one + 1, dense[0] + 1),
        (torch.stack([one, dense[1]]), dense),
    ]:
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, plain)


def test_a_weight_is_put_together_only_when_it_is_asked_for() -> None:
    asked: list[str] = []

    def decode(parts: dict[str, torch.Tensor]) -> None:
        asked.extend(parts)
        raise KeyError("scales")

    lazy = LazyWeight("model.q.weight", {"qweight": torch.zeros(1)}, decode, torch.float32)
    assert not asked
    with pytest.raises(
        UserError, match=r"model.q.weight is damaged: its tensor 'scales' is missing"
    ):
        lazy[...]
    assert asked == ["qweight"]
