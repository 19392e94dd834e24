"""OPT's weights under Hugging Face's names and under torchtune's.

Nothing but names changes: OPT has no rotary embedding, so no row is permuted.
"""

import re

import torch
from torchtune.models.convert_weights import get_mapped_key

Weights = dict[str, torch.Tensor]

# Hugging Face's name of a module -> ours; ``{}`` stands for the number of a layer.
_MODULES = {
    "embed_tokens": "tok_embeddings",
    "embed_positions": "tok_embeddings.positions",
    "project_in": "tok_embeddings.project_in",
    "project_out": "output.project_out",
    "final_layer_norm": "norm",
    "layers.{}.self_attn.q_proj": "layers.{}.attn.q_proj",
    "layers.{}.self_attn.k_proj": "layers.{}.attn.k_proj",
    "layers.{}.self_attn.v_proj": "layers.{}.attn.v_proj",
    "layers.{}.self_attn.out_proj": "layers.{}.attn.output_proj",
    "layers.{}.self_attn_layer_norm": "layers.{}.sa_norm",
    "layers.{}.fc1": "layers.{}.mlp.w1",
    "layers.{}.fc2": "layers.{}.mlp.w2",
    "layers.{}.final_layer_norm": "layers.{}.mlp_norm",
}
_FROM_HF = {
    f"{theirs}.{leaf}": f"{ours}.{leaf}"
    for theirs, ours in _MODULES.items()
    for leaf in ("weight", "bias")
}
_TO_HF = {ours: theirs for theirs, ours in _FROM_HF.items()}


def opt_hf_to_tune(weights: Weights, *, keep_head: bool = False) -> Weights:
    """Rename weights of transformers' ``OPTForCausalLM`` or ``OPTModel``, any subset of them.

    Args:
        weights (Weights): under Hugging Face's names. Published files have ``model.decoder.`` or
            ``decoder.`` before them.
        keep_head (bool): keep a head that is stored, though it is tied to the embedding.

    Returns:
        Weights: the same tensors under the names of :func:`qst_tune.models.opt`.

    Raises:
        Exception: torchtune's own, if a name is not OPT's.
    """
    names = {**_FROM_HF, "lm_head.weight": "output.weight"}
    return {
        get_mapped_key(re.sub(r"^(model\.)?decoder\.", "", name), names): weight
        for name, weight in weights.items()
        if keep_head or name != "lm_head.weight"
    }


def opt_tune_to_hf(weights: Weights) -> Weights:
    """Rename weights the other way, any subset of them; the inverse of :func:`opt_hf_to_tune`.

    Args:
        weights (Weights): under the names of :func:`qst_tune.models.opt`.

    Returns:
        Weights: the same tensors under the names of transformers' ``OPTForCausalLM``, without its
        tied ``lm_head.weight``.

    Raises:
        Exception: torchtune's own, if a name is not that of an OPT of ours.
    """
    return {
        f"model.decoder.{get_mapped_key(name, _TO_HF)}": weight for name, weight in weights.items()
    }
