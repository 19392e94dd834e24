"""How the next token is chosen: greedily, or drawn after temperature, top-k and top-p."""

from dataclasses import dataclass

import torch
from torchtune.generation import sample

from qst_tune.config.schema import GenerationConfig

# Below it the likeliest token has all of the probability, and logits over it could overflow.
_COLDEST = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The filters apply in the order of transformers: temperature, then top-k, then top-p (Holtzman et
    al. 2020, https://arxiv.org/abs/1904.09751, section 3.1).
    """

    temperature: float = 0.0  # of the softmax; 0 takes the most likely token
    top_k: int | None = None  # draw among this many of the most likely; None: all
    # draw among the fewest of the most likely tokens with at least this total probability
    top_p: float | None = None

    @classmethod
    def of_config(cls, cfg: GenerationConfig) -> "Sampling":
        """Read the keys of a config."""
        return cls(cfg.temperature, cfg.top_k, cfg.top_p)

    def choose(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Choose a token id for each sequence: ``[B, V]`` to ``[B]``."""
        if self.temperature < _COLDEST:
            return logits_BV.argmax(-1)
        drawn_B1: torch.Tensor = sample(self.filtered(logits_BV))
        return drawn_B1[:, 0].long()

    def filtered(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """Scale logits ``[B, V]``, with minus infinity for tokens that cannot be drawn."""
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < logits_BV.shape[-1]:
            least_B1 = logits_BV.topk(self.top_k).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            logits_BV = logits_BV.masked_fill(_beyond(logits_BV, self.top_p), -torch.inf)
        return logits_BV


def _beyond(logits_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Whether the tokens more likely than each already have the probability ``top_p``."""
    probabilities_BV, order_BV = logits_BV.softmax(-1).sort(descending=True, stable=True)
    before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
    return torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= top_p)
