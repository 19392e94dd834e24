import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.backbones import BACKBONES, Backbone, dense_backbone
from benchmarks.costs import Job, allocated_bytes, measure, measure_in_new_process, peak_of_profile
from benchmarks.methods import METHODS, REFERENCE, random_batch
from benchmarks.timing import Shape
from qst_tune.estimation.tracker import StorageTracker

TINY = BACKBONES["tiny"]
SHAPE = Shape(3, 96)
ALLOCATED = ("full", "qlora", "qlora_checkpointed", "qst_stored", "qst_recomputed")


def test_default_backbone_is_large_enough_and_counted_right() -> None:
    assert BACKBONES["200m"].num_parameters >= 150e6
    counted = sum(p.numel() for p in dense_backbone(TINY).parameters())
    assert counted == TINY.num_parameters


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_torchtune_can_quantise_every_weight_of_every_backbone(backbone: Backbone) -> None:
    kv_dim = backbone.num_kv_heads * backbone.head_dim
    for width in (backbone.embed_dim, kv_dim, backbone.intermediate_dim):
        assert backbone.embed_dim * width % (64 * 256) == 0


@pytest.mark.parametrize("name", ALLOCATED)
def test_profiler_and_storage_tracker_see_the_same_peak(name: str) -> None:
    """Two records that share no code: calls of the allocator, and lifetimes of storages."""
    trainee = METHODS[name].build(TINY)
    batch = random_batch(TINY, SHAPE.batch_size, SHAPE.num_tokens, seed=0)
    with METHODS[name].running(trainee):
        trainee.step(batch)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            trainee.step(batch)
        by_profiler = allocated_bytes(trainee, batch) + peak_of_profile(profiler)
        tracker = StorageTracker()
        tracker.register([*trainee.model.parameters(), *trainee.model.buffers()], "frozen weights")
        tracker.register([list(trainee.optimizer.state.values()), batch], "optimizer states")
        with tracker:
            tracker.enter("forward")
            trainee.step(batch)
    # The tracker does not see what a kernel takes and returns within one operation: 5% of a step of
    # this size (147 kB), less of a larger one.
    assert by_profiler == pytest.approx(tracker.peak().num_bytes, rel=0.08)


def test_peak_of_known_allocations() -> None:
    kept = torch.zeros(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 19, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 18, dtype=torch.uint8)
    del kept, second, third
    assert peak_of_profile(profiler) == (1 << 20) + (1 << 19)


def test_flops_of_the_dense_backbone_are_those_of_its_weights() -> None:
    """Six a weight and token without embeddings, and attention's twelve a width and token."""
    num_tokens = 32
    cost = measure(METHODS["full"].build(TINY), TINY, Shape(2, num_tokens))
    norms = TINY.embed_dim * (2 * TINY.num_layers + 1)
    weights = TINY.num_parameters - TINY.vocab_size * TINY.embed_dim - norms
    # 2 x 2 products forward; backward 5 of them instead of 4, since it computes the scores again.
    attention = (2 * 2 + 2 * 5) * num_tokens * TINY.embed_dim * TINY.num_layers
    assert cost.flops_per_token == pytest.approx(6 * weights + attention, rel=1e-3)
    assert cost.frozen_bytes < 0.05 * cost.peak_bytes  # rotary caches


@pytest.mark.slow
def test_a_process_of_its_own_measures_what_this_one_does() -> None:
    job = Job(REFERENCE, TINY, (SHAPE,), threads=1)
    ((shape, cost),) = measure_in_new_process(job)
    here = measure(METHODS[REFERENCE].build(TINY), TINY, SHAPE)
    assert shape == SHAPE
    assert cost.peak_bytes == here.peak_bytes
    assert cost.frozen_bytes == here.frozen_bytes
    assert cost.flops_per_token == here.flops_per_token
    assert 0 < cost.backbone_product_seconds <= cost.product_seconds <= cost.seconds
    assert cost.peak_bytes < cost.peak_rss_bytes


def test_a_dead_process_is_an_error() -> None:
    job = Job("no such method", TINY, (SHAPE,), threads=1)
    with pytest.raises(RuntimeError, match="no such method ended with status 1"):
        list(measure_in_new_process(job))
