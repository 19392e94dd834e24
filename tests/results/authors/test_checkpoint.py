"""The authors' code is the reference: their tensors, gradients and checkpoint files."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchtune.models import convert_weights
from torchtune.models.llama2 import llama2

from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.errors import UserError
from qst_tune.generation.sampling import Sampling
from qst_tune.generation.sequence import CachedSequence, continue_sequence
from qst_tune.models import qst_decoder
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.results.authors.checkpoint import (
    read_authors_directory,
    side_from_authors,
    side_to_authors,
    write_authors_directory,
)
from tests.reference import qst_reference as reference
from tests.support.numbers import (
    randomize_,
    reference_backbone,
    reference_choices,
    reference_shape,
    reference_side,
    tiny_backbone,
)
from tests.support.opt_models import (
    SIZES,
    authors_opt_weights,
    opt_backbone,
    padded_batch,
    randomize_opt_,
)
from tests.support.shared_data import AUTHORS_LLAMA as GOLDEN
from tests.support.shared_data import needs

needs_golden = needs(GOLDEN)

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
        read_authors_directory(GOLDEN / "authors_qst_state"),
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
    of_transformers = isinstance(model, QSTTransformer)
    norm = model.backbone.decoder.final_layer_norm if of_transformers else model.norm
    norm.register_forward_hook(keep("backbone_last", lambda args, out: out))
    if of_transformers:  # the first layer's input is tokens and positions
        first = keep("backbone_hidden.0", lambda args, out: args[0])
        model.layers[0].register_forward_hook(first)
    else:
        model.tok_embeddings.register_forward_hook(keep("backbone_hidden.0", lambda args, out: out))
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
def test_the_pickled_directory_holds_the_same_tensors_as_the_safetensors_file():
    directory = read_authors_directory(GOLDEN / "authors_qst_state")
    expected = load_file(GOLDEN / "side.safetensors")
    assert set(directory) == set(expected)
    for name, tensor in directory.items():
        assert torch.equal(tensor, expected[name]), name


@needs_golden
def test_names_go_back_to_those_of_the_authors():
    state = load_file(GOLDEN / "side.safetensors")
    heads = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS}
    back = side_to_authors(side_from_authors(state, **heads), "llama", **heads)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


# OPT. No tensors of the authors' own run stand here: the literal transcription is the reference.

OPT_HEADS = {"num_heads": SIZES["num_heads"], "num_kv_heads": SIZES["num_heads"]}


def opt_model():
    """Ours, with random weights, and the same weights under the authors' names."""
    model = qst_decoder(
        opt_backbone(), reduction_factor=3, rank=8, variant="authors", quantize_base=False
    )
    randomize_opt_(model.side)
    side = side_to_authors(dict(model.side.named_parameters()), "opt", **OPT_HEADS)
    return model, authors_opt_weights(model), side


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_every_opt_tensor_and_gradient_equals_the_transcription(padding):
    model, backbone, side = opt_model()
    tokens, real = padded_batch(
        "left" if padding == "left" else "right", (9, 9, 9) if padding == "none" else (9, 5, 2)
    )
    leaves = {name: value.detach().clone().requires_grad_() for name, value in side.items()}
    expected = reference.opt_forward(
        backbone, leaves, tokens, real.long(), SIZES["num_layers"], SIZES["num_heads"]
    )
    seen = record_side_tensors(model)
    seen["logits"] = model(tokens, mask=None if padding == "none" else real)
    seen["side_hidden.0"] = model.side.start(seen["backbone_hidden.0"])
    assert set(seen) == set(expected)
    for name, tensor in seen.items():
        torch.testing.assert_close(
            tensor[real], expected[name][real], msg=lambda m, n=name: f"{n}: {m}", **CLOSE
        )
    # No loss where a row's first token is predicted from padding, whose state nobody defines.
    predictable = real & torch.cat([real[:, :1], real[:, :-1]], dim=1)
    labels = tokens.masked_fill(~predictable, -100)
    loss, wanted = shifted_loss(seen["logits"], labels), shifted_loss(expected["logits"], labels)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    loss.backward()
    wanted.backward()
    ours = side_to_authors(
        {name: parameter.grad for name, parameter in model.side.named_parameters()},
        "opt",
        **OPT_HEADS,
    )
    assert set(ours) == set(leaves)
    for name, leaf in leaves.items():
        torch.testing.assert_close(
            ours[name], leaf.grad, msg=lambda m, n=name: f"{n}: {m}", **CLOSE
        )


def greedy_by_the_transcription(logits, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(torch.tensor([tokens]))["logits"][0, -1].argmax()))
    return tokens[len(prompt) :]


def generated(model, prompt, count):
    return list(
        continue_sequence(
            CachedSequence(model.eval()), prompt, sampling=Sampling(), stop_tokens=(),
            max_new_tokens=count,
        )
    )  # fmt: skip


@needs_golden
def test_greedy_text_over_caches_equals_the_authors():
    """Their checkpoint; the transcription computes what their code does, see above."""
    backbone = load_file(GOLDEN / "backbone.safetensors")
    side = load_file(GOLDEN / "side.safetensors")
    for prompt in ([3, 1, 4, 1, 5], [9]):
        expected = greedy_by_the_transcription(
            lambda ids: reference.forward(backbone, side, ids, SHAPE, SHAPE), prompt, 20
        )
        assert generated(load_golden_model(), prompt, 20) == expected


def test_greedy_text_of_llama_over_caches_equals_the_transcription():
    model = qst_decoder(
        tiny_backbone(), reduction_factor=4, rank=8, variant="authors", quantize_base=False
    )
    randomize_(model.side)
    backbone, side = reference_backbone(model), reference_side(model.side, model.side.state_dict())
    shapes = reference_shape(model.layers), reference_shape(model.side.blocks)
    for prompt in ([3, 1, 4, 1, 5], [9]):
        expected = greedy_by_the_transcription(
            lambda ids: reference.forward(
                backbone, side, ids, *shapes, choices=reference_choices(model)
            ),
            prompt,
            20,
        )
        assert generated(model, prompt, 20) == expected


def test_greedy_text_of_opt_over_caches_equals_the_transcription():
    model, backbone, side = opt_model()
    layers, heads = SIZES["num_layers"], SIZES["num_heads"]
    for prompt in ([3, 1, 4, 1, 5], [9]):
        expected = greedy_by_the_transcription(
            lambda ids: reference.opt_forward(
                backbone, side, ids, torch.ones_like(ids), layers, heads
            ),
            prompt,
            9,
        )
        assert generated(model, prompt, 9) == expected


def test_opt_weighs_the_side_network_with_the_output_gate():
    """The opposite of their LLaMA code: sigmoid(20) is 1, so the output is the upsampled state."""
    model, _, _ = opt_model()
    torch.nn.init.constant_(model.side.output_mix.logit, 20.0)
    f, u = torch.randn(2, 1, 3, SIZES["embed_dim"]).unbind()
    torch.testing.assert_close(model.side.output_mix(f, u), u)
    fresh = qst_decoder(opt_backbone(), reduction_factor=3, variant="authors")
    assert torch.all(fresh.side.output_mix.logit == 1)


def write_opt_directory(directory: Path, side) -> None:
    """The files of ``save_qst_state`` in their modeling_opt_qst.py."""
    prefixes = {
        "qst_layers": "model.decoder.qst_layers.",
        "qst_z": "model.decoder.z.",
        "qst_downsample": "model.decoder.downsample.",
        "qst_norm": "model.decoder.final_layer_norm_qst.",
        "qst_upsample": "upsample.",
    }
    for name, prefix in prefixes.items():
        part = {k.removeprefix(prefix): v for k, v in side.items() if k.startswith(prefix)}
        torch.save(part, directory / f"{name}_parameters.pt")
    torch.save(side["lm_head_z"], directory / "lm_head_z_parameters.pt")


def test_an_opt_directory_loads_and_computes_the_same(tmp_path):
    model, _, side = opt_model()
    write_opt_directory(tmp_path, side)
    tokens, _ = padded_batch("right")
    expected = model(tokens)
    state = read_authors_directory(tmp_path)
    assert state.keys() == side.keys()
    randomize_opt_(model.side)
    assert not torch.equal(model(tokens), expected)
    model.side.load_state_dict(side_from_authors(state, **OPT_HEADS))
    assert torch.equal(model(tokens), expected)


def test_a_missing_file_of_an_opt_directory_is_named_with_its_own_list(tmp_path):
    torch.save({"0.fc1.weight": torch.ones(3)}, tmp_path / "qst_layers_parameters.pt")
    with pytest.raises(UserError, match=r"qst_z_.* missing: .*, lm_head_z_parameters\.pt$"):
        read_authors_directory(tmp_path)
    with pytest.raises(UserError, match=r"missing: .*qst_score_.*, score_z_parameters\.pt$"):
        read_authors_directory(tmp_path, classifier=True)


# Classifiers: their save_qst_state writes these, and fails at the one that is bare.


@pytest.mark.parametrize(
    ("family", "gate_file"), [("llama", "score_z_path.pt"), ("opt", "score_z_parameters.pt")]
)
def test_a_classifiers_directory_is_what_the_authors_code_loads(family, gate_file, tmp_path):
    builder = {
        "llama": lambda: tiny_backbone(num_heads=4, num_kv_heads=2, embed_dim=64),
        "opt": opt_backbone,
    }
    decoder = qst_decoder(builder[family](), reduction_factor=4, variant="authors")
    side = QSTClassifier(decoder, 3).side.state_dict()
    heads = {"num_heads": 4, "num_kv_heads": 2 if family == "llama" else 4}
    state = side_to_authors(side, family, **heads)
    write_authors_directory(tmp_path / "directory", state)
    files = {
        path.name: torch.load(path, weights_only=True)
        for path in (tmp_path / "directory").iterdir()
    }
    assert set(files) == {
        "qst_layers_parameters.pt",
        "qst_z_parameters.pt",
        "qst_downsample_parameters.pt",
        "qst_norm_parameters.pt",
        "qst_upsample_parameters.pt",
        "qst_score_parameters.pt",
        gate_file,
    }
    assert list(files["qst_score_parameters.pt"]) == ["weight"]
    assert torch.equal(files["qst_score_parameters.pt"]["weight"], side["score.weight"])
    assert torch.equal(files[gate_file], side["output_mix.logit"])
    read = read_authors_directory(tmp_path / "directory", classifier=True)
    assert read.keys() == state.keys()
    back = side_from_authors(read, **heads)
    assert back.keys() == side.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in side.items())
    (tmp_path / "directory" / gate_file).unlink()
    without_gate = read_authors_directory(tmp_path / "directory", classifier=True)
    assert without_gate.keys() == state.keys() - {"score_z"}
    with pytest.raises(
        UserError, match=r"is a classifier's, it has qst_score_parameters\.pt: name"
    ):
        read_authors_directory(tmp_path / "directory")


# Files.


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"0.weight": Hostile()}, tmp_path / "qst_layers_parameters.pt")
    with pytest.raises(UserError, match=r"qst_layers_parameters\.pt is not a plain state dict"):
        read_authors_directory(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"qst_layers_parameters\.pt is missing"):
        read_authors_directory(tmp_path)
