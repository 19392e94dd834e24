"""Which parameters train, which of them decay, and which train at a rate of their own."""

from typing import Any

from torch import nn

from qst_tune.modules.side.network import Gate
from qst_tune.modules.side.output_mix import AlphaMix, SigmoidMix

_UNDECAYED_TYPES = (Gate, AlphaMix, SigmoidMix)
# The rate of a classifier's head is the optimizer's times this over the head's width D.
_SCORE_WIDTH = 64
_RATE_FACTOR = "rate_factor"


def parameter_groups(side: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters for the optimizer: matrices decay, everything else does not.

    A classifier's head, ``side.score``, learns at ``64 / D`` of the rate. A step of Adam moves each
    of its D weights by the rate, so a logit by the rate times the sum of the state's magnitudes,
    which grows with D: at the rate of the rest one step moved SmolLM2's logits by 1.6, and
    classifiers learnt less (docs/results.md). Rates that fall with the width are those of
    https://arxiv.org/abs/2203.03466. Call :func:`scale_rates` once the optimizer is built.

    Weight decay pulls towards zero. For a gate, a mix or a norm that is not "small" but another
    function (beta 0.5, a norm that outputs nothing), so they are exempt, and biases with them; the
    authors' code decays them all.
    """
    score = getattr(side, "score", None)
    head = [] if score is None else list(score.parameters())
    undecayed = {
        id(parameter)
        for module in side.modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, _UNDECAYED_TYPES) or parameter.ndim < 2
    }
    others = {id(parameter) for parameter in head}
    trainable = [p for p in side.parameters() if p.requires_grad and id(p) not in others]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if id(p) not in undecayed]},
        {"params": [p for p in trainable if id(p) in undecayed], "weight_decay": 0.0},
    ]
    if head:
        groups.append({"params": head, _RATE_FACTOR: _SCORE_WIDTH / head[0].shape[-1]})
    return [group for group in groups if group["params"]]


def scale_rates(optimizer: Any) -> None:
    """Give groups with a rate of their own that rate, before a schedule takes the rates."""
    for group in optimizer.param_groups:
        # Not in place: some optimizers share one tensor among the groups.
        group["lr"] = group["lr"] * group.pop(_RATE_FACTOR, 1.0)
