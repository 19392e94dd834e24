"""Which linears get LoRA, by the names of several libraries."""

import pytest

from qst_tune.modules.lora_targets import ALL_ATTENTION, chosen_linears, linears_below
from tests.support.numbers import tiny_backbone

TORCHTUNE = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1"]
LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up"]
FUSED = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h"]
LOW_RANK = ["self_attn.q_a_proj", "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    ("paths", "attention", "mlp", "chosen"),
    [
        (TORCHTUNE, ALL_ATTENTION, True, TORCHTUNE),
        (TORCHTUNE, ["q_proj", "output_proj"], False, [TORCHTUNE[0], TORCHTUNE[3]]),
        (LLAMA, ["v_proj", "output_proj"], False, [LLAMA[2], LLAMA[3]]),
        (LLAMA, [], True, ["mlp.up"]),
        (FUSED, ["q_proj"], False, ["attention.query_key_value"]),
        (FUSED, ["output_proj"], True, ["attention.dense", "mlp.dense_h_to_4h"]),
        (LOW_RANK, ["k_proj"], False, LOW_RANK[:2]),
    ],
)
def test_names_of_torchtune_choose_linears_of_any_library(paths, attention, mlp, chosen):
    sizes = dict.fromkeys(paths, (4, 8))
    assert list(chosen_linears(sizes, attention, mlp=mlp)) == chosen


def test_widths_are_those_of_the_weights():
    layer = tiny_backbone().layers[0]
    expected = {
        name.removesuffix(".weight"): tuple(weight.shape[::-1])
        for name, weight in layer.named_parameters()
        if weight.ndim == 2
    }
    assert linears_below(layer) == expected
