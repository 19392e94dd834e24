"""LoRA in the last layers of a frozen backbone: the depth dial between QST and QLoRA.

Notation: N layers, of which the last k train; r rank; I and O widths of a linear layer.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qst_tune.modules.lora_targets import LinearSizes
from qst_tune.modules.side.compute import compute_like
from qst_tune.quantization.kernels import is_few_tokens


class LowRank(nn.Module):
    r"""What is added to the output of one frozen linear layer.

    .. math:: \Delta y = s\, B A\, \mathrm{dropout}(x)

    with A, ``[r, I]``, uniform within :math:`1 / \sqrt{I}` at the start, as torchtune's and PEFT's,
    and B, ``[O, r]``, zero. Products are in the dtype of x, parameters in fp32.

    Source: LoRA (https://arxiv.org/abs/2106.09685), where :math:`s = \alpha / r`; rank-stabilised
    (https://arxiv.org/abs/2312.03732) it is :math:`\alpha / \sqrt r`.
    """

    def __init__(
        self, in_dim: int, out_dim: int, *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.a = nn.Parameter(torch.empty(rank, in_dim))
        self.b = nn.Parameter(torch.empty(out_dim, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the change, ``[..., O]``, for an input ``[..., I]``, in its dtype."""
        return compute_like(x, self._change, x, parameters=self.a.dtype)

    def added_to(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        r"""Compute :math:`y + \Delta y`, of an output ``[..., O]`` and its input ``[..., I]``.

        One product reads and writes y once. Scaled and added in passes of their own, the changes
        of a layer took 10 to 60 % of its products' time (bf16, one core), and so take 9 to 17 %.
        """
        if y.dtype != x.dtype:  # of a caller's autocast
            changed: torch.Tensor = y + self(x)
            return changed
        if is_few_tokens(x):
            # Of one token, in the parameters' dtype: 13 us instead of 53 in bf16 (one core).
            return y + self._change(x.to(self.a.dtype)).to(y.dtype)
        return compute_like(x, self._sum, y, x, parameters=self.a.dtype)

    def _change(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.scale * self._reduced(x), self.b)

    def _sum(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows, reduced = y.flatten(0, -2), self._reduced(x).flatten(0, -2)
        return torch.addmm(rows, reduced, self.b.t(), alpha=self.scale).view(y.shape)

    def _reduced(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.dropout(x, self.dropout, self.training), self.a)


class LayerLoRA(Protocol):
    """What a pass over a backbone asks of LoRA in its layers from ``first`` on, counted from 0."""

    first: int

    def trained(self, layers: nn.ModuleList) -> AbstractContextManager[None]:
        """Let these layers, the backbone's, compute with LoRA in here."""


class LastLayersLoRA(nn.ModuleDict):
    """LoRA for the last k layers of a frozen backbone, which it never holds.

    Its parameters have the names of the backbone's linears, such as ``29.attn.q_proj.a``.
    :meth:`trained` lets the layers compute with it from outside: whatever their linears are made of
    and whichever library they come from, they stay as they are. With ``recompute`` a layer saves
    its input alone for backward, and computes again there.

    ``layers`` has the linears of each layer that trains, by its index.
    """

    def __init__(
        self, layers: Mapping[int, LinearSizes], *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.first = min(layers)
        self.recompute = False
        how: Any = {"rank": rank, "scale": scale, "dropout": dropout}
        for index, sizes in layers.items():
            self[str(index)] = _nested(
                {path: LowRank(*size, **how) for path, size in sizes.items()}
            )

    @property
    def restores_dropout(self) -> bool:
        """Whether backward draws again what dropout drew."""
        return self.recompute and any(m.dropout for m in self.modules() if isinstance(m, LowRank))

    @contextmanager
    def trained(self, layers: nn.ModuleList) -> Iterator[None]:
        """Let the last of these layers compute with LoRA in here, in the caller's gradient mode."""
        with ExitStack() as stack:
            for index in range(self.first, len(layers)):
                stack.enter_context(replaced_forward(layers[index], partial(self._run, index)))
            yield

    def _run(
        self, index: int, layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        def with_lora(*args: Any, **kwargs: Any) -> Any:
            with self.added(index, layer):
                return forward(*args, **kwargs)

        if not (self.recompute and torch.is_grad_enabled()):
            return with_lora(*args, **kwargs)
        # Layers evaluate, so nothing but our own dropout is random.
        is_random = self.training and any(pair.dropout for pair in self.pairs(index).values())
        return checkpoint(
            with_lora, *args, use_reentrant=False, preserve_rng_state=is_random, **kwargs
        )

    @contextmanager
    def added(self, index: int, layer: nn.Module) -> Iterator[None]:
        """Let the linears of layer ``index`` add their change in here."""
        with ExitStack() as stack:
            for path, pair in self.pairs(index).items():
                linear = layer.get_submodule(path)
                stack.callback(linear.register_forward_hook(partial(_add, pair)).remove)
            yield

    def pairs(self, index: int) -> dict[str, LowRank]:
        """Return the changes of a layer by the path of their linear in it."""
        layer = self[str(index)]
        return {path: m for path, m in layer.named_modules() if isinstance(m, LowRank)}


def _add(
    pair: LowRank, linear: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    # The sum is a new tensor: a model may change its linears' outputs in place (Falcon).
    return pair.added_to(output, args[0])


@contextmanager
def replaced_forward(layer: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Let ``run(layer, forward, ...)`` compute what the layer's forward does in here."""
    own = vars(layer).get("forward")  # of a compiled layer
    vars(layer)["forward"] = partial(run, layer, layer.forward)
    try:
        yield
    finally:
        if own is None:
            del vars(layer)["forward"]
        else:
            vars(layer)["forward"] = own


def _nested(leaves: dict[str, LowRank]) -> nn.Module:
    """Put modules under their paths: a name of a module cannot have dots."""
    root = nn.Module()
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, leaf)
    return root
