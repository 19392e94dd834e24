"""QST as the authors' code computes it, transcribed literally; no qst_tune and no torchtune here.

Source: github.com/YouAreSpecialToMe/QST at 27cef0a (Apache-2.0), modeling_llama_qst.py lines
1006-1117 and 1469-1479, and modeling_opt_qst.py lines 1072-1227 and 1819-1824, restated as
equations. Tensors carry Hugging Face names; rotary embeddings are the half-split ones of
transformers. Every variant of ours is this one with other choices.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "identity": lambda x: x}


@dataclass
class Shape:
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5


def rms_norm(x, weight, eps):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x, positions, base):
    """x: [batch, heads, tokens, head_dim]; positions: [batch, tokens]."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(w: Weights, prefix, x, mask, positions, shape: Shape):
    batch, tokens, _ = x.shape
    q = (x @ w[prefix + "q_proj.weight"].T).view(batch, tokens, shape.num_heads, -1).transpose(1, 2)
    k = (x @ w[prefix + "k_proj.weight"].T).view(batch, tokens, shape.num_kv_heads, -1)
    v = (x @ w[prefix + "v_proj.weight"].T).view(batch, tokens, shape.num_kv_heads, -1)
    repeat = shape.num_heads // shape.num_kv_heads
    k = k.transpose(1, 2).repeat_interleave(repeat, dim=1)
    v = v.transpose(1, 2).repeat_interleave(repeat, dim=1)
    q, k = rotate(q, positions, shape.rope_base), rotate(k, positions, shape.rope_base)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)
    return out @ w[prefix + "o_proj.weight"].T


def decoder_layer(w: Weights, prefix, x, mask, positions, shape: Shape):
    normed = rms_norm(x, w[prefix + "input_layernorm.weight"], shape.norm_eps)
    x = x + attention(w, prefix + "self_attn.", normed, mask, positions, shape)
    normed = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], shape.norm_eps)
    gated = F.silu(normed @ w[prefix + "mlp.gate_proj.weight"].T)
    up = normed @ w[prefix + "mlp.up_proj.weight"].T
    return x + (gated * up) @ w[prefix + "mlp.down_proj.weight"].T


@dataclass
class Choices:
    """What a variant chooses; as it stands, the authors' code."""

    downsample: str = "adapter"
    activation: str = "silu"
    shared_first: bool = True  # D_0 reads the embedding and also what block 1 reads
    output_mix: str = "sigmoid"
    normalize_hidden: bool = False  # D_k reads h / rms(h)


def layer_norm(w: Weights, prefix, x):
    if prefix + "weight" not in w:
        return x
    return F.layer_norm(x, x.shape[-1:], w[prefix + "weight"], w[prefix + "bias"], 1e-5)


def pool(x, width, statistic):
    in_dim = x.shape[-1]
    windows = [slice(j * in_dim // width, -((-(j + 1) * in_dim) // width)) for j in range(width)]
    return torch.stack([statistic(x[..., window], dim=-1) for window in windows], dim=-1)


def downsample(w: Weights, prefix, x, choices: Choices):
    """AdapterLinear of QSTConfig.py, and the paper's other kinds of section 3.2."""
    width = w["upsample.weight"].shape[1]
    if choices.downsample == "maxpool":
        return pool(x, width, torch.amax)
    if choices.downsample == "avgpool":
        return pool(x, width, torch.mean)
    y = layer_norm(w, prefix + "pre_layer_norm.", x) @ w[prefix + "adapter_A.weight"].T
    if choices.downsample == "adapter":
        y = ACTIVATIONS[choices.activation](y)
    if choices.downsample != "linear":
        y = y @ w[prefix + "adapter_B.weight"].T
    return layer_norm(w, prefix + "post_layer_norm.", y)


def readable(h, choices: Choices):
    return rms_norm(h, torch.ones_like(h[0, 0]), 1e-6) if choices.normalize_hidden else h


def causal_mask(batch, tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, tokens, tokens)


def forward(
    backbone: Weights,
    side: Weights,
    ids: torch.Tensor,
    shape: Shape,
    side_shape: Shape,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    choices: Choices | None = None,
) -> Weights:
    """Every intermediate tensor by name; ``side`` uses the names of golden/llama/side.safetensors.

    A downsampler of its own for the embedding is the paper's reading; the authors' code has the
    first one serve the embedding and layer 1.
    """
    choices = choices or Choices()
    batch, tokens = ids.shape
    mask = causal_mask(batch, tokens) if mask is None else mask
    positions = torch.arange(tokens).expand(batch, tokens) if positions is None else positions
    n, m = shape.num_layers, side_shape.num_layers
    beside = [(k + 1) * n // m - 1 for k in range(m)]  # evenly spaced, the last layer among them
    offset = 0 if choices.shared_first else 1
    with torch.no_grad():
        h = backbone["model.embed_tokens.weight"][ids]
    out: Weights = {"backbone_hidden.0": h}
    g = downsample(side, "model.downsample.0.", readable(h, choices), choices)
    out["side_hidden.0"] = g
    for i in range(n):
        with torch.no_grad():
            h = decoder_layer(backbone, f"model.layers.{i}.", h, mask, positions, shape)
        out[f"backbone_hidden.{i + 1}"] = h
        if i not in beside:
            continue
        k = beside.index(i)
        beta = torch.sigmoid(side[f"model.z.{k}"])
        new = downsample(side, f"model.downsample.{k + offset}.", readable(h, choices), choices)
        mixed = (1 - beta) * new + beta * g
        g = decoder_layer(side, f"model.qst_layers.{k}.", mixed, mask, positions, side_shape)
        out |= {f"side_gated.{k}": mixed, f"side_hidden.{k + 1}": g}
    with torch.no_grad():
        f = rms_norm(h, backbone["model.norm.weight"], shape.norm_eps)
    out["backbone_last"] = f
    out["side_last"] = rms_norm(g, side["model.norm_qst.weight"], side_shape.norm_eps)
    u = out["side_last"] @ side["upsample.weight"].T + side["upsample.bias"]
    out["upsampled"] = u
    if choices.output_mix == "residual":
        y = f + u
    else:
        logit = side["lm_head_z"]
        alpha = torch.sigmoid(logit) if choices.output_mix == "sigmoid" else logit
        y = (1 - alpha) * u + alpha * f
    out["mixed"] = y
    out["logits"] = y @ backbone["lm_head.weight"].T
    return out


# OPT: learned positions, LayerNorm, biases everywhere, ReLU, and the output gate's sides swapped.


def linear(w: Weights, prefix, x):
    return x @ w[prefix + "weight"].T + w[prefix + "bias"]


def opt_attention(w: Weights, prefix, x, mask, num_heads):
    batch, tokens, width = x.shape

    def heads(name):
        return linear(w, f"{prefix}{name}_proj.", x).view(batch, tokens, num_heads, -1)

    q, k, v = (heads(name).transpose(1, 2) for name in "qkv")
    scores = q @ k.transpose(-1, -2) / (width // num_heads) ** 0.5
    # The authors add the smallest float where we have -inf; only rows of padding can tell.
    scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, -1)
    return linear(w, prefix + "out_proj.", out)


def opt_decoder_layer(w: Weights, prefix, x, mask, num_heads):
    normed = layer_norm(w, prefix + "self_attn_layer_norm.", x)
    x = x + opt_attention(w, prefix + "self_attn.", normed, mask, num_heads)
    normed = layer_norm(w, prefix + "final_layer_norm.", x)
    return x + linear(w, prefix + "fc2.", torch.relu(linear(w, prefix + "fc1.", normed)))


def opt_forward(
    backbone: Weights,
    side: Weights,
    ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_layers: int,
    num_heads: int,
) -> Weights:
    """Every intermediate tensor by name; ``attention_mask`` is ``[batch, tokens]``, 0 for padding.

    Dropout is left out: the authors' is active in training only, and there in the frozen backbone
    too.
    """
    prefix = "model.decoder."
    mask = causal_mask(*ids.shape) & attention_mask[:, None, :].bool()
    positions = attention_mask.cumsum(1) * attention_mask - 1
    out: Weights = {}
    with torch.no_grad():
        h = backbone[prefix + "embed_tokens.weight"][ids]
        h = h + backbone[prefix + "embed_positions.weight"][positions + 2]
    out["backbone_hidden.0"] = h
    g = downsample(side, prefix + "downsample.0.", h, Choices())
    out["side_hidden.0"] = g
    for i in range(num_layers):
        with torch.no_grad():
            h = opt_decoder_layer(backbone, f"{prefix}layers.{i}.", h, mask, num_heads)
        beta = torch.sigmoid(side[f"{prefix}z.{i}"])
        m = (1 - beta) * downsample(side, f"{prefix}downsample.{i}.", h, Choices()) + beta * g
        g = opt_decoder_layer(side, f"{prefix}qst_layers.{i}.", m, mask, num_heads)
        out[f"backbone_hidden.{i + 1}"] = h
        out[f"side_gated.{i}"] = m
        out[f"side_hidden.{i + 1}"] = g
    with torch.no_grad():
        f = layer_norm(backbone, prefix + "final_layer_norm.", h)
    out["backbone_last"] = f
    out["side_last"] = layer_norm(side, prefix + "final_layer_norm_qst.", g)
    out["upsampled"] = linear(side, "upsample.", out["side_last"])
    alpha = torch.sigmoid(side["lm_head_z"])
    out["mixed"] = alpha * out["upsampled"] + (1 - alpha) * f
    out["logits"] = out["mixed"] @ backbone[prefix + "embed_tokens.weight"].T
    return out


# Sequence classification: modeling_llama_qst.py 1783 and below, modeling_opt_qst.py 2123 and below.
# It mixes as the language model does, with ``score_z`` in the place of ``lm_head_z``. Logits are
# [batch, labels]; the names of ``side`` are those of their parameters.


def llama_classifier(backbone, side, ids, shape, side_shape, pad_id, mask=None):
    """Positions are indices whatever the padding, as in their forward."""
    state = {**side, "lm_head_z": side["score_z"]}
    mixed = forward(backbone, state, ids, shape, side_shape, mask)["mixed"]
    return classify(mixed, side["score.weight"], ids, pad_id)


def opt_classifier(backbone, side, ids, attention_mask, num_layers, num_heads, pad_id):
    state = {**side, "lm_head_z": side["score_z"]}
    mixed = opt_forward(backbone, state, ids, attention_mask, num_layers, num_heads)["mixed"]
    return classify(mixed, side["score.weight"], ids, pad_id, "opt")


def classify(mixed, score, ids, pad_id, family="llama"):
    logits = mixed @ score.T
    if family == "llama":
        lengths = (ids == pad_id).int().argmax(-1) - 1
    else:
        lengths = (ids != pad_id).sum(-1) - 1
    return logits[torch.arange(len(ids)), lengths]


def classification_loss(logits, labels):
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(), labels.squeeze())
    return F.cross_entropy(logits, labels)
