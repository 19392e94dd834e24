"""How the embedding and the LM head of a frozen backbone are stored."""

from collections.abc import Iterator
from typing import Literal, get_args

from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.modules.base_quantization import quantization_of
from qst_tune.quantization.table import QuantizedTable, quantize_table

EmbeddingQuantization = Literal["none", "int8"]


def quantize_embedding(
    decoder: TransformerDecoder, embedding_quantization: EmbeddingQuantization = "none"
) -> None:
    """Store, in place, the embedding and the LM head as codes; a tied head stays tied.

    The modules stay, and with them a scale of Gemma's embedding, positions or a soft cap: only
    their weight becomes a :class:`~qst_tune.quantization.table.QuantizedTable` with a scale a
    token. "none" changes nothing. ValueError as of :func:`check_table_format`.
    """
    if embedding_quantization == "none":
        return
    check_table_format(embedding_quantization, decoder.tok_embeddings)
    for owner in _owners(decoder):
        table = quantize_table(owner.weight)
        owner.weight = nn.Parameter(table, requires_grad=False)


def check_table_format(embedding_quantization: EmbeddingQuantization, embedding: nn.Module) -> None:
    """Check the arguments: ValueError if the format is unknown or this is no ``nn.Embedding``."""
    if embedding_quantization not in get_args(EmbeddingQuantization):
        known = ", ".join(get_args(EmbeddingQuantization))
        raise ValueError(
            f"embedding_quantization={embedding_quantization!r} is unknown; choose one of {known}"
        )
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"embedding_quantization takes an nn.Embedding, not {type(embedding).__name__}"
        )


def _owners(decoder: TransformerDecoder) -> Iterator[nn.Embedding | nn.Linear]:
    """The modules with a weight that has a row for each token."""
    embedding: nn.Embedding = decoder.tok_embeddings
    yield embedding
    # A tied head has no weight of its own: it reads the embedding's at each call.
    head = decoder.output.modules() if isinstance(decoder.output, nn.Module) else ()
    for module in head:
        if isinstance(module, nn.Linear) and module.out_features == embedding.num_embeddings:
            yield module


def quantization_of_backbone(decoder: TransformerDecoder) -> str:
    """Name how a backbone is stored, which a side network or scales that were tuned on it need.

    It is the layers' ``quantization_of``, with "; embedding int8" behind it if that is quantised.
    """
    layers = quantization_of(decoder.layers)
    weight = decoder.tok_embeddings.weight
    return f"{layers}; embedding int8" if isinstance(weight, QuantizedTable) else layers
