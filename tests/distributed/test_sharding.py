"""A sharded backbone computes the very bits of a whole one, and takes 1/N of its bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchtune.models.gemma import gemma
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.qwen2 import qwen2
from torchtune.training import FullModelHFCheckpointer

from qst_tune.backbone.sharded_loading import load_sharded_backbone
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.distributed.processes import is_main_process, rank_and_world_size, sum_gradients
from qst_tune.distributed.sharding import backbone_bytes, check_memory, choose_sharding, take_part
from qst_tune.errors import UserError
from qst_tune.models import peqa_builder, qst_builder
from qst_tune.modules.memory import parameter_bytes
from qst_tune.modules.qst_decoder import QSTDecoder
from tests.support.checkpoints import write_chat_tokenizer
from tests.support.hf_models import save_hf_model
from tests.support.ranks import on_ranks
from tests.support.traffic import Traffic, left_whole

CPU = torch.device("cpu")
QST: dict[str, Any] = {"reduction_factor": 4}
SIZES: dict[str, Any] = {
    "vocab_size": 307,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 48,
    "intermediate_dim": 100,
    "max_seq_len": 64,
}
LLAMA = {**SIZES, "num_kv_heads": 4}
GEMMA = {**SIZES, "head_dim": 12}
# Directory, torchtune's name of its type, builder and arguments: every format, tied and untied
# heads, biases.
MODELS: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
    "nf4": ("qwen2", "QWEN2", qst_builder(qwen2), {**SIZES, **QST}),
    "fp4, tied": (
        "llama tied llama3",
        "LLAMA3_2",
        qst_builder(llama3_2),
        {**SIZES, **QST, "base_quantization": "fp4"},
    ),
    "int4": (
        "llama",
        "LLAMA2",
        qst_builder(llama2),
        {**LLAMA, **QST, "base_quantization": "int4"},
    ),
    "int8, scaled embedding": (
        "gemma grouped",
        "GEMMA",
        qst_builder(gemma),
        {**GEMMA, **QST, "base_quantization": "int8"},
    ),
    "not quantised": (
        "llama",
        "LLAMA2",
        qst_builder(llama2),
        {**LLAMA, **QST, "quantize_base": False},
    ),
    "int8 embedding and head": (
        "llama",
        "LLAMA2",
        qst_builder(llama2),
        {**LLAMA, **QST, "embedding_quantization": "int8"},
    ),
    "int8 embedding, tied": (
        "llama tied llama3",
        "LLAMA3_2",
        qst_builder(llama3_2),
        {**SIZES, **QST, "embedding_quantization": "int8"},
    ),
    "nf4, dial": ("qwen2", "QWEN2", qst_builder(qwen2), {**SIZES, **QST, "lora_layers": 1}),
    "nf4, repaired": ("qwen2", "QWEN2", qst_builder(qwen2), {**SIZES, **QST, "repair_rank": 4}),
    "int4, repaired": (
        "llama",
        "LLAMA2",
        qst_builder(llama2),
        {**LLAMA, **QST, "base_quantization": "int4", "repair_rank": 40},
    ),
    "int8, LoRA everywhere": (
        "llama",
        "LLAMA2",
        qst_builder(llama2),
        {
            **{**LLAMA, **QST, "base_quantization": "int8"},
            **{"lora_layers": 2, "num_side_blocks": 0},
        },
    ),
    "peqa": ("qwen2", "QWEN2", peqa_builder(qwen2), {**SIZES, "bits": 3, "group_size": 32}),
    "peqa, zero points": (
        "llama",
        "LLAMA2",
        peqa_builder(llama2),
        {**LLAMA, "train_zero_points": True},
    ),
}

SLOW = {
    "fp4, tied",
    "int4",
    "int4, repaired",
    "int8, scaled embedding",
    "int8 embedding, tied",
    "int8, LoRA everywhere",
    "peqa, zero points",
}


def build(kind: str) -> Any:
    *_, builder, arguments = MODELS[kind]
    with torch.device("meta"):
        return builder(**arguments)


def checkpointer(directory: Path, kind: str) -> FullModelHFCheckpointer:
    return FullModelHFCheckpointer(
        str(directory),
        ["model.safetensors"],
        MODELS[kind][1],
        output_dir=str(directory.parent / "out"),
    )


def load_whole(directory: Path, kind: str) -> Any:
    model = build(kind)
    load_backbone(model, checkpointer(directory, kind), dtype=torch.float32, device=CPU)
    return _with_side(model)


def _with_side(model: Any) -> Any:
    if isinstance(model, QSTDecoder):
        torch.manual_seed(0)
        model.initialize_side(CPU)
        with torch.no_grad():  # away from the start, where the side network changes nothing
            for parameter in model.side.parameters():
                parameter.add_(torch.randn_like(parameter) / 10)
    return model


def load_sharded(directory: Path, kind: str, mode: str = "full", *, offload: bool = False) -> Any:
    model, twin = build(kind), build(kind)
    chosen = choose_sharding(mode, CPU, offload=offload)
    assert chosen is not None
    load_sharded_backbone(
        model, twin, checkpointer(directory, kind), chosen, dtype=torch.float32, device=CPU
    )
    assert all(p.is_meta for p in twin.parameters()), "the twin keeps weights"
    return _with_side(model)


def own_tokens() -> torch.Tensor:
    """Another number of rows and tokens on each rank: other numbers of parts in a frozen layer."""
    rank, _ = rank_and_world_size()
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 300, (2 + rank, 5 + 3 * rank), generator=generator)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(whole: Any, sharded: Any, tokens: torch.Tensor) -> None:
    for model in (whole, sharded):
        model.frozen_chunk_tokens = 8
        model.zero_grad(set_to_none=True)
    expected, actual = whole(tokens), sharded(tokens)
    assert torch.equal(expected, actual)
    for output in (expected, actual):
        output.square().sum().backward()
    assert gradients(whole).keys() == gradients(sharded).keys() != set()
    for name, gradient in gradients(whole).items():
        assert torch.equal(gradients(sharded)[name], gradient), name


def same_as_whole(directory: Path, kind: str, mode: str, offload: bool) -> None:
    whole = load_whole(directory, kind)
    sharded = load_sharded(directory, kind, mode, offload=offload)
    for recompute in (False, True):  # the second time, layers have been freed
        for model in (whole, sharded):
            if isinstance(model, QSTDecoder):
                model.side.recompute = recompute
        assert_same_step(whole, sharded, own_tokens())
        assert not left_whole(sharded)
    with torch.no_grad():  # as in validation: twice without a backward pass between
        for _ in range(2):
            assert torch.equal(whole(own_tokens()), sharded(own_tokens()))
    if isinstance(whole, QSTDecoder):
        assert_same_preference_step(whole, sharded)


def assert_same_preference_step(whole: Any, sharded: Any) -> None:
    for model in (whole, sharded):
        model.zero_grad(set_to_none=True)
        model.keep_reference()
    expected, actual = (model.with_reference(own_tokens()) for model in (whole, sharded))
    for pair in zip(expected, actual, strict=True):
        assert torch.equal(*pair)
    for policy, reference in (expected, actual):
        (policy * reference).sum().backward()
    for name, gradient in gradients(whole).items():
        assert torch.equal(gradients(sharded)[name], gradient), name
    assert not left_whole(sharded)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in MODELS]
)
def test_sharded_model_and_its_gradients_are_those_of_a_whole_one_to_the_last_bit(
    kind: str, directory: Path
) -> None:
    save_hf_model(directory, MODELS[kind][0])
    write_chat_tokenizer(directory)
    on_ranks(2, same_as_whole, directory, kind, "full", False)


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.slow), "node"])
def test_four_processes_on_two_nodes_compute_the_same_too(mode: str, directory: Path) -> None:
    save_hf_model(directory, MODELS["nf4"][0])
    on_ranks(4, same_as_whole, directory, "nf4", mode, False, nodes=2)


@pytest.mark.parametrize(
    "kind", ["nf4, dial", pytest.param("nf4, repaired", marks=pytest.mark.slow)]
)
def test_offloaded_parts_compute_the_same_too(kind: str, directory: Path) -> None:
    save_hf_model(directory, MODELS[kind][0])
    write_chat_tokenizer(directory)
    on_ranks(2, same_as_whole, directory, kind, "full", True)


def takes_its_share(directory: Path, kind: str, shares: int, mode: str) -> None:
    whole, sharded = load_whole(directory, kind), load_sharded(directory, kind, mode)
    sizes = []
    for model in (whole, sharded):
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        caches = sum(b.nbytes for n, b in model.named_buffers() if n.endswith(("cache", "theta")))
        sizes.append(parameter_bytes(model) - trained - caches)
    # Each of the model's tensors may have one row more here than elsewhere, and an NF4 weight has
    # 17 numbers that everybody keeps.
    slack = sum(p[0].nbytes for p in whole.parameters() if type(p) is nn.Parameter) + 14 * 17 * 4
    assert sizes[0] == backbone_bytes(whole)
    assert sizes[1] <= sizes[0] / shares + slack
    assert slack < sizes[0] / 20
    whole.zero_grad()
    sharded(own_tokens())
    sharded(own_tokens()).sum().backward()
    after = parameter_bytes(sharded) - trained - caches
    assert after <= sizes[0] / shares + slack, "a layer was not freed"


@pytest.mark.parametrize(
    ("size", "mode", "shares"),
    [
        pytest.param(2, "full", 2, marks=pytest.mark.slow),
        (4, "full", 4),
        pytest.param(4, "node", 2, marks=pytest.mark.slow),
    ],
)
def test_a_process_keeps_its_share_of_the_bytes(
    size: int, mode: str, shares: int, directory: Path
) -> None:
    save_hf_model(directory, "qwen2")
    on_ranks(
        size, takes_its_share, directory, "nf4", shares, mode, nodes=2 if mode == "node" else 1
    )


def frozen_codes_cross_and_nothing_else(directory: Path, kind: str, num_trained: int) -> None:
    model = load_sharded(directory, kind)
    shard = sum(p.to_local().nbytes for p in model.parameters() if not p.requires_grad)
    loss = model(own_tokens()).sum()  # the first step also finds out who is the root
    loss.backward()
    with Traffic() as forward:
        loss = model(own_tokens()).sum()
    with Traffic() as backward:
        loss.backward()
    messages = [*forward.messages, *backward.messages]
    assert {name for name, *_ in messages} == {"_allgather_base_"}
    assert {dtype for _, dtype, _ in messages} <= {torch.uint8, torch.float32}
    # Padding to equal parts is all that comes on top; a group's parts are padded row by row.
    sent = sum(num_bytes for *_, num_bytes in forward.messages)
    assert shard <= sent <= 1.05 * shard
    assert len(forward.messages) == len(model.layers) + 2  # embedding; norm and head
    assert len(backward.messages) == num_trained, "a layer that trains is gathered once more"
    trained = [p for p in model.parameters() if p.requires_grad]
    with Traffic() as update:
        sum_gradients(trained)
    assert update.messages == [("allreduce_", torch.float32, sum(p.nbytes for p in trained))]


@pytest.mark.parametrize(("kind", "num_trained"), [("nf4", 0), ("nf4, dial", 1), ("peqa", 2)])
def test_only_frozen_codes_and_gradients_of_what_trains_cross_processes(
    kind: str, num_trained: int, directory: Path
) -> None:
    save_hf_model(directory, MODELS[kind][0])
    on_ranks(2, frozen_codes_cross_and_nothing_else, directory, kind, num_trained)


def one_rank_has_no_batch(directory: Path, kind: str) -> None:
    whole, sharded = load_whole(directory, kind), load_sharded(directory, kind)
    if is_main_process():
        take_part(sharded, CPU)
        assert all(not g.any() for g in gradients(sharded).values())
    else:
        assert_same_step(whole, sharded, own_tokens())
    if isinstance(sharded, QSTDecoder):
        if is_main_process():
            take_part(sharded, CPU, sharded.with_reference)
        else:
            assert_same_preference_step(whole, sharded)
    assert_same_step(whole, sharded, own_tokens())


@pytest.mark.parametrize("kind", ["nf4", "nf4, dial", "peqa"])
def test_process_without_a_batch_keeps_in_step(kind: str, directory: Path) -> None:
    save_hf_model(directory, MODELS[kind][0])
    on_ranks(2, one_rank_has_no_batch, directory, kind)


def test_one_process_and_no_mode_keep_the_whole_backbone(directory: Path) -> None:
    assert choose_sharding("full", CPU) is None
    assert choose_sharding(None, CPU) is None


def test_whole_backbone_that_does_not_fit_is_refused_with_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("nf4")

    class Small:
        total_memory = backbone_bytes(model) // 3

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small)
    with pytest.raises(UserError, match="backbone_sharding=full and start at least 4 processes"):
        check_memory(model, torch.device("cuda"))
    check_memory(model, CPU)
