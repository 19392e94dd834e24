"""The PEQA model: a decoder with integer weights of which the scales train."""

from typing import Any

import torch
from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.modules.decoder_parts import decoder_parts
from qst_tune.modules.learned_positions import LearnedPositionDecoder, LearnedPositionEmbedding
from qst_tune.modules.peqa_linear import PEQALinear


class PEQADecoder(TransformerDecoder):
    """A torchtune decoder whose linears are :class:`~qst_tune.modules.peqa_linear.PEQALinear`.

    It computes what the backbone's decoder does and keeps its names. Beyond that it can leave out
    the LM head for a loss that applies the head itself, and it knows its task: the set of trained
    tensors, which can be exchanged in a loaded model while the codes stay.

    Source: PEQA (https://arxiv.org/abs/2305.14152). Embedding, norms and LM head do not train.

    Args:
        backbone (TransformerDecoder): with integer linears; its modules are taken over, not copied,
            and frozen but for the scales.

    Raises:
        ValueError: if it has no integer linear.
    """

    def __init__(self, backbone: TransformerDecoder) -> None:
        super().__init__(**decoder_parts(backbone))
        linears = [module for module in self.modules() if isinstance(module, PEQALinear)]
        if not linears:
            raise ValueError("a PEQA model needs at least one integer linear: use peqa_decoder")
        self.requires_grad_(False)
        for linear in linears:
            for name in linear.adapter_params():
                linear.get_parameter(name).requires_grad_(True)
        self.skip_output_layer = False

    def task(self) -> dict[str, nn.Parameter]:
        """What trains: the scales, and the zero points if they train too.

        Returns:
            dict[str, nn.Parameter]: the model's own parameters, by the names of its state dict,
                which stay the same when layers are wrapped for recomputation.
        """
        state = self.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if value.requires_grad}

    @torch.no_grad()
    def load_task(self, task: dict[str, torch.Tensor]) -> None:
        """Exchange what trains, in place; codes and everything else that is frozen stay.

        Args:
            task (dict[str, torch.Tensor]): from :meth:`task` of a model with the same codes.

        Raises:
            ValueError: if names or shapes differ from this model's.
        """
        own = self.task()
        if {n: t.shape for n, t in task.items()} != {n: t.shape for n, t in own.items()}:
            raise ValueError("the task's tensors are not those that train in this model")
        for name, parameter in own.items():
            parameter.copy_(task[name])

    def forward(self, tokens: torch.Tensor, **where: Any) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits; arguments and result as torchtune's ``TransformerDecoder.forward``.

        Args:
            tokens (torch.Tensor): ``[B, T]`` token ids.
            **where (Any): ``mask`` and ``input_pos``; a learned embedding of positions, as OPT's,
                reads them too.

        Returns:
            torch.Tensor | list[torch.Tensor]: as :meth:`unembed` of the last hidden state.
        """
        learned = isinstance(self.tok_embeddings, LearnedPositionEmbedding)
        compute: Any = LearnedPositionDecoder.forward if learned else TransformerDecoder.forward
        logits: torch.Tensor | list[torch.Tensor] = compute(self, tokens, **where)
        return logits

    def unembed(self, h: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Turn the last hidden state into logits, or into the LM head's input.

        Args:
            h (torch.Tensor): ``[B, T, D]``.

        Returns:
            torch.Tensor | list[torch.Tensor]: as torchtune's decoder; the head's input
            ``[B, T, D]`` if ``skip_output_layer``.
        """
        if self.skip_output_layer:
            head_input: torch.Tensor = self.norm(h)
            return head_input
        output: torch.Tensor | list[torch.Tensor] = super().unembed(h)
        return output
