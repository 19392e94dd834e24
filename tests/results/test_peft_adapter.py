"""PEFT's adapter of a result, read from PEFT's documentation and added to transformers' weights."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM

from qst_tune import SideConfig, get_qst_model
from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.modules.lora import LowRank
from qst_tune.results.peft_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    NoAdapterError,
    adapter_files,
    add_peft,
    check_adapter,
    public_files,
)
from tests.support.directories import side_network_directory
from tests.support.model_types import tiny_model
from tests.support.numbers import random_tokens, randomize_

ALONE: dict[str, Any] = {"num_side_blocks": 0, "lora_rank": 2, "lora_alpha": 3.0}

# Model type: what is special about it.
TYPES = {
    "llama": "the usual names",
    "gpt2": "Conv1D, whose weights are transposed; c_proj in attention and MLP",
    "phi3": "fused projections",
    "gpt_neox": "dense in attention alone",
    "falcon": "changes its linears' outputs in place",
    "opt": "layers below model.decoder",
    "lfm2": "linears of other names from layer to layer",
    "gemma2": "norms behind the layers",
}


def adapted_modules(config: dict[str, Any], names: list[str]) -> set[str]:
    """The modules that PEFT replaces: its ``check_target_module_exists``, transcribed."""
    found = set()
    for name in names:
        index = re.match(rf".*\.{config['layers_pattern']}\.(\d+)\.", name)
        is_named = any(name.endswith(f".{target}") for target in config["target_modules"])
        if is_named and index and int(index[1]) in config["layers_to_transform"]:
            found.add(name)
    return found


def merge(model: torch.nn.Module, files: dict[str, bytes]) -> None:
    """Add s B A to the dense weights that the adapter's files name, in place."""
    config = json.loads(files[CONFIG_FILE])
    rank = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    tensors = load(files[WEIGHTS_FILE])
    wanted = adapted_modules(config, [name for name, _ in model.named_modules()])
    prefix = "base_model.model."
    names = {f"{prefix}{name}.lora_{leaf}.weight" for name in wanted for leaf in "AB"}
    assert tensors.keys() == names, "PEFT would miss tensors or leave some out"
    for name in wanted:
        module = model.get_submodule(name)
        a, b = (tensors[f"{prefix}{name}.lora_{leaf}.weight"] for leaf in "AB")
        change = config["lora_alpha"] / rank * (b @ a)
        is_transposed = type(module).__name__ == "Conv1D"
        assert config["fan_in_fan_out"] == is_transposed
        with torch.no_grad():
            module.weight += change.T if is_transposed else change


@torch.no_grad()
def assert_same_logits(
    ours: Any, model: Any, files: dict[str, bytes], *, atol: float = 2e-5
) -> None:
    tokens = random_tokens(batch=2, length=9, vocab_size=250)
    wanted, before = ours(tokens), model(tokens).logits
    merge(model, files)
    torch.testing.assert_close(wanted, model(tokens).logits, rtol=1e-5, atol=atol)
    assert (wanted - before).abs().max() > 0.01


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_layers": 2},
        {"lora_layers": 3, "lora_rank_stabilized": True, "lora_attn_modules": ["q_proj", "k_proj"]},
        {"lora_layers": 1, "lora_attn_modules": ["output_proj"], "apply_lora_to_mlp": False},
    ],
    ids=["all linears", "rank-stabilised", "one linear"],
)
def test_over_torchtunes_decoder_it_makes_transformers_model_ours(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model: Any
    directory, model = side_network_directory(
        tmp_path, base_quantization="none", **ALONE, **settings
    )
    tensors = load_file(directory / "side_network.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    # fp32 sums in another order; logits are around 20.
    assert_same_logits(model, base, adapter_files(model, tensors, "base"), atol=2e-4)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("attention", [["q_proj", "k_proj", "v_proj", "output_proj"], []])
def test_over_transformers_model_it_makes_that_ours(model_type: str, attention: list[str]) -> None:
    base = tiny_model(model_type)
    config = SideConfig(lora_layers=3, lora_attn_modules=tuple(attention), **ALONE)
    model = get_qst_model(copy.deepcopy(base), config).model
    randomize_(model.side)
    with torch.no_grad():
        for pair in model.side.modules():
            if isinstance(pair, LowRank):
                pair.b *= 0.1  # B A of the size of the weights
    assert_same_logits(model, base, adapter_files(model, model.side.state_dict(), "base"))


def lora_over(model_type: str, **settings: Any) -> Any:
    config = SideConfig(lora_layers=2, **{**ALONE, **settings})
    return get_qst_model(tiny_model(model_type), config).model


def reason(model: Any) -> str:
    with pytest.raises(NoAdapterError) as info:
        adapter_files(model, model.side.state_dict(), "base")
    return str(info.value)


def test_what_peft_cannot_compute_has_no_adapter_and_the_card_says_why() -> None:
    beside = lora_over("llama", num_side_blocks=2)
    assert "no place for a side network" in reason(beside)
    card = add_peft({"README.md": b"card\n"} | weights_of(beside), beside, "base")
    assert card.keys() == {"README.md", "side_network.safetensors"}
    assert (
        b"there is no adapter for PEFT: its format has no place for a side network"
        in card["README.md"]
    )
    plain = get_qst_model(tiny_model("llama"), SideConfig()).model
    assert add_peft({"README.md": b"card\n"}, plain, "base") == {"README.md": b"card\n"}


def weights_of(model: Any) -> dict[str, bytes]:
    from safetensors.torch import save

    return {"side_network.safetensors": save(model.side.state_dict())}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (
            "qwen3_next",
            "takes down_proj, gate_proj, up_proj of a mixture of experts for the experts",
        ),
        ("deepseek_v3", "of a mixture of experts"),
        ("mamba2", "refuses the out_proj of Mamba"),
    ],
)
def test_what_peft_would_load_as_something_else_is_refused(model_type: str, expected: str) -> None:
    """PEFT 0.21.2 loaded these without an error, and with tensors of other modules."""
    assert expected in reason(lora_over(model_type))
    if model_type != "mamba2":
        model = lora_over(model_type, apply_lora_to_mlp=False)
        assert adapter_files(model, model.side.state_dict(), "base")


def test_a_decoder_without_llamas_rotary_pairs_has_no_conversion() -> None:
    from torchtune.models.qwen2 import qwen2

    sizes: Any = {"vocab_size": 97, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2}
    backbone = qwen2(**sizes, embed_dim=32, intermediate_dim=48, max_seq_len=32)
    model = qst_decoder(backbone, lora_layers=1, num_side_blocks=0, base_quantization="none")
    assert "Qwen2RotaryPositionalEmbeddings" in reason(model)


def test_a_name_on_the_hub_and_its_commit_are_apart() -> None:
    model = lora_over("llama")
    files = adapter_files(model, model.side.state_dict(), "org/name@0123abc")
    config = json.loads(files[CONFIG_FILE])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "0123abc")


def write(files: dict[str, bytes], directory: Path) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def test_a_shared_adapter_names_the_public_model_and_nothing_else_changes(tmp_path: Path) -> None:
    model = lora_over("llama")
    files = adapter_files(model, model.side.state_dict(), "/home/me/model")
    shared = public_files(write(files, tmp_path), "org/name")
    before, after = (json.loads(f[CONFIG_FILE]) for f in (files, shared))
    assert after == {**before, "base_model_name_or_path": "org/name"}
    assert shared[WEIGHTS_FILE] == files[WEIGHTS_FILE]
    assert public_files(tmp_path / "none", "org/name") == {}


def test_an_adapter_of_other_tensors_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    model = lora_over("llama")
    tensors = model.side.state_dict()
    write(adapter_files(model, tensors, "base"), tmp_path)
    check_adapter(tmp_path, model, tensors)
    config = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_text(config.replace('"r": 2', '"r": 4'))
    with pytest.raises(UserError, match=r"is not what side_network\.safetensors beside it has"):
        check_adapter(tmp_path, model, tensors)
    (tmp_path / CONFIG_FILE).write_text(config)
    other = {name: value + 1 for name, value in load_file(tmp_path / WEIGHTS_FILE).items()}
    save_file(other, tmp_path / WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"is not what side_network\.safetensors beside it has"):
        check_adapter(tmp_path, model, tensors)
    (tmp_path / WEIGHTS_FILE).write_bytes(b"x")
    for read in (
        lambda: check_adapter(tmp_path, model, tensors),
        lambda: public_files(tmp_path, "org/name"),
    ):
        with pytest.raises(UserError, match="missing or damaged"):
            read()
