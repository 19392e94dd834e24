"""Models of a directory are transformers' own, whatever settings its config.json has."""

from pathlib import Path

import pytest
import torch

from qst_tune.backbone.transformers import TransformersBackbone
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.models import backbone_from_hf, peqa_from_hf, qst_classifier, qst_from_hf
from qst_tune.modules import QSTClassifier
from tests.support.hf_models import (
    CASES,
    edit_config,
    loaded,
    padded_batch,
    save_hf_model,
    write_old_style,
)

# fp32 sums in another order; logits reach 10.
CLOSE = {"rtol": 0, "atol": 1e-4}
# Soft caps, stretched rotary embeddings, windows, biases, projections: all but plain ones.
CHOSEN = [case for case in CASES if " " in case or case == "gemma2"]


@pytest.mark.parametrize("case", CHOSEN)
@torch.no_grad()
def test_logits_equal_transformers_on_rows_longer_than_a_window_and_padded(
    case: str, tmp_path: Path
) -> None:
    theirs = save_hf_model(tmp_path, case)
    if not case.startswith("opt"):
        write_old_style(tmp_path)  # as most published directories have it
    ours = loaded(backbone_from_hf, tmp_path)
    assert isinstance(ours, TransformersBackbone)
    tokens, real = padded_batch("left", (40, 9))
    expected = theirs(tokens, attention_mask=real.long()).logits
    assert expected.std() > 0.1, "logits that are all alike would show nothing"
    torch.testing.assert_close(ours(tokens, mask=real)[real], expected[real], **CLOSE)


@torch.no_grad()
def test_a_setting_that_transformers_does_not_read_changes_nothing(tmp_path: Path) -> None:
    theirs = save_hf_model(tmp_path, "llama")
    edit_config(tmp_path, max_sequence_length=256)  # of Llama 1 and what came of it
    tokens, _ = padded_batch("left", (12,))
    torch.testing.assert_close(
        loaded(backbone_from_hf, tmp_path)(tokens), theirs(tokens).logits, **CLOSE
    )


def test_a_classifier_takes_a_directory_for_its_backbone(tmp_path: Path) -> None:
    save_hf_model(tmp_path, "qwen3")
    model = loaded(
        lambda directory, **settings: qst_classifier(
            "qst_tune.models.backbone_from_hf", 3, checkpoint_dir=directory, **settings
        ),
        tmp_path,
        reduction_factor=4,
    )
    assert isinstance(model, QSTTransformer)
    assert isinstance(model, QSTClassifier)
    tokens, real = padded_batch("left")
    assert torch.equal(model(tokens, padding_mask=real), torch.zeros(3, 3))


def test_only_config_json_is_needed_to_build(tmp_path: Path) -> None:
    save_hf_model(tmp_path / "whole", "qwen3")
    config = tmp_path / "config.json"
    config.write_text((tmp_path / "whole" / "config.json").read_text())
    with torch.device("meta"):
        model = qst_from_hf(str(tmp_path), reduction_factor=4)
    assert len(model.layers) == 2


def test_the_builders_carry_their_names() -> None:
    assert (qst_from_hf.__name__, peqa_from_hf.__name__) == ("qst_from_hf", "peqa_from_hf")
