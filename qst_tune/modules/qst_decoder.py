"""The QST model over a torchtune decoder."""

from collections.abc import Iterable
from typing import Any

import torch
from torchtune.modules import TransformerDecoder
from torchtune.modules.attention_utils import _MaskType

from qst_tune.modules.backbone import head_output
from qst_tune.modules.decoder_parts import decoder_parts
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side_network import SideNetwork
from qst_tune.modules.torchtune_backbone import CHUNK_TOKENS, TorchtuneBackbone


class QSTDecoder(QSTModel, TransformerDecoder):
    """Quantized Side Tuning over any torchtune decoder.

    The backbone's ``tok_embeddings``, ``layers``, ``norm`` and ``output`` keep torchtune's names
    and are frozen; ``side`` is added. So a stock checkpoint loads with exactly the ``side.`` keys
    missing, and torchtune's generation and chunked output see the model they know.

    A batch of more than ``frozen_chunk_tokens`` tokens goes through each frozen layer in parts,
    which bounds the memory of its intermediates.

    Source: QST (https://arxiv.org/abs/2401.07159); equations in
    :class:`~qst_tune.modules.side_network.SideNetwork`.

    Args:
        backbone (TransformerDecoder): its modules are taken over (not copied) and frozen.
        side (SideNetwork): its blocks belong to layers of the backbone.

    Raises:
        ValueError: if a side block belongs to a layer that is not there.
    """

    def __init__(self, backbone: TransformerDecoder, side: SideNetwork) -> None:
        TransformerDecoder.__init__(self, **decoder_parts(backbone))
        self.frozen_chunk_tokens = CHUNK_TOKENS
        self.adopt(side)

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
        """Set up key-value caches of the backbone and of the side network.

        Args:
            batch_size (int): number of sequences.
            dtype (torch.dtype): dtype of the caches.
            encoder_max_seq_len (int | None): ignored by decoder-only models.
            decoder_max_seq_len (int | None): length of the caches; default ``max_seq_len``.
        """
        super().setup_caches(batch_size, dtype, decoder_max_seq_len=decoder_max_seq_len)
        for block in self._side_blocks():
            block.setup_caches(
                batch_size,
                dtype,
                encoder_max_seq_len=encoder_max_seq_len,
                decoder_max_seq_len=self.decoder_max_cache_seq_len,
            )

    def reset_caches(self) -> None:
        """Empty the key-value caches of both networks.

        Raises:
            RuntimeError: if no caches are set up.
        """
        super().reset_caches()
        for block in self._side_blocks():
            block.reset_cache()

    def _side_blocks(self) -> Iterable[Any]:
        """The side blocks as the torchtune layers they are; ``nn.Module`` hides their methods."""
        return self.side.blocks

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        mask: _MaskType | None = None,
        encoder_input: torch.Tensor | None = None,
        encoder_mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits; arguments and result as torchtune's ``TransformerDecoder.forward``.

        Args:
            tokens (torch.Tensor): ``[B, T]`` token ids.
            mask (_MaskType | None): ``[B, T, T]`` booleans, True where a row may attend; default
                causal. Used by both networks.
            encoder_input (torch.Tensor | None): not supported, must be None.
            encoder_mask (torch.Tensor | None): not supported, must be None.
            input_pos (torch.Tensor | None): ``[B, T]`` positions, for packed or padded sequences.

        Returns:
            torch.Tensor | list[torch.Tensor]: fp32 logits ``[B, T, V]``; chunks of logits after
            ``set_num_output_chunks``; the head's input ``[B, T, D]`` if ``skip_output_layer``.
        """
        decoder: Any = self
        decoder._validate_inputs(
            tokens.shape[1],
            mask=mask,
            encoder_input=encoder_input,
            encoder_mask=encoder_mask,
            input_pos=input_pos,
        )
        y_BTD, _ = self._both(tokens, mask=mask, input_pos=input_pos)
        return head_output(self, y_BTD)
