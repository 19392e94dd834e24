"""torchtune's LoRA, QLoRA and full fine-tuning over the backbone of any QST model."""

from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear

from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.quantization.nf4 import quantize_nf4


def plain_backbone(model: QSTDecoder) -> TransformerDecoder:
    """Take the backbone out of a QST model.

    Args:
        model (QSTDecoder): built with ``quantize_base=False``; its modules are taken over.

    Returns:
        TransformerDecoder: torchtune's own, in training mode, all parameters trainable.
    """
    backbone = TransformerDecoder(
        tok_embeddings=model.tok_embeddings,
        layers=model.layers,
        max_seq_len=model.max_seq_len,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        norm=model.norm,
        output=model.output,
    )
    backbone.requires_grad_(True)
    backbone.train()
    return backbone


def add_lora(backbone: TransformerDecoder, *, rank: int, quantize: bool) -> None:
    """Put torchtune's ``LoRALinear`` in place of every linear of every layer.

    The result is that of torchtune's LoRA builders with all attention and MLP modules, which exist
    for some families only; alpha is twice the rank and there is no dropout, as in its configs.

    Args:
        backbone (TransformerDecoder): on the meta device; changed in place.
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
