"""Our builder against torchtune's of the same families: the same modules and the same digits."""

import pytest
import torch
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2
from torchtune.models.mistral import mistral
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings, qwen2
from torchtune.modules import RotaryPositionalEmbeddings

from qst_tune.models import rotary_decoder
from tests.helpers import TINY, random_tokens, randomize_

HEAD_DIM = TINY["embed_dim"] // TINY["num_heads"]
LENGTH = TINY["max_seq_len"]
# name: torchtune's builder, its arguments, ours
BUILDERS = {
    "llama2": (llama2, {}, {"rope": RotaryPositionalEmbeddings(HEAD_DIM, LENGTH)}),
    "mistral": (mistral, {}, {"rope": RotaryPositionalEmbeddings(HEAD_DIM, LENGTH)}),
    "llama3_2": (
        llama3_2,
        {"rope_base": 5000, "scale_factor": 8},
        {
            "rope": Llama3ScaledRoPE(HEAD_DIM, LENGTH, 5000, scale_factor=8),
            "tie_word_embeddings": True,
        },
    ),
    "qwen2": (
        qwen2,
        {"rope_base": 5000.0},
        {"rope": Qwen2RotaryPositionalEmbeddings(HEAD_DIM, LENGTH, 5000.0), "qkv_bias": True},
    ),
}


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_logits_are_torchtunes_to_the_last_digit(name: str) -> None:
    builder, their_arguments, our_arguments = BUILDERS[name]
    theirs = builder(**TINY, norm_eps=1e-5, **their_arguments).eval()
    ours = rotary_decoder(**TINY, head_dim=HEAD_DIM, norm_eps=1e-5, **our_arguments).eval()
    randomize_(theirs)
    ours.load_state_dict(theirs.state_dict())
    tokens = random_tokens(length=40)
    assert torch.equal(ours(tokens), theirs(tokens))


def test_heads_need_not_be_as_wide_as_the_model() -> None:
    rope = RotaryPositionalEmbeddings(10, LENGTH)
    switches = {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True}
    model = rotary_decoder(**TINY, head_dim=10, norm_eps=1e-5, rope=rope, **switches)
    layer = {name: tuple(p.shape) for name, p in model.layers[0].named_parameters()}
    assert layer == {
        "attn.q_proj.weight": (60, 96),
        "attn.q_proj.bias": (60,),
        "attn.k_proj.weight": (30, 96),
        "attn.k_proj.bias": (30,),
        "attn.v_proj.weight": (30, 96),
        "attn.v_proj.bias": (30,),
        "attn.output_proj.weight": (96, 60),
        "attn.output_proj.bias": (96,),
        "attn.q_norm.scale": (10,),
        "attn.k_norm.scale": (10,),
        "mlp.w1.weight": (100, 96),
        "mlp.w1.bias": (100,),
        "mlp.w2.weight": (96, 100),
        "mlp.w2.bias": (96,),
        "mlp.w3.weight": (100, 96),
        "mlp.w3.bias": (100,),
        "sa_norm.scale": (96,),
        "mlp_norm.scale": (96,),
    }
    assert model(random_tokens()).shape == (2, 11, TINY["vocab_size"])
