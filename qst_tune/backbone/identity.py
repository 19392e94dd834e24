"""Which frozen backbone a result belongs to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BackboneId:
    """What a result was trained on.

    Args:
        name (str): the model's hub name, or the name of its directory.
        fingerprint (str): of its weights, from ``load_backbone``.
        quantization (str): how it is stored, from ``quantization_of_backbone``: "nf4", "none",
            "int4, groups of 64, rtn", "nf4; embedding int8" and the like.
        revision (str): commit of a hub name; "" for a directory.
        library (str): whose modules computed the hidden states, "torchtune" or "transformers".
    """

    name: str
    fingerprint: str
    quantization: str
    revision: str = ""
    library: str = "torchtune"
