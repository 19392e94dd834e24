"""A model that was built on meta has all its weights, each its own."""

import torch
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import LoRALinear

from benchmarks.backbones import BACKBONES
from benchmarks.gpu import ours, peers
from benchmarks.gpu.random_weights import RandomWeights

TINY = BACKBONES["tiny"]
CPU = torch.device("cpu")


def test_a_qst_model_is_nowhere_on_meta_and_shares_no_weight() -> None:
    model = ours.qst_model(TINY, RandomWeights(CPU))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in tensors if tensor.is_meta]
    codes = [p.quantized_data for p in model.parameters() if isinstance(p, NF4Tensor)]
    assert len(codes) == 7 * TINY.num_layers
    assert len({tensor.data_ptr() for tensor in codes}) == len(codes)


def test_torchtunes_qlora_is_quantised_and_trains_lora_alone() -> None:
    model = peers.torchtune_qlora(TINY, RandomWeights(CPU))
    linears = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(linears) == 7 * TINY.num_layers
    assert all(isinstance(m.weight, NF4Tensor) and m._quantize_base for m in linears)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(linears)
    assert all(".lora_" in name for name in trained)
