"""What is measured: LLaMA-2-7B's shape, or a tiny one that only shows that everything runs."""

from dataclasses import dataclass

from benchmarks.backbones import BACKBONES, Backbone

Shape = tuple[int, int]  # rows, tokens a row

LLAMA2_7B = Backbone(
    num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=32, intermediate_dim=11_008,
    max_seq_len=65_536,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of every section; the first of a list is measured first."""

    backbone: Backbone
    shapes: tuple[Shape, ...]
    dial_shapes: tuple[Shape, ...]
    long_rows: tuple[int, ...]
    weight_shape: tuple[int, int]
    product_tokens: tuple[int, ...]
    loss_tokens: int
    vocabularies: tuple[int, ...]
    decoded_rows: tuple[int, ...]
    prompt_tokens: int
    largest_product: int
    is_tiny: bool = False


FULL = Sizes(
    backbone=LLAMA2_7B,
    shapes=((16, 2048), (4, 384), (4, 2048), (16, 384)),
    dial_shapes=((4, 384), (4, 2048), (16, 2048)),
    long_rows=(32_768, 8192, 65_536),
    weight_shape=(11_008, 4096),
    product_tokens=(1, 8, 16, 1536),
    loss_tokens=8192,
    vocabularies=(32_000, 128_256),
    decoded_rows=(1, 8),
    prompt_tokens=128,
    largest_product=8192,
)
TINY = Sizes(
    backbone=BACKBONES["tiny"],
    shapes=((2, 64),),
    dial_shapes=((2, 64),),
    long_rows=(128,),
    weight_shape=(256, 192),
    product_tokens=(1, 8),
    loss_tokens=128,
    vocabularies=(512,),
    decoded_rows=(1, 2),
    prompt_tokens=32,
    largest_product=128,
    is_tiny=True,
)
