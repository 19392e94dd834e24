"""PEQA trains the scales of a directory as they are, and exports it again with equal codes."""

from pathlib import Path

import pytest
import torch
from qst_tune.recipes import peqa_export, peqa_finetune
from safetensors.torch import load_file

from qst_tune.backbone.hf_checkpointer import HFCheckpointer
from qst_tune.backbone.loading import load_transformers_backbone
from qst_tune.errors import UserError
from qst_tune.models import peqa_from_hf
from tests.recipes.test_from_hf import arguments, losses, run
from tests.support.checkpoints import colour_rows, write_chat_tokenizer, write_jsonl
from tests.support.stored_models import save_stored

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 27).view(2, 12)


def build(directory: Path, **settings):
    model = peqa_from_hf(str(directory), **settings)
    load_transformers_backbone(model.backbone, directory, dtype=torch.float32, device=CPU)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("model_type", "form"),
    [
        ("llama", "gptq_act_order"),
        ("qwen2", "awq"),
        ("gemma2", "ct_int4_asym"),
        ("phi3", "gptq_3bit"),
        ("qwen3_moe", "gptq_act_order"),
    ],
)
def test_the_start_is_the_directory_exactly(model_type: str, form: str, tmp_path: Path) -> None:
    """Experts too, which transformers stacks and joins while it loads."""
    reference = save_stored(tmp_path, model_type, form)
    model = build(tmp_path, bits=3 if form == "gptq_3bit" else 4)
    torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert all(name.endswith("weight_scale") for name in model.task())


@pytest.mark.parametrize(
    ("model_type", "form"),
    [("llama", "gptq"), ("qwen3_moe", "gptq_act_order"), ("phi3", "gptq_v2_channel")],
)
def test_tuned_scales_are_exported_over_equal_codes(
    model_type: str, form: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    directory, output = tmp_path / "model", tmp_path / "out"
    directory.mkdir()
    save_stored(directory, model_type, form, vocab_size=307)
    write_chat_tokenizer(directory)
    write_jsonl(tmp_path / "train.jsonl", colour_rows(8))
    given = arguments(tmp_path, directory, output, "max_steps_per_epoch=1", "epochs=3")
    run(peqa_finetune, "auto/peqa_4bit", *given, "optimizer.lr=1e-3")
    assert losses(output)[-1] < losses(output)[0]
    export = "gptq_v2" if "v2" in form else "gptq"
    run(peqa_export, "auto/peqa_4bit", *given[:2], "device=cpu", "dtype=fp32", f"format={export}")
    before = load_file(directory / "model.safetensors")
    after = load_file(output / export / "model.safetensors")
    assert before.keys() == after.keys()
    tuned = [name for name in before if name.endswith(".scales")]
    assert sum(not torch.equal(after[name], before[name]) for name in tuned) >= 4
    for name, tensor in before.items():
        if name.endswith((".qweight", ".qzeros", ".g_idx")):
            assert torch.equal(after[name], tensor), name


def test_settings_that_contradict_the_directory_are_one_line(tmp_path: Path) -> None:
    save_stored(tmp_path, "llama", "gptq")
    for settings, message in [
        ({"bits": 3}, "model.bits=3: the directory is GPTQ int4, groups of 32; set it to 4"),
        ({"group_size": 64}, "model.group_size=64: the directory is GPTQ int4, groups of 32"),
        ({"train_zero_points": True}, "model.train_zero_points=True: those of GPTQ int4"),
    ]:
        with pytest.raises(UserError, match=message):
            peqa_from_hf(str(tmp_path), **settings)
    peqa_from_hf(str(tmp_path), group_size=32)
    with pytest.raises(UserError, match="nothing to keep; set it to null"):
        HFCheckpointer(str(tmp_path), cache_dir=str(tmp_path / "cache"))


def test_a_directory_without_integers_is_refused(tmp_path: Path) -> None:
    save_stored(tmp_path, "llama", "bnb_nf4")
    with pytest.raises(UserError, match="bitsandbytes nf4, which has no integer codes with scales"):
        peqa_from_hf(str(tmp_path))


def test_a_linear_that_is_dense_in_the_directory_stays_so_and_does_not_train(
    tmp_path: Path,
) -> None:
    save_stored(tmp_path, "llama", "gptq", left_out=("layers.1.mlp",))
    model = build(tmp_path)
    assert type(model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert not model.layers[1].mlp.down_proj.weight.requires_grad
    assert len(model.task()) == 7 + 4
