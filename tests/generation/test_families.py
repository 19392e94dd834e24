"""Every family with every downsampler: caches of both networks, padding, beams change nothing."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from torchtune.models.llama2 import llama2
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_1 import llama3_1
from torchtune.models.llama3_2 import llama3_2

from qst_tune.backbone.identity import BackboneId
from qst_tune.generation.sequence import CachedSequence
from qst_tune.models import qst_decoder, qst_from_hf
from qst_tune.modules.side.downsample import DownsampleKind
from qst_tune.results.tuned_directory import Provenance
from qst_tune.transformers import QSTConfig, QSTForCausalLM
from tests.generation.test_sequence import greedy
from tests.support import hf_models
from tests.support.numbers import TINY, TINY_REDUCTION, random_tokens, randomize_

LLAMAS = {"llama2": llama2, "llama3": llama3, "llama3.1": llama3_1, "llama3.2, smollm2": llama3_2}
FAMILIES = [*LLAMAS, *(family for family in hf_models.FAMILIES if family != "llama")]
PROMPT = [5, 9, 2, 60, 7]
NUM_NEW = 8
# fp32 sums in another order; logits reach 30.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("generation")
    for family in FAMILIES:
        if family not in LLAMAS:
            hf_models.save_hf_model(root / family, hf_models.FAMILIES[family])
    return root


def qst_model(family: str, directories: Path, downsample: DownsampleKind = "adapter"):
    choices = {"reduction_factor": TINY_REDUCTION, "rank": 8, "downsample": downsample}
    if family in LLAMAS:
        torch.manual_seed(0)
        model = qst_decoder(LLAMAS[family](**TINY), **choices).eval()
    else:
        model = hf_models.loaded(qst_from_hf, directories / family, **choices)
    randomize_(model.side)
    return model


@torch.no_grad()
def greedy_without_caches(model, prompt):
    tokens = list(prompt)
    for _ in range(NUM_NEW):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("downsample", get_args(DownsampleKind))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_with_caches_are_those_without(family, downsample, directories) -> None:
    model, tokens = qst_model(family, directories, downsample), random_tokens(1, 10)
    expected = model(tokens)[0]
    assert expected.std(0).max() > 0.1, "logits that never change would show nothing"
    sequence = CachedSequence(model)
    found = [sequence.next_logits(tokens[0, :length].tolist()) for length in range(5, 11)]
    torch.testing.assert_close(torch.stack(found), expected[4:], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_padded_rows_and_beams_are_those_without_caches(
    family, directories
) -> None:
    decoder = qst_model(family, directories)
    unsaved = Provenance(BackboneId("tiny", "", "none"), {}, "")
    model = QSTForCausalLM(QSTConfig(), decoder, unsaved).eval()
    rows = [PROMPT, [33, 4]]
    padded = torch.tensor([PROMPT, [0, 0, 0, *rows[1]]])
    mask = torch.tensor([[1] * 5, [0] * 3 + [1] * 2])
    settings = {
        "attention_mask": mask, "max_new_tokens": NUM_NEW, "do_sample": False,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    output = model.generate(padded, **settings)
    for row, found in zip(rows, output.tolist(), strict=True):
        expected = greedy_without_caches(decoder, row)
        assert found[len(PROMPT) :] == expected
        assert greedy(decoder, row, NUM_NEW) == expected
    beams = model.generate(padded, num_beams=3, **settings)
    assert torch.equal(beams, model.generate(padded, num_beams=3, use_cache=False, **settings))


def test_every_family_that_is_read_is_generated_with() -> None:
    assert set(FAMILIES) == {*LLAMAS, *hf_models.FAMILIES} - {"llama"}
