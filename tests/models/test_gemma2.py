"""Where our Gemma 2 differs from torchtune's; tests/models/test_from_hf.py shows that it is one."""

import torch
from torchtune.models.gemma2 import gemma2 as torchtune_gemma2

from qst_tune.models import gemma2, qst_decoder
from tests.helpers import TINY, random_tokens, randomize_

SIZES = {**TINY, "head_dim": 12}


@torch.no_grad()
def test_it_is_torchtunes_where_nothing_is_capped() -> None:
    theirs = torchtune_gemma2(
        **SIZES, hidden_capping_value=1e6, final_capping_value=1e6, query_pre_attn_scalar=7
    )
    ours = gemma2(**SIZES, attention_cap=None, logit_cap=None, query_pre_attn_scalar=7)
    randomize_(theirs)
    state = {k.replace("norm.rms_norm.", "norm."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    tokens = random_tokens()
    # Division by 1e6 and back rounds.
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=1e-2)


@torch.no_grad()
def test_the_logits_are_capped() -> None:
    model = gemma2(**SIZES, logit_cap=2.0)
    randomize_(model)
    logits = model(random_tokens())
    assert 1.5 < logits.abs().max() <= 2


def test_it_can_have_a_side_network() -> None:
    model = qst_decoder(gemma2(**SIZES), reduction_factor=4)
    assert type(model.side.norm) is type(model.norm)
    assert type(model.side.blocks[0].sa_scale) is type(model.layers[0].sa_scale)
