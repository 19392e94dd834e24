"""Where the parts of a text model are in a model of transformers."""

from typing import Any

from torch import nn

from qst_tune.errors import UserError

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Models without positions have no limit of their own.
_UNLIMITED = 2**20


def longest_text(config: Any) -> int:
    """Return a text model's number of positions, or a large number if it has no limit."""
    found = [getattr(config, name, None) for name in _LENGTHS]
    return next((int(n) for n in found if isinstance(n, int) and n > 0), _UNLIMITED)


def score_of(model: Any) -> Any:
    """Return the head of a model that classifies sequences; None of one that writes text."""
    return getattr(model, "score", None)


def decoder_of(model: Any) -> Any:
    """Find the module that turns token ids into f, in front of the head.

    The model of transformers writes text or classifies sequences. UserError if there is none.
    """
    head = score_of(model) or model.get_output_embeddings()
    decoder = model.get_decoder() if score_of(model) is None else model.base_model
    # Llama 4's names a causal language model, or itself, as its decoder.
    while getattr(decoder, "lm_head", None) is not None and hasattr(decoder, "model"):
        decoder = decoder.model
    if decoder is model or head is None:
        raise UserError(
            f"model_type={model.config.model_type!r}: {type(model).__name__} has no decoder with "
            "an LM head behind it, which a side network needs; it is not supported"
        )
    return decoder


def layers_of(decoder: Any, config: Any) -> nn.ModuleList:
    """Find the first list of as many modules as the model has layers; UserError if none is."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise UserError(
        f"model_type={config.model_type!r}: {type(decoder).__name__} has no list of "
        f"{config.num_hidden_layers} layers to read hidden states from; it is not supported"
    )
