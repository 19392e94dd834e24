"""Writes the fixed tensors of this directory: ``python -m tests.golden.make``.

A tiny Llama with a side network of each variant, random from seed 0; what the literal transcription
in ``tests/reference`` computes of it in fp64, logits and the gradient of every trainable parameter,
is stored in fp32. Run it again only when an equation changes, and say why in the commit.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchtune.models.llama2 import llama2

from qst_tune.models import qst_decoder
from qst_tune.modules.side.config import VARIANTS
from tests.reference import qst_reference as reference
from tests.support.numbers import (
    randomize_,
    reference_backbone,
    reference_choices,
    reference_shape,
    reference_side,
)

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 29,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 16,
    "max_seq_len": 16,
    "intermediate_dim": 20,
}


def build(variant):
    """The model whose weights and results are in ``<variant>.safetensors``."""
    return qst_decoder(
        llama2(**SIZES), reduction_factor=2, rank=4, variant=variant, quantize_base=False
    )


def transcribed(model, tokens):
    """Logits and gradients of the shifted loss, in fp64, under the names of our parameters."""
    leaves = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in model.side.named_parameters()
    }
    logits = reference.forward(
        reference_backbone(model, torch.float64),
        reference_side(model.side, {**model.side.state_dict(), **leaves}),
        tokens,
        reference_shape(model.layers),
        reference_shape(model.side.blocks),
        choices=reference_choices(model),
    )["logits"]
    loss_of(logits, tokens).backward()
    return logits.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def loss_of(logits, tokens):
    """Of the next token, the mean over all of them."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def main():
    for variant in VARIANTS:
        torch.manual_seed(0)
        model = build(variant)
        randomize_(model)
        tokens = torch.randint(SIZES["vocab_size"], (2, 11))
        logits, gradients = transcribed(model, tokens)
        tensors = {f"weight.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"gradient.{name}": value.float() for name, value in gradients.items()}
        tensors |= {"tokens": tokens, "logits": logits.float()}
        contiguous = {name: value.detach().clone() for name, value in tensors.items()}
        save_file(contiguous, HERE / f"{variant}.safetensors")


if __name__ == "__main__":
    main()
