"""Read the weights of a module that FSDP has sharded."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Have a module's own group of weights whole in the block. Collective if it is sharded.

    Args:
        module (nn.Module): what ``fully_shard`` was called with; any other is whole already.

    Yields:
        None: while the weights are there.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
