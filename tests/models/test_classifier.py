import pytest
import torch

from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.models import qst_classifier
from qst_tune.modules import NF4Linear, QSTClassifier
from tests.support.opt_models import OPT_DIRECTORY


def build(**arguments):
    with torch.device("meta"):
        return qst_classifier(**arguments)


@pytest.mark.parametrize(
    "backbone",
    ["qst_tune.models.smollm2_135m", "torchtune.models.llama3_2.llama3_2_1b"],
)
def test_any_builder_of_a_torchtune_decoder_is_a_backbone(backbone):
    model = build(backbone=backbone, num_labels=3, reduction_factor=16)
    assert isinstance(model, QSTClassifier)
    assert model.side.score.weight.shape == (3, model.layers[0].attn.embed_dim)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert any(isinstance(module, NF4Linear) for module in model.layers.modules())


def test_arguments_go_to_the_backbone_and_to_the_side_network():
    model = build(**OPT, num_labels=1, reduction_factor=3, variant="authors")
    assert isinstance(model, QSTTransformer)
    assert isinstance(model, QSTClassifier)
    assert len(model.layers) == len(model.side.blocks) == 3
    assert model.side.output_mix.swapped


OPT = {"backbone": "qst_tune.models.backbone_from_hf", "checkpoint_dir": OPT_DIRECTORY}
LLAMA = {"backbone": "torchtune.models.llama2.llama2", "num_layers": 2, "num_heads": 4}
LLAMA |= {"num_kv_heads": 2, "embed_dim": 96, "vocab_size": 61, "max_seq_len": 32}


@pytest.mark.parametrize(
    ("sizes", "settings", "start"),
    [
        (LLAMA, {"variant": "authors"}, 1.0),
        (OPT, {"variant": "authors"}, 0.0),
        (OPT, {"variant": "authors", "initial_mix": 2.0}, 2.0),
        (OPT, {"output_mix": "sigmoid"}, 1.0),
    ],
)
def test_the_authors_opt_classifier_alone_starts_halfway_between_the_networks(
    sizes, settings, start
):
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = qst_classifier(**sizes, num_labels=2, reduction_factor=3, **settings)
        model.initialize_side(torch.device("cpu"))
        assert torch.all(model.side.output_mix.logit == start)
        assert model.counts_tokens == (sizes is OPT and settings.get("variant") == "authors")


def test_an_unknown_backbone_is_named():
    with pytest.raises(ValueError, match=r"backbone='qst_tune\.models\.nope' cannot be imported"):
        build(backbone="qst_tune.models.nope", num_labels=2)


def test_a_builder_of_a_whole_model_is_refused_with_the_one_of_its_backbone():
    with pytest.raises(ValueError, match=r"builds a whole model: name .*, smollm2_135m ") as error:
        build(backbone="qst_tune.models.qst_smollm2_135m", num_labels=2)
    assert "\n" not in str(error.value)


def test_a_misspelt_argument_is_named():
    with pytest.raises(TypeError, match="reduction_facto"):
        build(backbone="qst_tune.models.smollm2_135m", num_labels=2, reduction_facto=8)


def test_lora_alone_makes_a_classifier_too():
    alone = {"num_side_blocks": 0, "lora_layers": 2}
    model = build(backbone="qst_tune.models.smollm2_135m", num_labels=2, **alone)
    names = {name.partition(".")[0] for name, _ in model.side.named_parameters()}
    assert names == {"lora", "score"}
