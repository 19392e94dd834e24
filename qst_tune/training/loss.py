"""The loss that a config names."""

from typing import Any

from omegaconf import DictConfig

from qst_tune.config.cli import instantiate
from qst_tune.errors import UserError


def build_loss(block: DictConfig) -> Any:
    """Build the config's loss; UserError if it cannot be built or has no ``ignore_index``."""
    loss = instantiate(block, "loss")
    if not hasattr(loss, "ignore_index"):
        raise UserError(
            f"loss: {block._component_} has no ignore_index, the label of tokens without loss; use "
            "a cross entropy such as qst_tune.modules.LinearCrossEntropyLoss"
        )
    return loss
