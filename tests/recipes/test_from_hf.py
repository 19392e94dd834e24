"""One config for every directory, through the real `tune`; and wrong directories, one line each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from qst_tune.recipes import peqa_finetune, qst_evaluate, qst_finetune, qst_generate
from safetensors.torch import load_file, save_file

from qst_tune.config.file import parse_config
from qst_tune.errors import UserError
from qst_tune.quantization.table import QuantizedTable
from qst_tune.sharing.inspection import verify_directory
from qst_tune.transformers import QSTForCausalLM
from tests.support.checkpoints import colour_rows, file_hashes, write_chat_tokenizer, write_jsonl
from tests.support.hf_models import FAMILIES, edit_config, save_hf_model, write_old_style
from tests.support.recipe_runs import one_thread, tune_here

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each family, as published ones are, and rows to learn."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("auto")
    for family, case in FAMILIES.items():
        save_hf_model(root / family, case)
        write_old_style(root / family)
        write_chat_tokenizer(root / family)
    write_jsonl(root / "train.jsonl", colour_rows(8))
    return root


def arguments(root: Path, directory: Path, output: Path, *further: str) -> list[str]:
    """What turns the shipped config into a run of a few seconds without a network."""
    return [
        f"checkpoint_dir={directory}",
        f"output_dir={output}",
        "dataset._component_=torchtune.datasets.instruct_dataset",
        "dataset.source=json",
        f"dataset.data_files={root / 'train.jsonl'}",
        f"dataset.cache_dir={root / 'cache'}",
        "tokenizer.max_seq_len=24",
        "batch_size=4",
        "gradient_accumulation_steps=1",
        "optimizer.fused=False",
        "optimizer.lr=1e-2",
        "lr_scheduler=null",
        "epochs=6",
        "device=cpu",
        "dtype=fp32",
        *further,
    ]


def run(recipe, config: str, *overrides: str) -> None:
    """Run a recipe in this process, with the config as shipped."""
    with one_thread():
        recipe.main(parse_config(["--config", str(CONFIGS / f"{config}.yaml"), *overrides]))


def losses(output: Path) -> list[float]:
    return list(json.loads((output / "summary.json").read_text())["train_loss"].values())


SLOW_FAMILIES = [
    pytest.param(name, marks=() if name == "qwen3" else pytest.mark.slow) for name in FAMILIES
]


@pytest.mark.parametrize("family", SLOW_FAMILIES)
def test_tune_run_learns_and_leaves_the_directory_alone(family: str, root: Path, tmp_path: Path):
    directory = root / family
    before = file_hashes(directory)
    given = arguments(root, directory, tmp_path / "out", "model.reduction_factor=4")
    result = tune_here("run", "qst_finetune", "--config", "auto/qst", *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert file_hashes(directory) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_config_learns_on_every_family(family: str, root: Path, tmp_path: Path) -> None:
    """Within this process, since `tune` takes seconds a family."""
    further = ["model.reduction_factor=4", "max_steps_per_epoch=1", "epochs=3"]
    output = tmp_path / "qst"
    run(qst_finetune, "auto/qst", *arguments(root, root / family, output, *further))
    assert losses(output)[-1] < losses(output)[0]


def test_transformers_loads_what_was_tuned_though_the_directory_has_moved(
    root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root / "qwen3", tmp_path / "before")
    further = ["model.reduction_factor=4", "epochs=1", "max_steps_per_epoch=1"]
    run(qst_finetune, "auto/qst", *arguments(root, tmp_path / "before", tmp_path / "o", *further))
    os.rename(tmp_path / "before", tmp_path / "after")
    tuned = tmp_path / "o" / "side_network"
    model = QSTForCausalLM.from_pretrained(
        tuned, backbone=str(tmp_path / "after"), dtype=torch.float32
    )
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    verify_directory(tuned, tmp_path / "after")


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_embedding_and_head_can_be_quantised_from_the_config_to_transformers(
    family: str, root: Path, tmp_path: Path
) -> None:
    """Tied, scaled and capped; and with a head of its own."""
    further = ["model.reduction_factor=4", "epochs=3", "max_steps_per_epoch=1"]
    chosen = "model.embedding_quantization=int8"
    out = tmp_path / "out"
    run(qst_finetune, "auto/qst", *arguments(root, root / family, out, *further, chosen))
    assert losses(out)[-1] < losses(out)[0]
    tuned = out / "side_network"
    model = QSTForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    assert isinstance(model.get_input_embeddings().weight, QuantizedTable)
    prompt = torch.tensor([[4, 5, 6]])  # 3 is the padding's
    generated = model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
    expected = model(generated[:, :-1], use_cache=False).logits.argmax(-1)[:, -3:]
    assert torch.equal(generated[:, 3:], expected)
    given = arguments(root, root / family, out, "model.reduction_factor=4")
    question = [f"side_network={tuned}", f"text={root / 'train.jsonl'}", "window=24"]
    message = r"quantization 'nf4; embedding int8' there, 'nf4' here"
    with pytest.raises(UserError, match=message):
        run(qst_evaluate, "auto/qst", *given, *question)


def test_peqa_trains_resumes_and_is_used_over_a_directory(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, whole, parts = root / "gemma2", tmp_path / "whole", tmp_path / "parts"

    def given(output: Path, *further: str) -> list[str]:
        settings = ("max_steps_per_epoch=1", "optimizer.lr=1e-3", *further)
        return arguments(root, directory, output, *settings)

    run(peqa_finetune, "auto/peqa_4bit", *given(whole, "epochs=3"))
    assert losses(whole)[-1] < losses(whole)[0]
    run(peqa_finetune, "auto/peqa_4bit", *given(parts, "epochs=2"))
    run(peqa_finetune, "auto/peqa_4bit", *given(parts, "epochs=3", "resume_from_checkpoint=True"))
    once, resumed = (load_file(out / "scales" / "scales.safetensors") for out in (whole, parts))
    assert once.keys() == resumed.keys()
    assert all(torch.equal(once[name], resumed[name]) for name in once)
    run(peqa_finetune, "auto/peqa_4bit", *given(tmp_path / "dry", "dry_run=True"))
    assert "PEQA, checkpointed" in capsys.readouterr().out
    run(qst_evaluate, "auto/peqa_4bit", *given(whole, f"text={root / 'train.jsonl'}", "window=24"))
    question = ("prompt=what is it", "max_new_tokens=3", "compare_with_base=True")
    run(qst_generate, "auto/peqa_4bit", *given(whole, *question))
    assert "with the tuned scales" in capsys.readouterr().out
    verify_directory(whole / "scales", directory)


def test_a_run_goes_on_after_the_directory_has_moved(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "qwen3", tmp_path / "before")
    further = ["model.reduction_factor=4", "epochs=2", "max_steps_per_epoch=1"]
    run(qst_finetune, "auto/qst", *arguments(root, tmp_path / "before", tmp_path / "o", *further))
    os.rename(tmp_path / "before", tmp_path / "after")
    further += ["epochs=3", "resume_from_checkpoint=True"]
    run(qst_finetune, "auto/qst", *arguments(root, tmp_path / "after", tmp_path / "o", *further))
    assert len(losses(tmp_path / "o")) == 3


def cut_off(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def only_gguf(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    (directory / "model-q4_k_m.gguf").write_bytes(b"GGUF")


def adapter(directory: Path) -> None:
    os.rename(directory / "config.json", directory / "adapter_config.json")
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def half_downloaded(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    keys = sorted(weights)
    save_file({keys[0]: weights[keys[0]]}, directory / names[0])
    index = {"weight_map": {key: names[i % 3] for i, key in enumerate(keys)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f), "checkpoint_dir={directory} does not exist; download"),
        (lambda f: (f / "config.json").unlink(), "{directory} has no config.json; it is not a"),
        (only_gguf, "{directory} has GGUF files only; name the directory of their original"),
        (
            adapter,
            "{directory} is a PEFT adapter, not a model; name the directory of its base model, or",
        ),
        (
            half_downloaded,
            "{directory} lacks 2 of its 3 weight files, for example model-00002-of-000",
        ),
        (cut_off, "{directory}/model.safetensors is damaged or cut off"),
        (
            lambda f: edit_config(f, model_type="qwen9"),
            "{directory}/config.json: transformers cannot read it",
        ),
        (
            lambda f: (f / "tokenizer.json").unlink(),
            "tokenizer: {directory} has no tokenizer.json and no other vocabulary: download it",
        ),
    ],
)
def test_a_wrong_directory_is_one_clear_line(
    change: Callable[[Path], None], message: str, root: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(root / "qwen2", tmp_path / "model")
    change(directory)
    given = arguments(root, directory, tmp_path / "out", "model.reduction_factor=4")
    with pytest.raises(UserError) as error:
        run(qst_finetune, "auto/qst", *given)
    # The one about the directory; where there is none, that of its tokenizer follows.
    first = str(error.value).splitlines()[0]
    assert message.format(directory=directory) in first
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_row_may_not_be_longer_than_the_models_positions(root: Path, tmp_path: Path) -> None:
    given = arguments(root, root / "mistral", tmp_path / "out", "tokenizer.max_seq_len=65")
    with pytest.raises(UserError, match="max_seq_len=65 is longer than the model's max_seq_len 64"):
        run(qst_finetune, "auto/qst", *given, "model.reduction_factor=4")
