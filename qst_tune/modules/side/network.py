"""The side network of QST: all trainable parameters.

Notation: B batch, T tokens, D width of the backbone, S = D / r width of the side network, N layers
of the backbone, M blocks of the side network.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import RMSNorm

from qst_tune.modules.backbone import Backbone
from qst_tune.modules.side.config import SideConfig
from qst_tune.modules.side.downsample import Saved, build_downsample
from qst_tune.modules.side.output_mix import build_output_mix
from qst_tune.torchtune_compat import Mask

# torch's default for bf16, 0.008, is as large as the mean square of some embeddings.
_NORM_EPS = 1e-6


class Gate(nn.Module):
    r"""Learned interpolation between a new and a carried state.

    .. math:: \mathrm{gate}(x, c) = (1 - \beta)\,x + \beta\,c, \qquad \beta = \sigma(\gamma)

    Source: QST (https://arxiv.org/abs/2401.07159), where gamma is a scalar that starts at 0; the
    authors' code has one gamma per channel that starts at 0.5.
    """

    def __init__(self, num_channels: int, initial_gamma: float) -> None:
        super().__init__()
        self.initial_gamma = float(initial_gamma)
        self.gamma = nn.Parameter(torch.empty(num_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma to its start."""
        nn.init.constant_(self.gamma, self.initial_gamma)

    def forward(self, new: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        """Mix two states ``[B, T, S]``, x and c, in the dtype of x."""
        beta = torch.sigmoid(self.gamma).to(new.dtype)
        return torch.lerp(new, carried.to(new.dtype), beta)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: the upsampler under a residual output mix."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def evenly_spaced_layers(num_blocks: int, num_layers: int) -> list[int]:
    """Choose the M of N backbone layers, counted from 0, with a side block: the last is among them.

    ValueError unless 1 <= M <= N.
    """
    if not 1 <= num_blocks <= num_layers:
        raise ValueError(
            f"num_side_blocks={num_blocks} must be from 1 to the backbone's {num_layers} layers"
        )
    return [k * num_layers // num_blocks - 1 for k in range(1, num_blocks + 1)]


class SideNetwork(nn.Module):
    r"""A small transformer that reads hidden states of a frozen one.

    .. math::
        g_0 = D_0(h_0), \qquad
        g_k = \mathrm{block}_k\big((1 - \beta_k)\,D_k(h_{l(k)}) + \beta_k\,g_{k-1}\big), \qquad
        y = \mathrm{mix}\big(f, U\,\mathrm{norm}(g_M)\big)

    where :math:`h_0` is the embedding, :math:`h_l` the output of backbone layer l, :math:`l(k)` the
    layer that block k reads, :math:`D_k` a downsampler, U the upsampler and f the backbone's last
    hidden state after its final norm.

    Source: QST (https://arxiv.org/abs/2401.07159), where every layer has a block: M = N, l(k) = k.
    With M instead of M + 1 downsamplers it is the authors' code, which uses the first one for the
    embedding and for layer 1 alike. Two deviations learn better (docs/results.md): fewer blocks
    than layers, as in ladder side tuning (https://arxiv.org/abs/2206.06522), since of many blocks
    only the last few count in :math:`g_M`; and ``normalize_hidden``, which divides each token's
    hidden state by its root mean square, since hidden states grow a hundredfold over the layers.

    The parameters may be wider than the hidden states (fp32 masters over a bf16 backbone); products
    are then computed in the backbone's dtype by autocast.

    It follows torchtune's adapter protocol: :meth:`adapter_params` names the trainable parameters,
    and ``disabled = True`` (``torchtune.modules.peft.disable_adapter``) gives the plain backbone.
    ``recompute = True`` saves only the inputs of a step, and runs its downsampler, gate and block
    again in backward.

    Args:
        backbone (Backbone): only its sizes are read; it is not stored.
        config (SideConfig): resolved.

    Attributes:
        layers (list[int]): for each block the index of the backbone layer that it reads, ascending.

    Raises:
        ValueError: if r or the number of blocks does not fit the backbone.
    """

    # Whether a batch may run some rows at a time: the same network reads them all.
    rows_are_alike = True

    def __init__(self, backbone: Backbone, config: SideConfig) -> None:
        super().__init__()
        chosen: Any = config  # resolved: no field is None
        width, count = backbone.width, chosen.num_side_blocks
        self.config = config
        self.layers = evenly_spaced_layers(count, backbone.num_layers)
        shape = backbone.side_shape(chosen.reduction_factor, chosen.min_head_dim)
        dim = shape.embed_dim
        self.downsample = nn.ModuleList(
            build_downsample(
                chosen.downsample,
                width,
                dim,
                rank=chosen.rank,
                activation=chosen.activation,
                norm=chosen.downsample_norm,
                hidden_bits=chosen.hidden_bits,
                dropout=chosen.dropout,
            )
            for _ in range(count if chosen.share_first_downsample else count + 1)
        )
        self.gates = nn.ModuleList(
            Gate(dim if chosen.gate_per_channel else 1, chosen.initial_gamma) for _ in range(count)
        )
        self.blocks = backbone.side_blocks(self.layers, shape)
        self.norm = backbone.side_norm(dim)
        self.upsample = (ZeroLinear if chosen.output_mix == "residual" else nn.Linear)(dim, width)
        self.output_mix = build_output_mix(
            chosen.output_mix, width if chosen.mix_per_channel else 1, chosen.initial_mix
        )
        self.disabled = False
        self.recompute = False

    def adapter_params(self) -> list[str]:
        """Names of the trainable parameters, relative to this module: all of them."""
        return [name for name, _ in self.named_parameters()]

    def materialize(self, device: torch.device) -> None:
        """Allocate and initialise, in place, a side network that was built on the meta device.

        ValueError if a module with parameters has no known initial value.
        """
        self.to_empty(device=device)
        with device:
            for module in self.modules():
                initializer = getattr(module, "reset_parameters", None)
                initializer = initializer or getattr(module, "rope_init", None)
                if initializer is not None:
                    initializer()
                elif isinstance(module, RMSNorm):  # has no reset_parameters
                    nn.init.ones_(module.scale)
                elif isinstance(module, GemmaRMSNorm):  # neither; it multiplies by 1 + scale
                    nn.init.zeros_(module.scale)
                elif list(module.parameters(recurse=False)):  # would stay uninitialised memory
                    raise ValueError(
                        f"{type(module).__name__} cannot be initialised in place: it has no "
                        "reset_parameters; build the model on its device instead of on meta"
                    )

    def start(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Compute :math:`g_0`, ``[B, T, S]``, from the embedding :math:`h_0`."""
        downsample = self._downsampler(0)
        return self._run(downsample.project, h_BTD, *self._read(downsample, h_BTD))

    def step(
        self,
        index: int,
        h_BTD: torch.Tensor,
        g_BTS: torch.Tensor,
        *,
        mask: Mask | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute :math:`g_k`, ``[B, T, S]``, from :math:`h_{l(k)}` and :math:`g_{k-1}`.

        ``index`` is k - 1; ``mask`` and ``input_pos`` are torchtune's.
        """
        downsample = self._downsampler(index if self.config.share_first_downsample else index + 1)
        gate, block = self.gates[index], self.blocks[index]

        def next_state(g_BTS: torch.Tensor, *saved: torch.Tensor) -> torch.Tensor:
            mixed_BTS = gate(downsample.project(*saved), g_BTS)
            out_BTS: torch.Tensor = block(mixed_BTS, mask=mask, input_pos=input_pos)
            return out_BTS

        return self._run(next_state, h_BTD, g_BTS, *self._read(downsample, h_BTD))

    def finish(self, f_BTD: torch.Tensor, g_BTS: torch.Tensor) -> torch.Tensor:
        """Compute y, the input of the LM head, ``[B, T, D]`` in the dtype of f."""
        with self._compute_in(f_BTD.dtype, f_BTD.device.type):
            upsampled_BTD = self.upsample(self.norm(g_BTS))
        mixed: torch.Tensor = self.output_mix(f_BTD, upsampled_BTD.to(f_BTD.dtype))
        return mixed

    def _read(self, downsample: Any, h_BTD: torch.Tensor) -> Saved:
        """What the downsampler must save of a hidden state."""
        if self.config.normalize_hidden:
            h_BTD = F.rms_norm(h_BTD, h_BTD.shape[-1:], eps=_NORM_EPS)
        saved: Saved = downsample.read(h_BTD)
        return saved

    def _downsampler(self, index: int) -> Any:
        """A :class:`~qst_tune.modules.side.downsample.Downsample`; ModuleList hides its methods."""
        return self.downsample[index]

    def _run(
        self, compute: Callable[..., torch.Tensor], h: torch.Tensor, *inputs: torch.Tensor
    ) -> torch.Tensor:
        """Compute in the dtype of ``h``, saving nothing but the inputs if ``recompute``."""
        # The closure lives until backward: one that held h itself would keep every hidden state.
        dtype, device_type = h.dtype, h.device.type

        def compute_in_dtype(*inputs: torch.Tensor) -> torch.Tensor:
            with self._compute_in(dtype, device_type):
                return compute(*inputs)

        if self.recompute and torch.is_grad_enabled():
            recomputed: torch.Tensor = checkpoint(compute_in_dtype, *inputs, use_reentrant=False)
            return recomputed
        return compute_in_dtype(*inputs)

    def _compute_in(self, dtype: torch.dtype, device_type: str) -> AbstractContextManager[None]:
        """Autocast to the backbone's dtype; nothing to do when the parameters have it already."""
        narrow = dtype in (torch.bfloat16, torch.float16)
        needed = narrow and self.gates[0].gamma.dtype != dtype
        return torch.autocast(device_type, dtype=dtype if narrow else None, enabled=needed)
