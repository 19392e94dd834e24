"""State survives a round trip through safetensors and JSON, to the last bit, without a pickle."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

from qst_tune.errors import UserError
from qst_tune.training.state_file import pack_state, unpack_state

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.text() | st.integers() | st.sampled_from(["$tensor", "$tuple", "$pairs", "$wrapped"])
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner),
)


def round_trip(tree: Any, directory: Path) -> Any:
    for name, content in pack_state(tree).items():
        (directory / name).write_bytes(content)
    return unpack_state(directory)


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, float):
        assert actual == expected or (math.isnan(actual) and math.isnan(expected))
    else:
        assert actual == expected


@given(tree=TREES)
def test_any_tree_of_plain_values_comes_back(tree: Any, tmp_path_factory) -> None:
    assert_same(round_trip(tree, tmp_path_factory.mktemp("state")), tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).mul(50).abs().to(dtype), 0: torch.tensor(2).to(dtype)}
    again = round_trip({"x": [tensors, (tensors["a"].T,)]}, tmp_path)
    assert torch.equal(again["x"][0]["a"], tensors["a"])
    assert torch.equal(again["x"][0][0], tensors[0])
    assert torch.equal(again["x"][1][0], tensors["a"].T)
    assert again["x"][0]["a"].dtype is dtype


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizer_goes_on_as_if_nothing_had_happened(kind: type, tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1, **extra)

    def step(model: torch.nn.Module, optimizer: Any, seed: int) -> None:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer, 1)
    saved = round_trip({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    step(model, optimizer, 2)
    other, resumed = make()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    step(other, resumed, 2)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other.bias, model.bias)


@pytest.mark.parametrize("kind", [OptimState8bit, OptimState4bit])
def test_quantised_optimizer_states_come_back_bit_for_bit(kind: type, tmp_path: Path) -> None:
    block_size = 256
    state = kind.zeros((16, 256), signed=True, block_size=block_size)
    state.copy_(torch.randn(16, 256))
    again = round_trip({"state": {0: {"exp_avg": state}}}, tmp_path)["state"][0]["exp_avg"]
    assert type(again) is kind
    assert torch.equal(again.codes, state.codes)
    assert torch.equal(again.scale, state.scale)
    assert torch.equal(again.dequantize(), state.dequantize())


def test_what_is_no_plain_value_is_named() -> None:
    with pytest.raises(UserError, match=r"^cannot save optimizer\.0\.hook: a function is no plain"):
        pack_state({"optimizer": [{"hook": lambda: None}]})


@pytest.mark.parametrize(
    ("tree", "tensors"),
    [
        ("{", None),
        ('{"a": {"$tensor": "b"}}', None),
        ('{"a": {"$wrapped": ["Popen", {}, []]}}', None),
        ('{"a": {"$wrapped": 3}}', None),
        ('{"a": {"$pairs": [1]}}', None),
        ('{"a": ' * 100_000, None),
        ('{"a": {"$wrapped": ["OptimState8bit", {}, []]}}', None),
        ('{"a": {"$wrapped": ["OptimState8bit", {"codes": 1}, [1, 2]]}}', None),
        ("{}", b""),
        ("{}", b"PK\x03\x04"),
    ],
)
def test_damaged_state_is_reported(tree: str, tensors: bytes | None, tmp_path: Path) -> None:
    round_trip({"a": torch.zeros(1)}, tmp_path)
    (tmp_path / "state.json").write_text(tree)
    if tensors is not None:
        (tmp_path / "state.safetensors").write_bytes(tensors)
    with pytest.raises(UserError, match=f"^the state in {tmp_path} is damaged: "):
        unpack_state(tmp_path)


def test_nothing_written_is_a_pickle() -> None:
    files = pack_state({"a": torch.zeros(1), 3: (1, 2)})
    assert json.loads(files["state.json"])
    assert files.keys() == {"state.json", "state.safetensors"}
    assert safetensors.torch.load(files["state.safetensors"])
