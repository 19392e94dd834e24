"""A backbone is known by all of its weights, whatever file and precision they are in."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qst_tune.backbone.identity import (
    BackboneId,
    Fingerprint,
    WeightDigests,
    fingerprint_files,
    tensors_digest,
    weight_digest,
)
from qst_tune.errors import UserError


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def of(weights: dict[str, torch.Tensor]) -> Fingerprint:
    digests = WeightDigests()
    for name, weight in weights.items():
        digests.add(name, weight)
    return digests.fingerprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_wider_dtype_of_the_same_values_is_the_same_weight(dtype: torch.dtype) -> None:
    weight = drawn(7, 33, dtype=dtype)
    assert weight_digest(weight) == weight_digest(weight.float()) == weight_digest(weight.double())


def test_every_value_counts() -> None:
    weight = drawn(300, 10)
    digests = {weight_digest(weight)}
    for index in range(0, weight.numel(), 7):
        changed = weight.clone()
        changed.view(-1)[index] += 1
        digests.add(weight_digest(changed))
    assert len(digests) == 1 + len(range(0, weight.numel(), 7))


def test_zero_has_a_sign_and_a_weight_a_shape() -> None:
    weight = torch.zeros(4, 6)
    assert weight_digest(weight) != weight_digest(-weight)
    assert weight_digest(weight) != weight_digest(weight.reshape(6, 4))


def test_a_view_is_hashed_as_what_it_shows() -> None:
    weight = drawn(12, 8)
    assert weight_digest(weight.T) == weight_digest(weight.T.contiguous())
    assert weight_digest(weight[:, :1][5:6]) == weight_digest(weight[5:6, :1].clone())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_codes_are_hashed_as_they_are(dtype: torch.dtype) -> None:
    codes = torch.arange(200).remainder(2).to(dtype)
    other = codes.clone()
    other[7] = codes[8]
    assert weight_digest(codes) == weight_digest(codes.clone()) != weight_digest(other)


def test_shards_and_their_order_make_no_difference(tmp_path: Path) -> None:
    weights = {name: drawn(size, 3) for size, name in enumerate("abc", start=1)}
    save_file(weights, tmp_path / "all.safetensors")
    for name, weight in weights.items():
        save_file({name: weight}, tmp_path / f"{name}.safetensors")
    shards = [tmp_path / f"{name}.safetensors" for name in "cab"]
    assert fingerprint_files([tmp_path / "all.safetensors"]) == fingerprint_files(shards)
    assert fingerprint_files(shards) == of(weights)
    assert of({"a": weights["b"], "b": weights["a"]}) != of({"a": weights["a"], "b": weights["b"]})


def test_the_sampled_fingerprint_is_that_of_results_until_0_1() -> None:
    """As qst_tune 0.1 computed it, so that its results still load."""
    weight = drawn(40, 50)
    sample = weight.reshape(-1)[:: 2000 // 64].float().numpy().tobytes()
    digest = hashlib.sha256(b"(40, 50)" + sample).hexdigest()
    assert of({"a": weight}).sampled == hashlib.sha256(f"a:{digest};".encode()).hexdigest()
    assert BackboneId("x", "full", "nf4", sampled="old").described() == {
        "name": "x",
        "fingerprint": "full",
        "quantization": "nf4",
        "revision": "",
        "library": "torchtune",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_value_that_is_not_finite_is_named_with_its_weight(value: float, dtype) -> None:
    weight = drawn(30, 5, dtype=dtype)
    weight[3, 2] = value
    with pytest.raises(
        UserError, match=r"weight layers\.1\.w has 1 of 150 values that are not fin"
    ):
        of({"a": drawn(3), "layers.1.w": weight})


def test_large_finite_values_pass() -> None:
    of({"a": torch.full((4, 4), 3e38), "b": torch.full((1000,), 65504.0, dtype=torch.float16)})


def test_names_dtypes_shapes_and_bytes_of_plain_tensors_count() -> None:
    tensors = {"a": torch.arange(6, dtype=torch.uint8), "b": drawn(2, 3), "c": torch.tensor(1.0)}
    others = [
        {**tensors, "a": torch.arange(6, dtype=torch.int8)},
        {**tensors, "a": torch.arange(6, dtype=torch.uint8).reshape(2, 3)},
        {**tensors, "b": drawn(2, 3).flip(0)},
        {"a": tensors["a"], "d": tensors["b"], "c": tensors["c"]},
    ]
    digests = {tensors_digest(each) for each in [tensors, *others]}
    assert len(digests) == 5
    assert tensors_digest(dict(reversed(tensors.items()))) == tensors_digest(tensors)
