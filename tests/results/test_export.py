"""Exported models compute what was trained, as read by others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune import training
from torchtune.generation import generate
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import FullModelHFCheckpointer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from qst_tune.backbone.loading import backbone_on_meta, load_transformers_backbone
from qst_tune.backbone.torchtune_loading import load_backbone
from qst_tune.errors import UserError
from qst_tune.models import peqa_from_hf, peqa_llama3_2
from qst_tune.results.export import export_model
from tests.backbone.test_loading import vision_language_model
from tests.reference.gptq_reader import decode
from tests.support.checkpoints import SIZES as SMALL
from tests.support.checkpoints import random_weights, write_model_directory
from tests.support.model_types import TYPES, tiny_model

CPU = torch.device("cpu")
# 32 is what GPTQ's words of 3 bits need everywhere.
SIZES = {**SMALL, "intermediate_dim": 96, "num_heads": 2, "num_kv_heads": 1}

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export") / "model"
    return write_model_directory(directory, weights=random_weights(SIZES), sizes=SIZES)


def tuned(checkpoint: Path, dtype=torch.float32, **settings):
    """Loaded as in a run, with scales that are not those of rounding."""
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = peqa_llama3_2(**SIZES, **settings)
    reader = FullModelHFCheckpointer(
        checkpoint_dir=str(checkpoint),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(checkpoint.parent),
    )
    load_backbone(model, reader, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(0)
    model.load_task(
        {
            name: value * (1 + 0.1 * torch.rand(value.shape, generator=generator))
            for name, value in model.task().items()
        }
    )
    return model.eval()


def tokens(batch=2, length=12):
    return torch.randint(0, SIZES["vocab_size"], (batch, length))


def same_greedy_text(ours, theirs) -> None:
    prompt = tokens(batch=1, length=5)
    expected, _ = generate(ours, prompt[0], max_generated_tokens=20, pad_id=-1, top_k=1)
    actual = theirs.generate(
        prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert actual.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"group_size": 32, "bits": 3}, {"embedding_quantization": "int8"}]
)
def test_transformers_reads_a_dense_model_with_our_logits(
    settings, checkpoint: Path, tmp_path: Path
) -> None:
    model, rows = tuned(checkpoint, **settings), tokens()
    export_model(model, checkpoint, tmp_path / "dense", form="dense", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    # fp32 in another order of operations; logits are around 10.
    torch.testing.assert_close(theirs(rows).logits, model(rows), rtol=1e-4, atol=1e-3)
    same_greedy_text(model, theirs)


@torch.no_grad()
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, None), (3, 32)])
def test_a_reader_of_the_gptq_format_gets_our_logits(
    form, bits: int, group_size: int | None, checkpoint: Path, tmp_path: Path
) -> None:
    model, rows = tuned(checkpoint, bits=bits, group_size=group_size), tokens()
    directory = tmp_path / form
    export_model(model, checkpoint, directory, form=form, dtype=torch.float32)
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size or 32,  # of widths 64 and 96
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "checkpoint_format": form,
    }
    theirs = read_gptq(directory, tmp_path / "decoded", config)
    # Scales are rounded to fp16, relative 5e-4, and so are embedding and norms.
    torch.testing.assert_close(theirs(rows).logits, model(rows), rtol=0.01, atol=0.05)
    same_greedy_text(model, theirs)


@torch.no_grad()
def test_a_side_network_can_be_tuned_over_an_exported_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    """QST over tuned PEQA scales: the exported directory is taken over as it is."""
    model, rows = tuned(checkpoint, bits=4, group_size=32), tokens()
    export_model(model, checkpoint, tmp_path / "gptq", form="gptq", dtype=torch.float32)
    backbone = backbone_on_meta(tmp_path / "gptq")
    backbone.quantize("auto", "none")
    load_transformers_backbone(backbone, tmp_path / "gptq", dtype=torch.float32, device=CPU)
    assert backbone.quantization == "int4, groups of 32, gptq"
    # Scales are rounded to fp16, relative 5e-4, and so are embedding and norms.
    logits = backbone.head(backbone.run(rows, taps=(), visit=lambda h: None))
    torch.testing.assert_close(logits, model(rows), rtol=0.01, atol=0.05)


def read_gptq(directory: Path, decoded: Path, config):
    """A transformers model of the decoded weights; its own GPTQ reader needs another package."""
    quantization = config.pop("quantization_config")
    tensors = load_file(directory / "model.safetensors")
    linears = {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")}
    dense = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in linears}
    for name in linears:
        parts = {
            part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
        }
        dense[f"{name}.weight"] = decode(
            parts, bits=quantization["bits"], form=quantization["checkpoint_format"]
        )
    decoded.mkdir()
    (decoded / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file({n: t.float().contiguous() for n, t in dense.items()}, decoded / "model.safetensors")
    return AutoModelForCausalLM.from_pretrained(decoded)


def test_tokenizer_and_config_come_along_and_weights_do_not(
    checkpoint: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "out"
    export_model(tuned(checkpoint), checkpoint, directory, form="gptq", dtype=torch.float32)
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    size, dense = ((p / "model.safetensors").stat().st_size for p in (directory, checkpoint))
    assert size < dense / 2  # the embedding, in fp16, is most of it


def test_wrapped_layers_export_the_same(checkpoint: Path, tmp_path: Path) -> None:
    model = tuned(checkpoint)
    export_model(model, checkpoint, tmp_path / "plain", form="gptq", dtype=torch.float32)
    policy = {TransformerSelfAttentionLayer}
    training.set_activation_checkpointing(model, auto_wrap_policy=policy)
    export_model(model, checkpoint, tmp_path / "wrapped", form="gptq", dtype=torch.float32)
    plain, wrapped = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists; remove it or name another"):
        export_model(
            tuned(checkpoint), checkpoint, tmp_path / "there", form="dense", dtype=torch.float32
        )
    for settings, message in (
        ({"train_zero_points": True}, "use format=dense"),
        ({"group_size": 48}, "does not fit the GPTQ format"),
    ):
        model = tuned(checkpoint, **settings)
        with pytest.raises(UserError, match=message):
            export_model(model, checkpoint, tmp_path / "out", form="gptq", dtype=torch.float32)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(UserError, match="model_type 'opt'; of torchtune's decoders only models"):
        export_model(
            tuned(checkpoint),
            tmp_path / "other",
            tmp_path / "out",
            form="gptq",
            dtype=torch.float32,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"there", "other"}


def of_transformers(directory: Path, model_type: str, changes=None, **settings):
    """A tiny model, saved, and loaded with scales that are not those of rounding."""
    tiny_model(model_type, **(changes or {})).save_pretrained(directory)
    with torch.device("meta"):
        model = peqa_from_hf(str(directory), **settings)
    load_transformers_backbone(model.backbone, directory, dtype=torch.float32, device=CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.task().values():
            value *= 1 + 0.1 * torch.rand(value.shape, generator=generator)
    return model.eval()


# Renamed, fused, split and tied weights; experts; heads that are capped.
SAMPLE = ("llama", "gemma2", "opt", "gpt_neox", "qwen3_moe", "gpt_oss", "phi3", "mixtral")
EXPORTED = [
    pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow)
    for name in TYPES
    if name not in ("gpt2", "zamba2")  # zamba2: not loaded, see test_transformers_models
]


@torch.no_grad()
@pytest.mark.parametrize("model_type", EXPORTED)
def test_transformers_reads_a_dense_model_of_any_type_with_our_logits(
    model_type: str, tmp_path: Path
) -> None:
    model, rows = of_transformers(tmp_path / "model", model_type), tokens() % 256
    directory = tmp_path / "dense"
    export_model(model, tmp_path / "model", directory, form="dense", dtype=torch.float32)
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    theirs = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.testing.assert_close(theirs(rows).logits, model(rows), rtol=0, atol=1e-5)


# Of these the hub has the experts of a layer in one tensor.
NO_LINEARS = {"gpt_oss", "llama4_text", "granitemoe", "granitemoehybrid"}


@torch.no_grad()
@pytest.mark.parametrize("model_type", EXPORTED)
def test_our_reader_gets_the_logits_of_a_gptq_model_of_any_type(
    model_type: str, tmp_path: Path
) -> None:
    """Its scales are rounded to fp16, and so are embedding and norms."""
    model, rows = of_transformers(tmp_path / "model", model_type), tokens() % 256
    directory, export = tmp_path / "gptq", {"form": "gptq_v2", "dtype": torch.float32}
    if model_type in NO_LINEARS:
        with pytest.raises(UserError, match="is no weight of a linear layer"):
            export_model(model, tmp_path / "model", directory, **export)
        return
    export_model(model, tmp_path / "model", directory, **export)
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    stems = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    assert len(stems) >= 4
    assert all(f"{stem}.weight" in before for stem in stems)
    backbone = backbone_on_meta(directory)
    backbone.quantize("auto", "none")
    load_transformers_backbone(backbone, directory, dtype=torch.float32, device=CPU)
    assert backbone.quantization.startswith("int4")
    logits = backbone.head(backbone.run(rows, taps=(), visit=lambda h: None))
    assert (logits - model(rows)).abs().max() < 0.02 * model(rows).abs().max()


@pytest.mark.parametrize(
    ("widths", "group_size"), [((128, 256), 128), ((64, 128), 64), ((64, 96), 32)]
)
def test_a_scale_a_channel_is_written_in_groups_that_kernels_run(
    widths: tuple[int, int], group_size: int, tmp_path: Path
) -> None:
    hidden, inner = widths
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "head_dim": hidden // 4}
    model = of_transformers(tmp_path / "model", "qwen3", sizes)
    directory = tmp_path / "gptq"
    export_model(model, tmp_path / "model", directory, form="gptq_v2", dtype=torch.float32)
    config = json.loads((directory / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == group_size
    tensors = load_file(directory / "model.safetensors")
    width = group_size
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(tensors[f"{name}.g_idx"], (torch.arange(inner) // width).int())
    scale = model.task()[f"{name}.weight_scale"].detach().T.half()
    assert torch.equal(tensors[f"{name}.scales"], scale.expand(inner // width, -1))
    linear = model.backbone.model.get_submodule(name)
    parts = {part: tensors[f"{name}.{part}"] for part in PARTS}
    decoded = decode(parts, bits=4, form="gptq_v2")
    torch.testing.assert_close(decoded, linear.dense_weight(torch.float32), rtol=1e-3, atol=1e-6)


def test_routers_are_named_as_not_quantised(tmp_path: Path) -> None:
    model = of_transformers(tmp_path / "model", "qwen3_moe")
    export_model(model, tmp_path / "model", tmp_path / "gptq", form="gptq_v2", dtype=torch.float32)
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.qweight" in tensors
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.float16


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma3", "mistral3"])
def test_of_a_vision_language_model_the_rest_comes_along(model_type: str, tmp_path: Path) -> None:
    theirs = vision_language_model(model_type)
    theirs.save_pretrained(tmp_path / "model")
    with torch.device("meta"):
        model = peqa_from_hf(str(tmp_path / "model"))
    load_transformers_backbone(model.backbone, tmp_path / "model", dtype=torch.float32, device=CPU)
    for form in ("dense", "gptq_v2"):
        directory = tmp_path / form
        export_model(model, tmp_path / "model", directory, form=form, dtype=torch.float32)
        before, after = (
            load_file(path / "model.safetensors") for path in (tmp_path / "model", directory)
        )
        if form == "dense":
            assert after.keys() == before.keys()
        rest = [name for name in before if "vision" in name or "projector" in name]
        assert len(rest) > 4
        assert all(torch.equal(after[name], before[name]) for name in rest)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense").eval()
    rows = tokens() % 256
    torch.testing.assert_close(again(rows).logits, model(rows), rtol=0, atol=1e-5)
