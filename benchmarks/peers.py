"""torchtune's LoRA, QLoRA and full fine-tuning over the backbone of any model of ours."""

import inspect

from omegaconf import DictConfig
from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear

from qst_tune.errors import UserError
from qst_tune.quantization.nf4 import quantize_nf4
from qst_tune.torchtune_compat import component_of


def plain_backbone(model_block: DictConfig) -> TransformerDecoder:
    """Build the backbone of a config's model alone, as torchtune's own builder makes it.

    Args:
        model_block (DictConfig): names a builder made by ``qst_builder`` or ``peqa_builder``.

    Returns:
        TransformerDecoder: on the default device, all parameters trainable.

    Raises:
        UserError: if the builder is another one.
    """
    builder = component_of(model_block._component_)
    if not hasattr(builder, "backbone_builder"):
        raise UserError(
            f"model: {model_block._component_} does not say what its backbone is; use one of "
            "qst_tune.models.qst_* or peqa_*, or make yours with qst_builder"
        )
    known = inspect.signature(builder.backbone_builder).parameters
    arguments = {str(key): value for key, value in model_block.items() if key in known}
    backbone: TransformerDecoder = builder.backbone_builder(**arguments)
    return backbone


def add_lora(backbone: TransformerDecoder, *, rank: int, quantize: bool) -> None:
    """Put torchtune's ``LoRALinear`` in place of every linear of every layer.

    The result is that of torchtune's LoRA builders with all attention and MLP modules, which exist
    for some families only; alpha is twice the rank and there is no dropout, as in its configs.

    Args:
        backbone (TransformerDecoder): changed in place; the weights of its linears are not kept.
        rank (int): of the adapters.
        quantize (bool): True for QLoRA: the frozen weights become NF4.
    """
    for layer in backbone.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, _lora_linear(child, rank=rank, quantize=quantize))


def _lora_linear(linear: nn.Linear, *, rank: int, quantize: bool) -> LoRALinear:
    has_bias = linear.bias is not None
    lora = LoRALinear(
        linear.in_features, linear.out_features, rank=rank, alpha=2.0 * rank, use_bias=has_bias
    )
    if quantize:
        # As with quantize_base=True, which takes 35 ms a layer on meta tensors, and fails for
        # widths that torchao's fixed block sizes do not divide (SmolLM2).
        lora.weight = nn.Parameter(quantize_nf4(lora.weight), requires_grad=False)
        lora._quantize_base = True
    return lora
