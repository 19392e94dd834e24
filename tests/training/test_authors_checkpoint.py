"""The authors' code is the reference: their tensors, gradients and checkpoint files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchtune.models import convert_weights
from torchtune.models.llama2 import llama2

from qst_tune.errors import UserError
from qst_tune.models import qst_decoder
from qst_tune.training.authors_checkpoint import read_authors_folder, side_from_authors
from tests.reference import qst_reference as reference

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "llama"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' tensors are not here")

NUM_HEADS, NUM_KV_HEADS = 4, 2
SHAPE = reference.Shape(num_layers=3, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS)
# fp32 sums in another order: the measured maximum over all tensors is 2e-6.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def load_golden_model():
    backbone = llama2(
        vocab_size=128,
        num_layers=3,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        embed_dim=64,
        max_seq_len=64,
        intermediate_dim=160,
        norm_eps=1e-5,
    )
    weights = load_file(GOLDEN / "backbone.safetensors")
    backbone.load_state_dict(
        convert_weights.hf_to_tune(weights, num_heads=4, num_kv_heads=2, dim=64)
    )
    model = qst_decoder(
        backbone, reduction_factor=4, rank=8, variant="authors", quantize_base=False
    )
    side = side_from_authors(
        read_authors_folder(GOLDEN / "authors_qst_state"),
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
    )
    model.side.load_state_dict(side)
    return model


def record_side_tensors(model):
    """Every tensor that golden/llama names, caught by hooks while the model runs."""
    seen = {}

    def keep(name, pick):
        def hook(module, args, output):
            seen[name] = pick(args, output)

        return hook

    for i, block in enumerate(model.side.blocks):
        block.register_forward_hook(keep(f"side_gated.{i}", lambda args, out: args[0]))
        block.register_forward_hook(keep(f"side_hidden.{i + 1}", lambda args, out: out))
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(keep(f"backbone_hidden.{i + 1}", lambda args, out: out))
    model.tok_embeddings.register_forward_hook(keep("backbone_hidden.0", lambda args, out: out))
    model.norm.register_forward_hook(keep("backbone_last", lambda args, out: out))
    model.side.norm.register_forward_hook(keep("side_last", lambda args, out: out))
    model.side.upsample.register_forward_hook(keep("upsampled", lambda args, out: out))
    model.side.output_mix.register_forward_hook(keep("mixed", lambda args, out: out))
    return seen


def shifted_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@needs_golden
def test_every_forward_tensor_equals_the_authors():
    golden = load_file(GOLDEN / "nopad.safetensors")
    model = load_golden_model()
    seen = record_side_tensors(model)
    seen["logits"] = model(golden["input_ids"])
    seen["loss"] = shifted_loss(seen["logits"], golden["labels"])
    seen["side_hidden.0"] = model.side.start(seen["backbone_hidden.0"])
    expected = set(golden) - {"input_ids", "attention_mask", "labels"}
    assert set(seen) == expected
    for name in sorted(expected):
        torch.testing.assert_close(
            seen[name], golden[name], msg=lambda m, n=name: f"{n}: {m}", **CLOSE
        )


@needs_golden
def test_every_gradient_equals_the_authors():
    golden = load_file(GOLDEN / "nopad.safetensors")
    gradients = side_from_authors(
        load_file(GOLDEN / "nopad.grads.safetensors"),
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
    )
    model = load_golden_model()
    shifted_loss(model(golden["input_ids"]), golden["labels"]).backward()
    ours = {name: parameter.grad for name, parameter in model.side.named_parameters()}
    assert set(ours) == set(gradients)
    for name, grad in ours.items():
        torch.testing.assert_close(
            grad, gradients[name], msg=lambda m, n=name: f"{n}: {m}", **CLOSE
        )


@needs_golden
def test_the_literal_transcription_equals_the_authors():
    """It stands in for the authors' code wherever their tensors are absent."""
    golden = load_file(GOLDEN / "nopad.safetensors")
    out = reference.forward(
        load_file(GOLDEN / "backbone.safetensors"),
        load_file(GOLDEN / "side.safetensors"),
        golden["input_ids"],
        SHAPE,
        SHAPE,
    )
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, golden[name], msg=lambda m, n=name: f"{n}: {m}", **CLOSE)


@needs_golden
def test_the_pickled_folder_holds_the_same_tensors_as_the_safetensors_file():
    folder = read_authors_folder(GOLDEN / "authors_qst_state")
    expected = load_file(GOLDEN / "side.safetensors")
    assert set(folder) == set(expected)
    for name, tensor in folder.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"0.weight": Hostile()}, tmp_path / "qst_layers_parameters.pt")
    with pytest.raises(UserError, match=r"qst_layers_parameters\.pt is not a plain state dict"):
        read_authors_folder(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"qst_layers_parameters\.pt is missing"):
        read_authors_folder(tmp_path)
