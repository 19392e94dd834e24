"""PEQA models: integer weights of which the scales train, over any decoder and over torchtune's."""

from typing import Any

import torch
from torch import nn
from torchtune import training
from torchtune.modules import TransformerDecoder

from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.modules.torchtune_backbone import decoder_parts

# What recomputation by torchtune puts into the names of modules.
_WRAPPED = "_checkpoint_wrapped_module."


class PEQAModel(nn.Module):
    """A decoder with integer linears whose task is the trainable tensors.

    They can be exchanged in a loaded model while the codes stay. Embedding, norms, routers and LM
    head do not train. Source: PEQA (https://arxiv.org/abs/2305.14152). :class:`PEQADecoder`
    (torchtune) and :class:`~qst_tune.backbone.transformers_models.PEQATransformer` (transformers)
    share it. With ``skip_output_layer`` it returns the LM head's input.
    """

    skip_output_layer: bool
    # torchtune's names: the LM head, the embedding, the layers and the longest sequence.
    output: Any
    tok_embeddings: Any
    layers: Any
    max_seq_len: Any

    def adopt(self) -> None:
        """Freeze everything except the scales; ValueError if there is no integer linear."""
        if not self.task():
            raise ValueError("a PEQA model needs at least one integer linear: use peqa_decoder")
        self.train_scales()
        self.skip_output_layer = False

    def train_scales(self) -> None:
        """Let the task require gradients, and nothing else."""
        self.requires_grad_(False)
        for parameter in self.task().values():
            parameter.requires_grad_(True)

    def recompute_layers(self) -> None:
        """Recompute each layer in backward instead of saving its activations."""
        policy = {type(layer) for layer in self.layers}
        training.set_activation_checkpointing(self, auto_wrap_policy=policy)

    def task(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters, scales and perhaps zero points, by unwrapped names."""
        return scales_of(self)

    @torch.no_grad()
    def load_task(self, task: dict[str, torch.Tensor]) -> None:
        """Replace the trainable values, in place, by :meth:`task` of a model with the same codes.

        ValueError if names or shapes differ from this model's.
        """
        own = self.task()
        if {n: t.shape for n, t in task.items()} != {n: t.shape for n, t in own.items()}:
            raise ValueError("the task's tensors are not those that train in this model")
        for name, parameter in own.items():
            parameter.copy_(task[name])


def named_integers(module: nn.Module) -> dict[str, PEQALinear]:
    """List the integer linears below a module by name, without wrappers of recomputation."""
    named = module.named_modules()
    return {without_wrappers(name): m for name, m in named if isinstance(m, PEQALinear)}


def without_wrappers(name: str) -> str:
    """Name a module as if no layer was wrapped for recomputation."""
    return name.replace(_WRAPPED, "")


def scales_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """List the trainable parameters of the integer linears below a module."""
    return {
        f"{name}.{leaf}": linear.get_parameter(leaf)
        for name, linear in named_integers(module).items()
        for leaf in linear.adapter_params()
    }


class PEQADecoder(PEQAModel, TransformerDecoder):
    """A torchtune decoder with :class:`~qst_tune.modules.peqa_linear.PEQALinear` layers.

    It keeps the names of the backbone, whose modules are taken over. ValueError if it has no
    integer linear.
    """

    norm: Any

    def __init__(self, backbone: TransformerDecoder) -> None:
        TransformerDecoder.__init__(self, **decoder_parts(backbone))
        self.adopt()

    def unembed(self, h: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Turn the last hidden state, ``[B, T, D]``, into logits or the head's input."""
        if self.skip_output_layer:
            head_input: torch.Tensor = self.norm(h)
            return head_input
        output: torch.Tensor | list[torch.Tensor] = super().unembed(h)
        return output
