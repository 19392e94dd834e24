"""The QST model over a torchtune decoder."""

from collections.abc import Iterable
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from qst_tune.modules.backbone import head_output
from qst_tune.modules.batch_parts import CHUNK_TOKENS
from qst_tune.modules.fused_layers import fuse_torchtune
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.modules.torchtune_backbone import TorchtuneBackbone, decoder_parts
from qst_tune.torchtune_compat import Mask, check_inputs


class QSTDecoder(QSTModel, TransformerDecoder):
    """Quantized Side Tuning over any torchtune decoder.

    The backbone's ``tok_embeddings``, ``layers``, ``norm`` and ``output`` keep torchtune's names,
    are taken over (not copied) and frozen; ``side`` is added. So a stock checkpoint loads with
    exactly the ``side.`` keys missing, and torchtune's generation and chunked output work.
    """

    def __init__(self, backbone: TransformerDecoder, side: SideNetwork) -> None:
        TransformerDecoder.__init__(self, **decoder_parts(backbone))
        self.frozen_chunk_tokens = CHUNK_TOKENS
        self.adopt(side)
        parts: list[Any] = [self.layers, self.norm]
        for part in parts:
            fuse_torchtune(part)

    @property
    def backbone(self) -> TorchtuneBackbone:
        """The frozen decoder: this module's own parts, without the side network."""
        return TorchtuneBackbone(self, self.frozen_chunk_tokens)

    def caches_are_enabled(self) -> bool:
        """Whether keys and values are cached, in torchtune's way."""
        return bool(TransformerDecoder.caches_are_enabled(self))

    def setup_caches(
        self,
        batch_size: int,
        dtype: torch.dtype,
        *,
        encoder_max_seq_len: int | None = None,
        decoder_max_seq_len: int | None = None,
    ) -> None:
        """Set up key-value caches of both networks; arguments as torchtune's."""
        super().setup_caches(batch_size, dtype, decoder_max_seq_len=decoder_max_seq_len)
        for block in self._side_blocks():
            block.setup_caches(
                batch_size,
                dtype,
                encoder_max_seq_len=encoder_max_seq_len,
                decoder_max_seq_len=self.decoder_max_cache_seq_len,
            )

    def reset_caches(self) -> None:
        """Empty the key-value caches of both networks; RuntimeError if there are none."""
        super().reset_caches()
        for block in self._side_blocks():
            block.reset_cache()

    def _side_blocks(self) -> Iterable[Any]:
        """The side blocks, typed as torchtune's layers; ``nn.Module`` hides their methods."""
        return self.side.blocks

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: Mask | None = None,
        encoder_input: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute :func:`~.backbone.head_output`; arguments as those of torchtune's decoder.

        The mask serves both networks. ``encoder_input`` and ``encoder_mask`` must be None.
        """
        check_inputs(
            self,
            tokens,
            mask=mask,
            encoder_input=encoder_input,
            encoder_mask=encoder_mask,
            input_pos=input_pos,
        )
        (y_BTD,) = self._head_inputs([self.side], tokens, mask=mask, input_pos=input_pos)
        return head_output(self, y_BTD)
