"""The side network of QST: all trainable parameters.

Notation: B batch, T tokens, D width of the backbone, S = D / r width of the side network, N layers
of the backbone, M blocks of the side network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qst_tune.modules.backbone import Backbone
from qst_tune.modules.lora import LastLayersLoRA
from qst_tune.modules.lora_targets import chosen_linears
from qst_tune.modules.side.compute import compute_like, normalized
from qst_tune.modules.side.config import SideConfig
from qst_tune.modules.side.downsample import Saved, build_downsample
from qst_tune.modules.side.gate import Gate
from qst_tune.modules.side.output_mix import build_output_mix
from qst_tune.torchtune_compat import Mask


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero: the upsampler under a residual output mix."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def _build_lora(backbone: Backbone, config: SideConfig) -> LastLayersLoRA | None:
    count, total = config.lora_layers, backbone.num_layers
    if count > total:
        raise ValueError(f"lora_layers={count} must be at most the backbone's {total} layers")
    if not count:
        return None
    if config.lora_rank > backbone.width:
        raise ValueError(
            f"lora_rank={config.lora_rank} must be at most the backbone's width {backbone.width}"
        )
    layers = {
        index: chosen_linears(
            backbone.linear_sizes(index), config.lora_attn_modules, mlp=config.apply_lora_to_mlp
        )
        for index in range(total - count, total)
    }
    if not any(layers.values()):
        raise ValueError(
            f"lora_layers={count} finds no linear of lora_attn_modules or of the MLP in the last "
            "layers of this backbone; set lora_layers=0"
        )
    return LastLayersLoRA(
        layers, rank=config.lora_rank, scale=config.lora_scale, dropout=config.lora_dropout
    )


def evenly_spaced_layers(num_blocks: int, num_layers: int) -> list[int]:
    """Choose the M of N backbone layers, counted from 0, with a side block: the last is among them.

    ValueError unless 0 <= M <= N.
    """
    if not 0 <= num_blocks <= num_layers:
        raise ValueError(
            f"num_side_blocks={num_blocks} must be from 0 to the backbone's {num_layers} layers"
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

    ``backbone`` gives sizes and is not stored; ``config`` is resolved. ``layers`` are the indices
    of the backbone layers that the blocks read. ``recompute = True`` saves only the inputs of a
    step; ``disabled = True`` (torchtune's ``disable_adapter``) gives the plain backbone. ValueError
    if r or the number of blocks or of ``lora_layers`` does not fit the backbone.

    With ``lora_layers`` the network has :class:`~qst_tune.modules.lora.LastLayersLoRA` too, which
    changes the :math:`h_l` of the last layers; no gradient of g goes there. Without any block (M =
    0) that is all, and y = f.
    """

    # Whether a batch may run some rows at a time: the same network reads them all.
    rows_are_alike = True

    def __init__(self, backbone: Backbone, config: SideConfig) -> None:
        super().__init__()
        chosen: Any = config  # resolved: no field is None
        width, count = backbone.width, chosen.num_side_blocks
        self.config = config
        self.layers = evenly_spaced_layers(count, backbone.num_layers)
        self.lora = _build_lora(backbone, config)
        self.disabled = False
        self._recompute = False
        if not count:
            self.blocks = nn.ModuleList()
            return
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

    @property
    def recompute(self) -> bool:
        """Whether backward computes again what a step, or a layer with LoRA, does not save."""
        return self._recompute

    @recompute.setter
    def recompute(self, on: bool) -> None:
        self._recompute = on
        if self.lora is not None:
            self.lora.recompute = on

    @contextmanager
    def saving_all(self) -> Iterator[None]:
        """Let steps in here save what backward needs; layers with LoRA do as they did."""
        before, self._recompute = self._recompute, False
        try:
            yield
        finally:
            self._recompute = before

    def adapter_params(self) -> list[str]:
        """Names of the trainable parameters, relative to this module: all of them."""
        return [name for name, _ in self.named_parameters()]

    def start(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Compute :math:`g_0 = D_0(h_0)`, ``[B, T, S]``, from the embedding."""
        downsample: Any = self.downsample[0]
        return self._compute(h_BTD, downsample.project, *self._read(downsample, h_BTD))

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
        gate, block = self.gates[index], self.blocks[index]
        downsample: Any = self.downsample[index + (not self.config.share_first_downsample)]

        def next_state(g_BTS: torch.Tensor, *read: torch.Tensor) -> torch.Tensor:
            mixed_BTS = gate(downsample.project(*read), g_BTS)
            out_BTS: torch.Tensor = block(mixed_BTS, mask=mask, input_pos=input_pos)
            return out_BTS

        return self._compute(h_BTD, next_state, g_BTS, *self._read(downsample, h_BTD))

    def finish(self, f_BTD: torch.Tensor, g_BTS: torch.Tensor) -> torch.Tensor:
        """Compute y, the LM head's input, ``[B, T, D]`` in the dtype of f; without blocks f."""
        if not self.layers:
            return f_BTD

        def upsampled(g_BTS: torch.Tensor) -> torch.Tensor:
            u_BTD: torch.Tensor = self.upsample(self.norm(g_BTS))
            return u_BTD

        u_BTD = compute_like(f_BTD, upsampled, g_BTS, parameters=self._dtype)
        y_BTD: torch.Tensor = self.output_mix(f_BTD, u_BTD.to(f_BTD.dtype))
        return y_BTD

    @property
    def _dtype(self) -> torch.dtype:
        return self.gates[0].get_parameter("gamma").dtype

    def _read(self, downsample: Any, h_BTD: torch.Tensor) -> Saved:
        """What backward needs of a hidden state."""
        if self.config.normalize_hidden:
            h_BTD = normalized(h_BTD)
        read: Saved = downsample.read(h_BTD)
        return read

    def _compute(self, h_BTD: torch.Tensor, equation: Any, *inputs: torch.Tensor) -> torch.Tensor:
        return compute_like(
            h_BTD, equation, *inputs, parameters=self._dtype, recompute=self.recompute
        )
