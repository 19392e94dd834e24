"""Tiny OPT models: with random weights."""

from pathlib import Path

import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from qst_tune.backbone.transformers import TransformersBackbone
from tests.support import numbers
from tests.support.numbers import randomize_

# Its config.json alone.
OPT_DIRECTORY = str(Path(__file__).parent / "opt_tiny")
# 61 is prime; 100 is not 4 x 48.
SIZES = {
    "vocab_size": 61,
    "num_layers": 3,
    "num_heads": 4,
    "embed_dim": 48,
    "intermediate_dim": 100,
    "max_seq_len": 24,
}


def hf_opt(*, post_norm=False, token_dim=None) -> OPTForCausalLM:
    """transformers' model, every parameter random, biases and norms too."""
    config = OPTConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["embed_dim"],
        num_hidden_layers=SIZES["num_layers"],
        ffn_dim=SIZES["intermediate_dim"],
        num_attention_heads=SIZES["num_heads"],
        max_position_embeddings=SIZES["max_seq_len"],
        do_layer_norm_before=not post_norm,
        word_embed_proj_dim=token_dim or SIZES["embed_dim"],
    )
    model = OPTForCausalLM(config).eval()
    randomize_opt_(model)
    # Loud positions: a wrong one shows, and greedy generation does not repeat one token.
    nn.init.normal_(model.model.decoder.embed_positions.weight)
    return model


def randomize_opt_(module: nn.Module) -> None:
    """As ``randomize_``, but with biases around 0: positive ones would drown the tokens."""
    randomize_(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3)


def opt_backbone(**changes) -> TransformersBackbone:
    """transformers' model as a backbone."""
    return TransformersBackbone(hf_opt(**changes))


def authors_opt_weights(model) -> dict[str, torch.Tensor]:
    """The frozen weights of a QST model over OPT under Hugging Face's names."""
    prefix = "frozen.model."
    state = model.state_dict()
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def padded_batch(side: str, lengths: tuple[int, ...] = (9, 5, 1)):
    """Token ids and a mask of rows of these lengths, padded on one side with id 1."""
    return numbers.padded_batch(side, lengths, pad_id=1, vocab_size=SIZES["vocab_size"])
