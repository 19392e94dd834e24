"""torchtune's own decoder with weights that torchao, not this package, quantised and decoded."""

from pathlib import Path

import torch
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.models import convert_weights
from torchtune.models.llama3_2 import llama3_2

from tests.support.checkpoints import SIZES, read_checkpoint


def quantised_backbone(directory: Path, quantise: bool = True) -> torch.nn.Module:
    """The model of a directory of SIZES, its linears rounded to NF4 if ``quantise``."""
    state = convert_weights.hf_to_tune(
        read_checkpoint(directory),
        num_heads=SIZES["num_heads"],
        num_kv_heads=SIZES["num_kv_heads"],
        dim=SIZES["embed_dim"],
    )
    for name, weight in state.items():
        if quantise and name.startswith("layers.") and weight.ndim == 2:
            num_blocks = weight.numel() // 64
            scaler_block = next(n for n in range(256, 0, -1) if 256 % n == num_blocks % n == 0)
            state[name] = to_nf4(weight, 64, scaler_block).get_original_weight()
    model = llama3_2(**SIZES)
    model.load_state_dict(state)
    return model
