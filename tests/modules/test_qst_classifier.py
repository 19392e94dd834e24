"""Pooling, what trains, and the authors' classifier."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchtune.generation import get_causal_mask_from_padding_mask

from qst_tune.backbone.hf_checkpointer import HFCheckpointer
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.models import qst_classifier, qst_decoder
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.results.authors.checkpoint import side_to_authors
from qst_tune.training.classification import ClassificationTask
from qst_tune.training.methods import parameter_groups
from tests.reference import qst_reference as reference
from tests.support.numbers import (
    TINY,
    TINY_REDUCTION,
    random_tokens,
    randomize_,
    reference_backbone,
    reference_shape,
    tiny_backbone,
)
from tests.support.opt_models import (
    SIZES,
    authors_opt_weights,
    hf_opt,
    opt_backbone,
    padded_batch,
    randomize_opt_,
)

BACKBONES = {"torchtune": tiny_backbone, "transformers": opt_backbone}
# fp32 sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def classifier(backbone=None, num_labels=3, **arguments):
    decoder = qst_decoder(
        tiny_backbone() if backbone is None else backbone,
        reduction_factor=TINY_REDUCTION,
        rank=8,
        **arguments,
    )
    model = QSTClassifier(decoder, num_labels)
    randomize_(model.side)
    return model


@pytest.mark.parametrize("build", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_no_rows_logits(build, side):
    model = classifier(build())
    tokens, real = padded_batch(side)
    together = model(tokens, padding_mask=real)
    for row, is_real, logits in zip(tokens, real, together, strict=True):
        alone = model(row[is_real][None])
        torch.testing.assert_close(logits[None], alone, **CLOSE)


@torch.no_grad()
def test_logits_are_the_heads_of_the_last_tokens_state():
    model = classifier()
    tokens = random_tokens(2, 5)
    decoder = qst_decoder_of(model)
    state = decoder(tokens)[:, -1]
    torch.testing.assert_close(model(tokens), state @ model.side.score.weight.T)


def qst_decoder_of(model):
    """The same modules as a QST decoder that returns its states."""
    from qst_tune.modules import QSTDecoder

    decoder = QSTDecoder(model, model.side)
    decoder.skip_output_layer = True
    return decoder


def test_at_first_all_classes_are_equally_likely():
    """Also of a model that was built without memory and then given its first values."""
    with torch.device("meta"):
        fresh = QSTClassifier(qst_decoder(tiny_backbone(), reduction_factor=TINY_REDUCTION), 3)
    fresh.initialize_side(torch.device("cpu"))
    assert torch.equal(fresh.side.score.weight, torch.zeros(3, 96))


def test_the_head_trains_with_the_side_network_and_the_backbone_stays():
    model = classifier()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"side.{name}" for name in model.side.adapter_params()}
    assert "side.score.weight" in trainable
    groups = parameter_groups(model.side)
    decayed = {id(p) for g in groups if g.get("weight_decay") != 0.0 for p in g["params"]}
    assert id(model.side.score.weight) in decayed
    model.train()
    F.cross_entropy(model(random_tokens(4, 5)), torch.tensor([0, 1, 2, 0])).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_without_the_side_network_it_is_a_linear_probe_of_the_backbone():
    model = classifier()
    model.side.disabled = True
    tokens = random_tokens(2, 5)
    f = qst_decoder_of(model)(tokens)[:, -1]
    torch.testing.assert_close(model(tokens), f @ model.side.score.weight.T)
    model.side.disabled = False
    assert not torch.allclose(model(tokens), f @ model.side.score.weight.T)


def test_head_over_a_bfloat16_backbone_computes_in_fp32():
    model = classifier(tiny_backbone(dtype=torch.bfloat16))
    assert model.side.score.weight.dtype == torch.float32
    assert model(random_tokens()).dtype == torch.float32


def test_no_label_is_refused():
    with pytest.raises(ValueError, match="num_labels=0 must be at least 1"):
        classifier(num_labels=0)


# The authors' classifier.

LLAMA_SIZES = {"backbone": "torchtune.models.llama2.llama2", **TINY}
PAD = 1  # of padded_batch


def built(family, directory, **settings):
    """A classifier over a random backbone, built as a config does it."""
    if family == "llama":
        model = qst_classifier(**LLAMA_SIZES, **settings)
        randomize_opt_(model)
        return model
    hf_opt().save_pretrained(directory)
    with torch.device("meta"):
        model = qst_classifier(
            "qst_tune.models.backbone_from_hf", checkpoint_dir=str(directory), **settings
        )
    cpu = torch.device("cpu")
    load_backbone(model, HFCheckpointer(str(directory)), dtype=torch.float32, device=cpu)
    model.initialize_side(cpu)
    randomize_opt_(model.side)
    return model


def authors_classifier(family, directory, num_labels):
    """Ours, with random weights, and its side network under the authors' names, as leaves."""
    settings = {"variant": "authors", "reduction_factor": 3, "rank": 8, "quantize_base": False}
    model = built(family, directory, **settings, num_labels=num_labels)
    side = side_to_authors(dict(model.side.named_parameters()), family, **heads_of(model))
    return model, {name: value.detach().clone().requires_grad_() for name, value in side.items()}


def heads_of(model):
    attn = model.side.blocks[0].attn
    return {"num_heads": attn.num_heads, "num_kv_heads": attn.num_kv_heads}


def reference_logits(model, side, tokens, real):
    if isinstance(model, QSTTransformer):
        sizes = (SIZES["num_layers"], SIZES["num_heads"])
        frozen = authors_opt_weights(model)
        return reference.opt_classifier(frozen, side, tokens, real.long(), *sizes, PAD)
    shapes = (reference_shape(model.layers), reference_shape(model.side.blocks))
    mask = get_causal_mask_from_padding_mask(real)
    return reference.llama_classifier(reference_backbone(model), side, tokens, *shapes, PAD, mask)


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_logits_loss_and_gradients_equal_the_authors(family, padding, num_labels, tmp_path):
    """On the left too: lengths for which the token that OPT's count picks there is a real one."""
    model, side = authors_classifier(family, tmp_path, num_labels)
    tokens, real = padded_batch(padding, (9, 5, 7))
    expected = reference_logits(model, side, tokens, real)
    torch.testing.assert_close(model(tokens, padding_mask=real), expected, **CLOSE)
    labels = torch.tensor([0, 2, 1]) if num_labels > 1 else torch.tensor([0.5, 3.0, 1.0])
    loss = reference.classification_loss(expected, labels)
    function = nn.CrossEntropyLoss() if num_labels > 1 else nn.MSELoss()
    task = ClassificationTask(function, ["accuracy"], torch.device("cpu"))
    total, rows = task.loss(model, {"tokens": tokens, "padding_mask": real, "labels": labels})
    torch.testing.assert_close(total / rows, loss, **CLOSE)
    loss.backward()
    (total / rows).backward()
    grads = {name: parameter.grad for name, parameter in model.side.named_parameters()}
    ours = side_to_authors(grads, family, **heads_of(model))
    assert set(ours) == set(side)
    assert {"score_z", "score.weight"} < set(ours)
    for name, leaf in side.items():
        torch.testing.assert_close(
            ours[name], leaf.grad, msg=lambda m, n=name: f"{n}: {m}", **CLOSE
        )


def test_authors_count_of_tokens_finds_the_last_one_under_left_padding_for_llama_alone():
    """3 real tokens of 5 stand at 2..4; OPT's index is 2."""
    ids = torch.tensor([[0, 0, 7, 8, 9]])
    marked = torch.arange(5.0).reshape(1, 5, 1)
    one = torch.ones(1, 1)
    assert reference.classify(marked, one, ids, pad_id=0).item() == 4
    assert reference.classify(marked, one, ids, pad_id=0, family="opt").item() == 2


@torch.no_grad()
def test_only_the_authors_opt_classifier_reads_another_token_than_the_last(tmp_path):
    tokens, real = padded_batch("left", (9, 5, 7))
    for variant in ("default", "paper", "authors"):
        model = built("opt", tmp_path, num_labels=2, variant=variant, reduction_factor=3)
        randomize_(model.side)
        alone = torch.cat(
            [model(row[is_real][None]) for row, is_real in zip(tokens, real, strict=True)]
        )
        differs = [
            not torch.allclose(a, b, **CLOSE)
            for a, b in zip(model(tokens, padding_mask=real), alone, strict=True)
        ]
        assert differs == [False, variant == "authors", variant == "authors"]


@torch.no_grad()
def test_given_mask_semantics_are_those_of_the_decoder():
    """Left padding goes through the same mask and positions as generation's."""
    model = classifier()
    tokens, real = padded_batch("left")
    decoder = qst_decoder_of(model)
    where = {"input_pos": (real.cumsum(-1) - 1).clamp(min=0)}
    state = decoder(tokens, mask=get_causal_mask_from_padding_mask(real), **where)[:, -1]
    torch.testing.assert_close(
        model(tokens, padding_mask=real), state @ model.side.score.weight.T, **CLOSE
    )
