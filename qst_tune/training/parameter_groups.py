"""Which parameters train, and which of them decay."""

from typing import Any

from torch import nn

from qst_tune.modules.output_mix import AlphaMix, SigmoidMix
from qst_tune.modules.side_network import Gate

_UNDECAYED_TYPES = (Gate, AlphaMix, SigmoidMix)


def parameter_groups(side: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters for the optimizer: matrices decay, everything else does not.

    Weight decay pulls towards zero. For a gate, a mix or a norm that is not "small" but another
    function (beta 0.5, a norm that outputs nothing), so they are exempt, and biases with them; the
    authors' code decays them all.

    Args:
        side (nn.Module): the side network.

    Returns:
        list[dict[str, Any]]: two groups, the second with ``weight_decay`` 0.0.
    """
    undecayed = {
        id(parameter)
        for module in side.modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, _UNDECAYED_TYPES) or parameter.ndim < 2
    }
    trainable = [p for p in side.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if id(p) not in undecayed]},
        {"params": [p for p in trainable if id(p) in undecayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
