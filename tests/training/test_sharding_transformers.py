"""A sharded backbone of transformers computes the very bits of a whole one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qst_tune.backbone.loading import load_transformers_backbone
from qst_tune.backbone.sharded_loading import load_sharded_directory
from qst_tune.distributed.processes import is_main_process, rank_and_world_size
from qst_tune.distributed.sharding import (
    backbone_bytes,
    choose_sharding,
    free_weights,
    group_bytes,
    take_part,
)
from qst_tune.models import qst_from_hf
from tests.support.checkpoints import write_chat_tokenizer
from tests.support.model_types import tiny_model
from tests.support.numbers import randomize_
from tests.support.ranks import on_ranks
from tests.support.traffic import Traffic, left_whole

CPU = torch.device("cpu")
VOCABULARY = {"vocab_size": 320}  # of the tokenizer, which the text of a repair needs
# Type, changes of its configuration, and arguments of the side network.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nf4": ("qwen3", {"tie_word_embeddings": False}, {}),
    "mixture": ("gpt_oss", {}, {}),
    "tied, scaled, windows": ("gemma3_text", {"tie_word_embeddings": True}, {}),
    "int8, tied table": (
        "smollm3",
        {"tie_word_embeddings": True},
        {"base_quantization": "int8", "embedding_quantization": "int8"},
    ),
    "nf4, dial": ("qwen3", {"tie_word_embeddings": False}, {"lora_layers": 1}),
    "nf4, repaired": ("qwen3", {"tie_word_embeddings": False, **VOCABULARY}, {"repair_rank": 4}),
    "mixture, repaired": ("gpt_oss", VOCABULARY, {"repair_rank": 4}),
    "states": ("qwen3_5_text", {}, {"base_quantization": "none"}),
}
SLOW = ("int8, tied table", "mixture, repaired", "states")
by_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in MODELS]
)


def save(directory: Path, kind: str) -> Path:
    model_type, changes, _ = MODELS[kind]
    tiny_model(model_type, **changes).save_pretrained(directory)
    write_chat_tokenizer(directory)
    return directory


def build(directory: Path, kind: str) -> Any:
    with torch.device("meta"):
        return qst_from_hf(str(directory), reduction_factor=4, **MODELS[kind][2])


def begun(model: Any) -> Any:
    torch.manual_seed(0)
    model.initialize_side(CPU)
    randomize_(model.side)
    return model


def load_whole(directory: Path, kind: str) -> Any:
    model = build(directory, kind)
    load_transformers_backbone(model.backbone, directory, dtype=torch.float32, device=CPU)
    return begun(model)


def load_sharded(directory: Path, kind: str) -> Any:
    model, sharding = build(directory, kind), choose_sharding("full", CPU)
    assert sharding is not None
    load_sharded_directory(
        model, model.backbone, directory, sharding, dtype=torch.float32, device=CPU
    )
    return begun(model)


def own_tokens() -> torch.Tensor:
    """Another number of rows and tokens on each rank; of a whole model several parts."""
    rank, _ = rank_and_world_size()
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(3, 250, (2 + rank, 20 + 3 * rank), generator=generator)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.side.named_parameters()}


def assert_same_step(whole: Any, sharded: Any) -> None:
    for model in (whole, sharded):
        model.zero_grad(set_to_none=True)
    tokens = own_tokens()
    expected, actual = whole(tokens), sharded(tokens)
    assert torch.equal(expected, actual)
    for output in (expected, actual):
        output.square().sum().backward()
    for name, gradient in gradients(whole).items():
        assert torch.equal(gradients(sharded)[name], gradient), name


def same_as_whole(directory: Path, kind: str) -> None:
    whole, sharded = load_whole(directory, kind), load_sharded(directory, kind)
    if is_main_process():  # a process without a batch keeps in step
        take_part(sharded, CPU)
    else:
        assert_same_step(whole, sharded)
    for _ in range(2):  # the second time, layers have been freed
        assert_same_step(whole, sharded)
    with torch.no_grad():
        pairs = zip(*(m.with_reference(own_tokens()) for m in (whole, sharded)), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
    free_weights(sharded)
    assert not left_whole(sharded)
    kept = sum(p.to_local().nbytes for p in frozen(sharded))
    total = backbone_bytes(build(directory, kind))
    # A tensor may have one row more here than elsewhere; each process has the levels of NF4.
    assert kept <= total / 2 + 0.05 * total
    with Traffic() as step:
        sharded(own_tokens()).sum().backward()
    groups, _ = group_bytes(build(directory, kind))
    num_trained = MODELS[kind][2].get("lora_layers", 0)
    assert len(step.messages) == len(groups) + 1 + num_trained, "each group once a pass"
    with Traffic() as step:
        sharded.with_reference(own_tokens())[0].sum().backward()
    # The reference goes through the layers that train once more, forward.
    assert len(step.messages) == len(groups) + 1 + 2 * num_trained
    assert {name for name, *_ in step.messages} == {"_allgather_base_"}


def frozen(model: Any) -> list[Any]:
    return [p for p in model.parameters() if not p.requires_grad and p.numel()]


@by_kind
def test_sharded_model_and_its_gradients_are_those_of_a_whole_one_to_the_last_bit(
    kind: str, tmp_path: Path
) -> None:
    on_ranks(2, same_as_whole, save(tmp_path / "model", kind), kind)


@by_kind
def test_groups_are_the_layers_and_an_untied_embedding(kind: str, tmp_path: Path) -> None:
    model = build(save(tmp_path / "model", kind), kind)
    groups, rest = group_bytes(model)
    is_tied = model.backbone.model.config.tie_word_embeddings
    assert len(groups) == len(model.layers) + (not is_tied)
    assert sum(groups) + rest == backbone_bytes(model)
