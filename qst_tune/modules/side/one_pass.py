"""One side network on its way up a backbone."""

from collections.abc import Sequence
from typing import Any

import torch

from qst_tune.modules.backbone import Backbone, Visit
from qst_tune.modules.side.network import SideNetwork
from qst_tune.torchtune_compat import Mask


class SidePass:
    """The state of a side network while the backbone runs; None: of the backbone alone.

    ``where`` has the mask and the positions that the network takes.
    """

    def __init__(self, side: SideNetwork | None, where: dict[str, Mask | None]) -> None:
        self.side, self.where = side, where
        self.state: Any = None  # g_k
        self.index = 0

    def visit(self, h_BTD: torch.Tensor) -> None:
        """Let the next block read a hidden state, the first time the embedding."""
        if self.side is None:
            return
        if self.state is None:
            self.state = self.side.start(h_BTD)
            return
        self.state = self.side.step(self.index, h_BTD, self.state, **self.where)
        self.index += 1

    def run(self, backbone: Backbone, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
        """Run a whole backbone, with this network's LoRA; arguments as of ``Backbone.run``."""
        with torch.set_grad_enabled(self._trains()):
            return backbone.run(tokens, visit=self.visit, lora=self._lora, **how)

    def run_suffix(
        self, backbone: Backbone, tokens: torch.Tensor, h_BTD: torch.Tensor, **how: Any
    ) -> torch.Tensor:
        """Run its layers from state ``h_BTD`` on; arguments as of ``Backbone.suffix``."""
        with torch.set_grad_enabled(self._trains()):
            return backbone.suffix(tokens, h_BTD, visit=self.visit, lora=self._lora, **how)

    def finish(self, f_BTD: torch.Tensor) -> torch.Tensor:
        """Compute the LM head's input from the backbone's f."""
        return f_BTD if self.side is None else self.side.finish(f_BTD, self.state)

    @property
    def _lora(self) -> Any:
        return None if self.side is None else self.side.lora

    def _trains(self) -> bool:
        """Whether a gradient is asked for; the reference model needs none."""
        parameters = () if self.side is None else self.side.parameters()
        return torch.is_grad_enabled() and any(p.requires_grad for p in parameters)


def visiting(passes: Sequence[SidePass]) -> Visit:
    """Let all of these networks read each state."""

    def visit(h_BTD: torch.Tensor) -> None:
        for one in passes:
            one.visit(h_BTD)

    return visit
