"""The parts of a model of transformers: its decoder, its layers, its LM head."""

from typing import Any

import torch
from torch import nn

from qst_tune.errors import UserError
from qst_tune.modules.scaled_head import ScaledHead

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
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
    """Find the module that turns token ids into f, in front of the head; UserError if none does."""
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


def carries_state(model: Any, config: Any) -> bool:
    """Whether states run along the tokens (Mamba, linear attention, convolutions).

    Such models cannot be packed, nor can their cache be shortened.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    return bool(getattr(model, "_is_stateful", False) or kinds - _ATTENTION)


# What some models multiply their logits (or the head's input, which is the same) with, by the name
# of the setting: Cohere, Falcon-H1, Granite, MiniCPM 3, Inkling. HyperCLOVA X multiplies where
# Granite divides. ``check_head`` compares the result with the model's own logits.
_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
_OTHER_SIGN = {"hyperclovax": {"logits_scaling": 1}}


class ProjectedHead(nn.Module):
    r"""OPT-350M's head: project to the width of its narrow embedding, then score every token.

    .. math:: z = E\,W_{out}\,y

    W_out is ``[W, D]``; E, ``[V, W]``, is the model's LM head; the model owns both. The output mix
    comes before this head, so that f and u have the model's width; the authors' code projects f
    first, and then fails on shapes.
    """

    def __init__(self, project_out: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self._parts = (project_out, linear)  # in a tuple, so that each weight has one name

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Compute logits ``[..., V]`` of ``y``, ``[..., D]``."""
        project_out, linear = self._parts
        logits: torch.Tensor = linear(project_out(y))
        return logits


def head_of(model: Any, config: Any) -> nn.Module:
    """Return the head, from f to logits; a plain linear stays one: the loss is fast for it."""
    score: nn.Module | None = score_of(model)
    if score is not None:
        return score
    linear: nn.Module = model.get_output_embeddings()
    project_out = getattr(model.get_decoder(), "project_out", None)
    if project_out is not None:
        return ProjectedHead(project_out, linear)
    cap = getattr(config, "final_logit_softcapping", None)
    scale = _scale(config)
    return linear if cap is None and scale == 1 else ScaledHead(linear, scale, cap)


def _scale(config: Any) -> float:
    signs = {**_FACTORS, **_OTHER_SIGN.get(config.model_type, {})}
    scale = 1.0
    for name, sign in signs.items():
        scale *= float(getattr(config, name, None) or 1.0) ** sign
    return scale


def has_windows(config: Any) -> bool:
    """Whether some layers see only the last tokens."""
    kinds = getattr(config, "layer_types", None) or ()
    by_kind = any(kind != "full_attention" for kind in kinds)
    return by_kind or (not kinds and bool(getattr(config, "sliding_window", None)))
