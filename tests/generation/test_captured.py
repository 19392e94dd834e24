"""A recorded step gives what the step it stands for gives, on tensors that stay where they are."""

import gc
import logging
import weakref
from functools import partial

import pytest
import torch

from qst_tune.backbone.cache import SlotLayer
from qst_tune.generation import caches as caches_module
from qst_tune.generation.batch import answer_batch
from qst_tune.generation.caches import ModelCaches, last_logits
from qst_tune.generation.captured import _recorded, _report, recorder
from qst_tune.generation.sampling import Sampling
from qst_tune.generation.sequence import CachedSequence
from qst_tune.models import qst_decoder, qst_from_hf
from tests.support import hf_models
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone
from tests.support.stand_in_graphs import StandInGraphs


def tiny_model(**side_arguments):
    model = qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION, **side_arguments)
    randomize_(model.side)
    return model.eval()


@pytest.fixture
def on_gpu(monkeypatch):
    """Record on a CPU, in rooms of 8, 16, ... tokens."""
    graphs = StandInGraphs()
    _report.cache_clear()
    monkeypatch.setattr(caches_module, "recorder", lambda device: partial(_recorded, graphs))
    monkeypatch.setattr("qst_tune.generation.captured._LEAST_ROOM", 8)
    # Of a CPU alone: it looks a position up once for all layers, and while it records not at all.
    monkeypatch.setattr("qst_tune.generation.one_token._rotary", lambda module: None)
    return graphs


@torch.no_grad()
def logits_token_by_token(model, tokens, is_real, prompt):
    caches, found = ModelCaches(model), []
    for start, stop in [(0, prompt), *((n, n + 1) for n in range(prompt, tokens.shape[1]))]:
        found.append(last_logits(model, caches, tokens[:, start:stop], is_real[:, :stop]))
    return torch.stack(found)


def without_recording(monkeypatch):
    monkeypatch.setattr(caches_module, "recorder", lambda device: None)


def padded(num_padding):
    tokens = random_tokens(batch=2, length=21)
    is_real = torch.ones_like(tokens, dtype=torch.bool)
    is_real[0, :num_padding] = False  # on the left
    return tokens, is_real


@pytest.mark.parametrize("prompt", [1, 2, 5, 8, 9])
def test_recorded_steps_give_the_logits_of_growing_caches(prompt, monkeypatch, on_gpu):
    model, (tokens, is_real) = tiny_model(), padded(prompt - 1)
    found = logits_token_by_token(model, tokens, is_real, prompt)
    assert on_gpu.num_records >= 2  # in rooms of 16 and of 32 tokens
    without_recording(monkeypatch)
    expected = logits_token_by_token(model, tokens, is_real, prompt)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_answers_are_those_without_recording(monkeypatch, on_gpu):
    model, prompts = tiny_model(), [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
    greedy = {"sampling": Sampling(), "stop_tokens": [], "max_new_tokens": 20}
    found = answer_batch(model, prompts, **greedy)
    assert on_gpu.num_records == 2
    without_recording(monkeypatch)
    assert found == answer_batch(model, prompts, **greedy)


def test_a_sequence_goes_on_from_wherever_it_is_cut(monkeypatch, on_gpu):
    model, tokens = tiny_model(), random_tokens(batch=1, length=20)[0].tolist()
    sequence = CachedSequence(model)
    for length in (3, 4, 9, 10, 14, 15):
        sequence.next_logits(tokens[:length])
    other, lengths = [*tokens[:9], 60, 59], (9, 10, 11)  # in the same room of 16
    found = [sequence.next_logits(other[:length]) for length in lengths]
    without_recording(monkeypatch)
    expected = [CachedSequence(model).next_logits(other[:length]) for length in lengths]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_room_that_was_outgrown_and_fits_again_is_recorded_anew(monkeypatch, on_gpu):
    model, tokens = tiny_model(), random_tokens(batch=1, length=20)[0].tolist()
    sequence = CachedSequence(model)
    for length in (3, 4, 5, 6, 20):  # tokens in a room of 8, then many at once
        sequence.next_logits(tokens[:length])
    other, lengths = [*tokens[:3], 60, 59, 58, 57], (5, 6, 7)
    found = [sequence.next_logits(other[:length]) for length in lengths]
    assert on_gpu.num_records == 2
    without_recording(monkeypatch)
    expected = [CachedSequence(model).next_logits(other[:length]) for length in lengths]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_two_sequences_do_not_write_into_each_other(on_gpu):
    model, tokens = tiny_model(), random_tokens(batch=1, length=12)[0].tolist()
    first, second = CachedSequence(model), CachedSequence(model)
    for length in range(3, 13):
        a = first.next_logits(tokens[:length])
        b = second.next_logits([*tokens[:2], *[60] * (length - 2)])
    alone = CachedSequence(model).next_logits(tokens)
    torch.testing.assert_close(a, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(a, b)


def test_what_cannot_be_recorded_runs_as_before_and_is_reported_once(monkeypatch, on_gpu, caplog):
    model, (tokens, is_real) = tiny_model(), padded(2)

    def refuse(compute):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(caches_module, "recorder", lambda device: refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = logits_token_by_token(model, tokens, is_real, 5)
    (warning,) = [r.message for r in caplog.records if "CUDA graph" in r.message]
    assert warning.endswith("RuntimeError: operation not permitted when stream is capturing")
    without_recording(monkeypatch)
    expected = logits_token_by_token(model, tokens, is_real, 5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Those whose test models have windows are not recorded.
RECORDED = ["qwen3", "phi3", "gemma", "opt"]


def transformers_model(family, directory):
    hf_models.save_hf_model(directory, hf_models.FAMILIES[family])
    model = hf_models.loaded(qst_from_hf, directory, reduction_factor=TINY_REDUCTION, rank=8)
    randomize_(model.side)
    return model


@torch.no_grad()
def logits_of_turns(model):
    """Logits of a prompt, of tokens, of a second turn, and of tokens again."""
    tokens, is_real = padded(3)
    pieces = [(0, 5), *((n, n + 1) for n in range(5, 14)), (14, 17), (17, 18), (18, 19), (19, 20)]
    caches = ModelCaches(model)
    return torch.stack(
        [last_logits(model, caches, tokens[:, a:b], is_real[:, :b]) for a, b in pieces]
    )


@pytest.mark.parametrize("family", [*RECORDED, "mistral"])
def test_steps_of_transformers_models_are_recorded_too(family, tmp_path, monkeypatch, on_gpu):
    model = transformers_model(family, tmp_path)
    torch.manual_seed(1)
    found = logits_of_turns(model)
    assert on_gpu.num_records == (3 if family in RECORDED else 0)
    without_recording(monkeypatch)
    torch.manual_seed(1)
    expected = logits_of_turns(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["other logits", "an error"])
def test_a_model_that_computes_something_else_is_not_recorded(
    fault, tmp_path, monkeypatch, on_gpu, caplog
):
    model = transformers_model("phi3", tmp_path)

    def update(self, key_states, value_states, *_):
        assert fault != "an error", "no keys"
        return self.keys, self.values

    monkeypatch.setattr(SlotLayer, "update", update)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        found = [logits_of_turns(model) for _ in range(2)]
    assert on_gpu.num_records == 0
    assert sum("CUDA graph" in record.message for record in caplog.records) == 1
    without_recording(monkeypatch)
    torch.manual_seed(1)
    expected = [logits_of_turns(model) for _ in range(2)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_python_counts_the_tokens_is_not_recorded(
    tmp_path, monkeypatch, on_gpu, caplog
):
    """At the place where it was recorded it is right."""
    model = transformers_model("phi3", tmp_path)

    def update(self, key_states, value_states, *_):
        self.keys[:, :, self._owner.length] = key_states[:, :, 0]
        self.values[:, :, self._owner.length] = value_states[:, :, 0]
        return self.keys, self.values

    monkeypatch.setattr(SlotLayer, "update", update)
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        found = logits_of_turns(model)
    assert on_gpu.num_records == 1
    assert "a step of this model at a fixed place gives other logits" in caplog.text
    without_recording(monkeypatch)
    torch.manual_seed(1)
    torch.testing.assert_close(found, logits_of_turns(model), rtol=1e-4, atol=1e-4)


def test_what_waits_for_the_gpu_is_refused_before_a_recording_begins():
    class Graphs:
        device = torch.device("cpu")

        def rehearse(self, work):
            raise RuntimeError("it waits")

        def record(self, work):
            raise AssertionError("a recording has begun")

    with pytest.raises(RuntimeError, match="it waits"):
        _recorded(Graphs(), lambda: torch.zeros(1))


@pytest.mark.parametrize("family", [None, "qwen3"])
@torch.no_grad()
def test_the_memory_of_a_text_is_free_as_soon_as_it_is_over(family, tmp_path, on_gpu):
    """Python collects cycles when it likes, and knows nothing of a GPU that is full."""
    model = transformers_model(family, tmp_path) if family else tiny_model()
    tokens, is_real = padded(0)
    caches = ModelCaches(model)
    gc.disable()
    try:
        for start, stop in [(0, 5), (5, 6), (6, 7), (7, 8)]:
            last_logits(model, caches, tokens[:, start:stop], is_real[:, :stop])
        held = [
            caches._own[0]._keys,
            *(slots.keys for slots in getattr(caches._frozen, "_slots", [])),
        ]
        alive = [weakref.ref(part) for part in (caches, *held)]
        del caches, held
        assert [part() for part in alive] == [None] * len(alive)
    finally:
        gc.enable()


def test_only_a_gpu_records():
    assert recorder(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("base_quantization", ["nf4", "int8", "int4", "none"])
@pytest.mark.parametrize("lora_layers", [0, 2])
def test_a_cuda_graph_gives_the_logits_of_growing_caches(
    base_quantization, lora_layers, monkeypatch
):
    backbone = tiny_backbone(dtype=torch.bfloat16)
    choices = {"base_quantization": base_quantization, "lora_layers": lora_layers}
    model = qst_decoder(backbone, reduction_factor=TINY_REDUCTION, **choices)
    randomize_(model.side)
    model.eval().cuda()
    tokens, is_real = (part.cuda() for part in padded(3))
    found = logits_token_by_token(model, tokens, is_real, 5)
    caches = ModelCaches(model)
    assert caches.step is not None
    without_recording(monkeypatch)
    expected = logits_token_by_token(model, tokens, is_real, 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # of a deviation of 1
