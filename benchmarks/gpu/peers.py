"""Methods of others: torchtune's QLoRA, and PEFT's over bitsandbytes, each as its users run it.

LoRA of rank 16 in every linear of every layer, activation checkpointing, AdamW. torchtune's recipe
does not clip, transformers' Trainer does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import AdamW
from torchtune import training
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from benchmarks.backbones import DTYPE, Backbone
from benchmarks.gpu.random_weights import RandomWeights
from benchmarks.gpu.trainer_step import trainer_step
from benchmarks.gpu.turns import Step
from benchmarks.methods import LORA_RANK, Trainee
from benchmarks.peers import add_lora

TORCHTUNE = "torchtune QLoRA, checkpointed"
TORCHTUNE_COMPILED = "torchtune QLoRA, checkpointed, compiled"
PEFT = "PEFT + bitsandbytes QLoRA, checkpointed"
PEFT_LIGER = "PEFT + bitsandbytes QLoRA, checkpointed, Liger"


def torchtune_qlora(backbone: Backbone, weights: RandomWeights, *, compiled: bool = False) -> Any:
    """Build the model of torchtune's recipe ``lora_finetune_single_device``."""
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model: Any = llama3_2(**backbone.builder_arguments())
        add_lora(model, rank=LORA_RANK, quantize=False)
    weights.fill_(model)
    set_trainable_params(model, get_adapter_params(model))
    if compiled:
        training.compile_model(model, verbose=False)
    policy: Any = {TransformerSelfAttentionLayer}
    training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    return model


def torchtune_step(model: Any, *, compiled: bool = False) -> Step:
    """Take the step of torchtune's recipe."""
    loss = CEWithChunkedOutputLoss()
    if compiled:
        training.compile_loss(loss, verbose=False)
    model.set_num_output_chunks(loss.num_output_chunks)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Trainee(model, loss, AdamW(trained, lr=1e-4, fused=True)).step


@dataclass(frozen=True)
class Peft:
    """A Llama of transformers with LoRA, and the rotary embedding that its layers call.

    That is a global function, which Liger replaces.
    """

    model: Any
    rotary: Any

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Let the layers call this rotary embedding."""
        from transformers.models.llama import modeling_llama

        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", self.rotary):
            yield self.model


def peft_qlora(backbone: Backbone, weights: RandomWeights, *, liger: bool = False) -> Peft:
    """Build a Llama over bitsandbytes' NF4 with PEFT's LoRA, in bf16."""
    from transformers.models.llama import modeling_llama

    model = _bitsandbytes_llama(backbone, weights)
    rotary = _use_liger(model) if liger else modeling_llama.apply_rotary_pos_emb
    return Peft(_with_peft(model, weights.device), rotary)


def peft_step(peft: Peft) -> Step:
    """Take the step of transformers' Trainer."""
    return trainer_step(peft.model, peft.active)


def peft_decoding(peft: Peft, num_rows: int, num_prompt_tokens: int) -> Step:
    """Decode one token of each row with transformers' cache, always the first behind a prompt."""
    from transformers import DynamicCache

    device = next(peft.model.parameters()).device
    cache = DynamicCache(config=peft.model.config)

    @torch.no_grad()
    def run(tokens: torch.Tensor) -> torch.Tensor:
        with peft.active() as model, torch.autocast(device.type, dtype=DTYPE):
            model.eval()
            output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        likeliest: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
        return likeliest

    tokens = run(torch.ones(num_rows, num_prompt_tokens, dtype=torch.long, device=device))
    run(tokens)

    def step(_: object) -> torch.Tensor:
        cache.crop(-1)
        return run(tokens)

    return step


def _bitsandbytes_llama(backbone: Backbone, weights: RandomWeights) -> Any:
    """Build transformers' Llama with every linear below the head in bitsandbytes' NF4."""
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForCausalLM

    config: Any = LlamaConfig(
        vocab_size=backbone.vocab_size,
        hidden_size=backbone.embed_dim,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_heads,
        num_key_value_heads=backbone.num_kv_heads,
        intermediate_size=backbone.intermediate_dim,
        max_position_embeddings=backbone.max_seq_len,
        tie_word_embeddings=False,
    )
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    for path in linears:
        if path != "lm_head":
            out_dim, in_dim = model.get_submodule(path).weight.shape
            weight = bitsandbytes.nn.Params4bit(
                weights.dense(torch.Size((out_dim, in_dim))), requires_grad=False, quant_type="nf4"
            )
            linear = bitsandbytes.nn.Linear4bit(
                in_dim, out_dim, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta"
            )
            linear.weight = weight.to(weights.device)
            model.set_submodule(path, linear)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                dense = weights.dense(parameter.shape)
                module._parameters[key] = nn.Parameter(dense, requires_grad=False)
    with weights.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _use_liger(model: Any) -> Any:
    """Put Liger's kernels into a Llama; return its rotary embedding, which is a global function."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    before = {name: getattr(modeling_llama, name) for name in names}
    apply_liger_kernel_to_llama(model=model)
    rotary = modeling_llama.apply_rotary_pos_emb
    for name, value in before.items():
        setattr(modeling_llama, name, value)
    return rotary


def _with_peft(model: Any, device: torch.device) -> Any:
    """Add LoRA in fp32 and checkpoint the layers, as ``prepare_model_for_kbit_training`` does."""
    import peft.import_utils
    import peft.tuners.lora.torchao

    # PEFT raises where it finds torchtune's torchao, too old for it, also for other formats.
    peft.import_utils.is_torchao_available = lambda: False
    peft.tuners.lora.torchao.is_torchao_available = lambda: False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets, task_type="CAUSAL_LM"
    )
    model.requires_grad_(False)
    model = peft.get_peft_model(model, config).to(device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    return model.train()
