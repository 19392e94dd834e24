"""A user's mistake: exit status 2, one line that helps, no traceback, and nothing written."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from qst_tune.recipes import qst_finetune
from safetensors.torch import load_file, save_file

from qst_tune.config.cli import run_recipe
from qst_tune.config.schema import TRAINING_KEYS
from tests.support.checkpoints import (
    Config,
    colour_rows,
    finetune_config,
    random_weights,
    write_checkpoint,
    write_config,
    write_jsonl,
)
from tests.support.recipe_runs import one_thread, run_tune

Change = Callable[[Path], Any]


class Mistake(NamedTuple):
    """One wrong thing, and what the message must say of it.

    ``arguments`` come after ``--config config.yaml`` in a directory that holds the files of
    ``finetune_config``; ``{root}`` stands for that directory. ``change`` alters its files before.
    """

    name: str
    arguments: list[str]
    message: list[str]
    change: Change = lambda root: None


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the checkpoint's weights."""

    def change(root: Path) -> None:
        path = root / "model" / "model.safetensors"
        weights = load_file(path)
        edit(weights)
        save_file(weights, path)

    return change


def remove(name: str) -> Change:
    def change(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def truncate(name: str, size: int) -> Change:
    return lambda root: os.truncate(root / name, size)


def truncate_up(path: Path) -> None:
    """Many zeros behind the text."""
    os.truncate(path, 10_000)


def write(name: str, text: str) -> Change:
    return lambda root: (root / name).write_text(text)


def edit_config(**changes: Any) -> Change:
    """Write the config.json of another model."""
    return lambda root: write_checkpoint(root / "model", random_weights(), **changes)


def nan_weight(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan


COSINE = [
    "lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
]
A_WEIGHT = "model.layers.1.mlp.up_proj.weight"
LONG_ROWS = [{"input": "x" * 200, "output": "y"}] * 8

MISTAKES = [
    # The command line.
    Mistake("override without =", ["foo"], ["'foo'", "key=value"]),
    Mistake("hydra's plus", ["+a=b"], ["'+a=b'", "key=value"]),
    Mistake("flag", ["--x", "1"], ["'--x'", "key=value"]),
    Mistake("empty override", [""], ["''", "key=value"]),
    Mistake("removing what is not there", ["~modl.rank"], ["modl.rank"]),
    Mistake("override of a branch below a value", ["seed.x=1"], ["seed={'x': 1} must be a whole"]),
    Mistake("override that is not YAML", ["seed={{"], ["overrides seed={"]),
    # The file.
    Mistake(
        "missing file",
        ["--config", "absent.yaml"],
        ["absent.yaml does not exist", "tune ls"],
    ),
    Mistake(
        "file that is not YAML",
        [],
        ["config.yaml cannot be read"],
        write("config.yaml", "model: [1\nx: }"),
    ),
    Mistake(
        "file that is a list", [], ["config.yaml is not a mapping"], write("config.yaml", "- 1\n")
    ),
    Mistake("binary file", [], ["config.yaml cannot be read"], truncate("config.yaml", 10**4)),
    Mistake("directory", ["--config", "{root}"], ["cannot be read", "directory"]),
    # Keys.
    Mistake("misspelt key", ["btch_size=2"], ["'btch_size'", "did you mean 'batch_size'?"]),
    Mistake("key of nothing", ["zzz=1"], ["unknown key 'zzz'"]),
    Mistake("missing key", ["~batch_size"], ["key 'batch_size' is missing"]),
    Mistake("null instead of a value", ["batch_size=null"], ["batch_size"]),
    Mistake("interpolation", ["output_dir=${{nowhere}}/x"], ["nowhere"]),
    # Components.
    Mistake("misspelt argument", ["model.rnk=4"], ["model: ", "'rnk'", "did you mean 'rank'?"]),
    Mistake("argument of nothing", ["loss.zzz=4"], ["loss: ", "'zzz'"]),
    Mistake("misspelt component", ["model=qst_tune.models.qst_lama"], ["model: ", "qst_lama"]),
    Mistake("component that is none", ["loss=qst_tune.modules"], ["loss: ", "not callable"]),
    Mistake("module that is none", ["optimizer=nowhere.Adam"], ["optimizer: ", "nowhere"]),
    Mistake("loss that does not exist", ["loss=torch.nn.CrossEntrpyLoss"], ["CrossEntrpyLoss"]),
    Mistake("loss that is no loss", ["loss=torch.nn.ReLU"], ["loss", "ReLU"]),
    Mistake("optimizer with a wrong argument", ["optimizer.momentum=1"], ["'momentum'"]),
    Mistake("optimizer with a wrong value", ["optimizer.lr=-1"], ["optimizer: ", "-1"]),
    Mistake(
        "model that is not QST",
        [
            "model=torchtune.models.llama3_2.llama3_2",
            "~model.reduction_factor",
            "~model.rank",
        ],
        ["model: ", "does not build a QST model", "qst_tune.models.qst_"],
    ),
    Mistake("missing size", ["~model.num_heads"], ["model: ", "num_heads"]),
    Mistake("block that is a value", ["loss=3"], ["loss"]),
    # The side network.
    Mistake("r that does not fit", ["model.reduction_factor=48"], ["48", "width 1", "2, 4, 8"]),
    Mistake("r of zero", ["model.reduction_factor=0"], ["reduction_factor=0", "2, 4"]),
    Mistake("unknown downsampler", ["model.downsample=conv"], ["'conv'", "linear, lora, adapter"]),
    Mistake("unknown variant", ["model.variant=mine"], ["'mine'", "default, paper, authors"]),
    Mistake("unknown mix", ["model.output_mix=max"], ["'max'", "residual, alpha, sigmoid"]),
    Mistake("rank of zero", ["model.rank=0"], ["rank=0", "at least 1"]),
    # Numbers.
    Mistake("batch size of zero", ["batch_size=0"], ["batch_size=0"]),
    Mistake("negative batch size", ["batch_size=-2"], ["batch_size=-2"]),
    Mistake("batch size in words", ["batch_size=two"], ["batch_size=two"]),
    Mistake("no epochs", ["epochs=0"], ["epochs=0"]),
    Mistake("fractional epochs", ["epochs=1.5"], ["epochs=1.5"]),
    Mistake("negative steps", ["max_steps_per_epoch=-1"], ["max_steps_per_epoch=-1"]),
    Mistake("negative accumulation", ["gradient_accumulation_steps=-1"], ["steps=-1"]),
    Mistake("seed in words", ["seed=x"], ["seed=x"]),
    Mistake("clipping in words", ["clip_grad_norm=x"], ["clip_grad_norm=x"]),
    Mistake("logging interval of zero", ["log_every_n_steps=0"], ["log_every_n_steps=0"]),
    Mistake("no checkpoints kept", ["keep_last_n_checkpoints=0"], ["keep_last_n_checkpoints=0"]),
    Mistake("checkpoint every half step", ["save_every_n_steps=0.5"], ["save_every_n_steps=0.5"]),
    Mistake("negative workers", ["num_workers=-1"], ["num_workers=-1"]),
    Mistake("patience of zero", ["early_stopping_patience=0"], ["early_stopping_patience=0"]),
    Mistake("negative bad steps", ["skip_bad_steps=-1"], ["skip_bad_steps=-1"]),
    Mistake("enormous seed", ["seed=5000000000"], ["seed=5000000000", "at most"]),
    Mistake("negative seed", ["seed=-1"], ["seed=-1"]),
    Mistake("clipping to zero", ["clip_grad_norm=0"], ["clip_grad_norm=0", "null"]),
    # Types.
    Mistake("rank in words", ["model.rank=four"], ["model.rank=four must be a whole number"]),
    Mistake("rank in fractions", ["model.rank=4.5"], ["model.rank=4.5 must be a whole number"]),
    Mistake("layers of null", ["model.num_layers=null"], ["num_layers=None must be a whole"]),
    Mistake("layers in words", ["model.num_layers=all"], ["model.num_layers=all must be a whole"]),
    Mistake("switch of the model", ["model.quantize_base=3"], ["quantize_base=3 must be True or"]),
    Mistake("shuffle of a number", ["shuffle=2"], ["shuffle=2 must be True or False"]),
    Mistake("shuffle in words", ["shuffle=maybe"], ["shuffle=maybe must be True or False"]),
    Mistake("compile in words", ["compile=max"], ["compile=max must be True or False"]),
    Mistake("resume from a path", ["resume_from_checkpoint=x"], ["resume_from_checkpoint=x must"]),
    Mistake("dry run of a number", ["dry_run=1"], ["dry_run=1 must be True or False"]),
    Mistake("packed in words", ["dataset.packed=some"], ["dataset.packed=some must be True or"]),
    Mistake(
        "warm-up in words", [*COSINE, "lr_scheduler.num_warmup_steps=x"], ["steps=x must be a"]
    ),
    Mistake("schedule of nothing", ["lr_scheduler.x=1"], ["lr_scheduler: _component_ is missing"]),
    Mistake("schedule that is a name", ["lr_scheduler=cosine"], ["lr_scheduler=cosine must be a"]),
    Mistake("list of losses", ["loss=[1]"], ["loss"]),
    Mistake("no warm-up steps", COSINE, ["lr_scheduler: ", "'num_warmup_steps'"]),
    Mistake(
        "learning rate in words", ["optimizer.lr=fast"], ["optimizer.lr=fast must be a number"]
    ),
    # What does not go together.
    Mistake("unknown policy", ["on_bad_row=ignore"], ["must be error, skip or null"]),
    Mistake(
        "unknown sharding",
        ["backbone_sharding=half"],
        ["backbone_sharding=half must be full, node or null"],
    ),
    Mistake(
        "compiled and sharded",
        ["backbone_sharding=full", "compile=True"],
        ["compile=True does not go with backbone_sharding=full"],
    ),
    Mistake(
        "kept states and a sharded backbone",
        ["backbone_sharding=full", "hidden_state_cache=states"],
        ["hidden_state_cache=states does not go with backbone_sharding=full", "one to null"],
    ),
    Mistake("cache of a number", ["hidden_state_cache=3"], ["hidden_state_cache=3 must be a path"]),
    Mistake(
        "cache below a file",
        ["hidden_state_cache={root}/val.jsonl/x"],
        ["hidden_state_cache=", "cannot be written", "val.jsonl is not a writable directory"],
    ),
    Mistake(
        "nothing to offload",
        ["fsdp_cpu_offload=True"],
        ["fsdp_cpu_offload=True offloads", "set backbone_sharding=full"],
    ),
    Mistake("two validation sets", ["val_fraction=0.1"], ["val_fraction and dataset_val"]),
    Mistake(
        "everything held out",
        ["dataset_val=null", "val_fraction=1"],
        ["val_fraction=1 must be a number above 0 and below 1"],
    ),
    Mistake(
        "nothing held out",
        ["dataset_val=null", "val_fraction=0"],
        ["val_fraction=0 must be a number above 0 and below 1"],
    ),
    Mistake(
        "patience without a validation set",
        ["dataset_val=null", "early_stopping_patience=2"],
        ["early_stopping_patience needs a validation set", "val_fraction=0.05"],
    ),
    Mistake(
        "patience without validation on the way",
        ["early_stopping_patience=2"],
        ["early_stopping_patience needs run_val_every_n_steps or more epochs"],
    ),
    Mistake(
        "log file in a directory of nothing",
        ["metric_logger.filename=a/b/c"],
        ["metric_logger: filename=a/b/c", "does not exist"],
    ),
    Mistake("profiler of nothing", ["profiler.enabled=True"], ["profiler: _component_ is missing"]),
    Mistake("profiler that is a name", ["profiler=on"], ["profiler=True must be a block"]),
    Mistake("mode of nothing", ["cudnn_deterministic_mode=3"], ["mode=3 must be 0, 1, 2, "]),
    Mistake("mode in words", ["cudnn_deterministic_mode=foo"], ["foo must be 0, 1, 2"]),
    Mistake("stream of rows", ["dataset.streaming=True"], ["dataset: streaming=True", "False"]),
    Mistake("collate of a number", ["collate_fn=3"], ["collate_fn=3 must be text"]),
    Mistake(
        "optimizer that needs a closure",
        ["optimizer=torch.optim.LBFGS", "~optimizer.weight_decay"],
        ["optimizer: torch.optim.LBFGS cannot train this model"],
    ),
    Mistake(
        "optimizer without a finite step",
        ["optimizer.weight_decay=.inf"],
        ["optimizer: its first step gives", "weight_decay=inf"],
    ),
    Mistake("rate that is no number", ["optimizer.lr=.nan"], ["optimizer"]),
    Mistake(
        "schedule without a rate",
        [*COSINE, "lr_scheduler.num_warmup_steps=0", "lr_scheduler.num_cycles=.nan"],
        ["lr_scheduler", "a learning rate of 0"],
    ),
    Mistake("logger of nothing", ["metric_logger=builtins.dict"], ["metric_logger: builtins.dict"]),
    Mistake(
        "log file in a directory of nothing",
        ["metric_logger.filename=a/b/c"],
        ["metric_logger: filename=a/b/c", "does not exist"],
    ),
    Mistake("profiler of nothing", ["profiler._component_=builtins.dict"], ["profiler: builtins"]),
    Mistake("collate that takes no rows", ["collate_fn=os.system"], ["collate_fn=os.system"]),
    Mistake(
        "number out of reach", ["batch_size=99999999999999999999999"], ["batch_size=", "at most"]
    ),
    Mistake("device without memory", ["device=meta"], ["device=meta cannot be used"]),
    Mistake(
        "keys that refer to each other",
        ["seed=${{batch_size}}", "batch_size=${{seed}}"],
        ["seed", "Recursive interpolation"],
    ),
    Mistake(
        "optimizer of sparse gradients",
        ["optimizer=torch.optim.SparseAdam", "~optimizer.weight_decay"],
        ["optimizer: torch.optim.SparseAdam cannot train this model", "dense"],
    ),
    # The machine.
    Mistake("dtype of nothing", ["dtype=fp7"], ["dtype=fp7", "bf16, fp16 or fp32"]),
    Mistake("device of nothing", ["device=abacus"], ["device=abacus", "cannot be used"]),
    Mistake("offloading", ["enable_activation_offloading=True"], ["offload", "set it to False"]),
    # The output directory; root may write anywhere, but not below a file.
    Mistake("output below a file", ["output_dir={root}/val.jsonl/x"], ["output_dir=", "val.jsonl"]),
    Mistake("output is a file", ["output_dir={root}/val.jsonl"], ["output_dir=", "not writable"]),
    Mistake("output in /proc", ["output_dir=/proc/qst/x"], ["output_dir=/proc/qst/x"]),
    # The checkpoint.
    Mistake(
        "missing directory",
        ["checkpointer.checkpoint_dir={root}/absent", "tokenizer.path={root}/model"],
        ["absent does not exist", "tune download"],
    ),
    Mistake("no directory named", ["checkpointer.checkpoint_dir=null"], ["checkpoint_dir"]),
    Mistake("no files named", ["~checkpointer.checkpoint_files"], ["checkpoint_files"]),
    Mistake("missing weights file", [], ["model.safetensors"], remove("model/model.safetensors")),
    Mistake("missing config.json", [], ["config.json"], remove("model/config.json")),
    Mistake("damaged config.json", [], ["config.json", "JSON"], truncate("model/config.json", 100)),
    Mistake(
        "truncated weights file",
        [],
        ["model.safetensors", "damaged"],
        truncate("model/model.safetensors", 10_000),
    ),
    Mistake(
        "empty weights file",
        [],
        ["model.safetensors", "damaged"],
        truncate("model/model.safetensors", 0),
    ),
    Mistake(
        "wrong model type",
        ["checkpointer.model_type=LAMA"],
        ["checkpointer: ", "FullModelHFCheckpointer", "KeyError: 'LAMA'"],
    ),
    Mistake("number of layers", ["model.num_layers=2"], ["num_layers is 3", "and 2 in the model"]),
    Mistake("width", ["model.embed_dim=96"], ["embed_dim is 64", "and 96 in the model"]),
    Mistake("number of heads alone", ["model.num_heads=2"], ["num_heads is 4", "and 2 in"]),
    Mistake("rotary base alone", ["model.rope_base=500"], ["rope_base is 10000.0", "500.0"]),
    Mistake("rotary scaling alone", ["model.scale_factor=8"], ["scale_factor is 1.0", "8.0"]),
    Mistake(
        "rotary base as transformers 5 writes it",
        [],
        ["rope_base is 999.0"],
        edit_config(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 999.0}),
    ),
    Mistake(
        "missing weight",
        [],
        ["lacks 1 of", "layers.1.mlp.w3.weight"],
        edit_weights(lambda w: w.pop(A_WEIGHT)),
    ),
    Mistake(
        "weight too many",
        [],
        ["model.layers.1.self_attn.q_proj.bias"],
        edit_weights(lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})),
    ),
    Mistake(
        "weight of another model",
        [],
        ["strange.weight"],
        edit_weights(lambda w: w.update({"strange.weight": torch.zeros(64)})),
    ),
    Mistake(
        "weight of another shape",
        [],
        ["layers.1.mlp.w3.weight", "(96, 32)", "(96, 64)"],
        edit_weights(lambda w: w.update({A_WEIGHT: w[A_WEIGHT][:, :32].contiguous()})),
    ),
    # The tokenizer.
    Mistake(
        "missing tokenizer directory",
        ["tokenizer.path={root}/absent"],
        ["tokenizer: ", "absent does not exist"],
    ),
    Mistake("no tokenizer in it", ["tokenizer.path={root}"], ["tokenizer: ", "tokenizer.json"]),
    Mistake(
        "tokenizer longer than the model",
        ["tokenizer.max_seq_len=256"],
        ["tokenizer.max_seq_len=256", "max_seq_len 128", "lower it"],
    ),
    Mistake(
        "damaged tokenizer",
        [],
        ["tokenizer: ", "tokenizer.json or a file beside it is damaged", "char 100"],
        truncate("model/tokenizer.json", 100),
    ),
    # The data.
    Mistake("missing data", ["dataset.data_files={root}/no.jsonl"], ["dataset: ", "no.jsonl"]),
    Mistake("missing validation set", [], ["dataset_val: ", "val.jsonl"], remove("val.jsonl")),
    Mistake("empty data", [], ["dataset", "train.jsonl"], write("train.jsonl", "")),
    Mistake("malformed data", [], ["dataset: ", "JSON"], write("train.jsonl", '{"input": 1\n{]')),
    Mistake("data of another format", ["dataset.source=csv"], ["dataset"]),
    Mistake("binary data", [], ["dataset: "], lambda root: truncate_up(root / "train.jsonl")),
    Mistake(
        "data that is a directory", ["dataset.data_files={root}/model"], ["dataset: ", "model"]
    ),
    Mistake("rows that are lists", [], ["dataset"], write("train.jsonl", "[1, 2]\n" * 8)),
    Mistake("rows that are numbers", [], ["dataset"], write("train.jsonl", "7\n" * 8)),
    Mistake(
        "numbers where text should be",
        [],
        ["dataset: row 0 of", "train.jsonl (line 1) cannot be used"],
        write("train.jsonl", '{"input": 1, "output": 2}\n' * 8),
    ),
    Mistake(
        "null where text should be",
        [],
        ["dataset: row 0 of", "train.jsonl (line 1) cannot be used"],
        write("train.jsonl", '{"input": null, "output": null}\n' * 8),
    ),
    Mistake(
        "one bad row in the middle",
        [],
        ["dataset: row 5 of", "train.jsonl (line 6) cannot be used"],
        lambda root: write_jsonl(
            root / "train.jsonl", [*colour_rows(5), {"input": "x"}, *colour_rows(2)]
        ),
    ),
    Mistake(
        "one bad row in a packed dataset",
        ["dataset.packed=True"],
        ["dataset: row 5 of", "train.jsonl (line 6) cannot be used"],
        lambda root: write_jsonl(
            root / "train.jsonl", [*colour_rows(5), {"input": "x"}, *colour_rows(2)]
        ),
    ),
    Mistake(
        "row longer than the model",
        ["tokenizer.max_seq_len=null", "dataset_val=null"],
        ["tokens is longer than the model's max_seq_len 128", "tokenizer.max_seq_len=128"],
        lambda root: write_jsonl(root / "train.jsonl", LONG_ROWS),
    ),
    Mistake(
        "validation row longer than the model",
        ["tokenizer.max_seq_len=null"],
        ["tokens is longer than the model's max_seq_len 128", "tokenizer.max_seq_len=128"],
        lambda root: write_jsonl(root / "val.jsonl", colour_rows(3) + LONG_ROWS),
    ),
    Mistake(
        "data without the columns",
        [],
        ["dataset", "input"],
        write("train.jsonl", '{"a": "b"}\n' * 8),
    ),
    Mistake(
        "packing without a length",
        ["dataset.packed=True", "tokenizer.max_seq_len=null"],
        ["dataset: ", "max_seq_len"],
    ),
    Mistake("unknown collate function", ["collate_fn=torchtune.data.pad"], ["collate_fn", "pad"]),
    Mistake("unknown schedule", ["lr_scheduler._component_=torchtune.no"], ["lr_scheduler", "no"]),
]
if not torch.cuda.is_available():
    MISTAKES.append(Mistake("device not there", ["device=cuda"], ["device=cuda", "cannot be used"]))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    directory = tmp_path_factory.mktemp("template")
    return directory, finetune_config(directory)


@pytest.fixture
def root(template: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh directory with a model, data and a config, as the current directory."""
    shutil.copytree(template[0], tmp_path, dirs_exist_ok=True)
    write_config(tmp_path / "config.yaml", finetune_config(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(root: Path, mistake: Mistake, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Make the mistake; returns the exit status."""
    mistake.change(root)
    arguments = [argument.format(root=root) for argument in mistake.arguments]
    monkeypatch.setattr(sys, "argv", ["qst_finetune", "--config", "config.yaml", *arguments])
    with one_thread(), pytest.raises(SystemExit) as exit_info:
        run_recipe(qst_finetune.main)
    return exit_info.value.code


def assert_helpful(errors: str, mistake: Mistake) -> None:
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    missing = [part for part in mistake.message if part not in lines[0]]
    assert missing == [], lines[0]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_one_helpful_line_and_leaves_nothing(
    mistake: Mistake,
    root: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {path.name for path in root.iterdir()}
    status = run(root, mistake, monkeypatch)
    assert_helpful(capfd.readouterr().err, mistake)
    assert status == 2
    assert {path.name for path in root.iterdir()} - before <= {"cache"}


def test_mistakes_of_a_file_are_all_reported_with_their_lines(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(root)
    config["model"]["rnk"] = 4
    config["optimizer"]["lr"] = "fast"
    config["btch_size"] = 2
    config["dataset"] = [config["dataset"], {**config["dataset"], "packed": "no"}]
    path = write_config(root / "config.yaml", config)
    texts = path.read_text().splitlines()

    def line(text: str) -> int:
        return next(i for i, line in enumerate(texts, start=1) if line.strip().startswith(text))

    assert run(root, Mistake("", ["epochs=0", "loss.x=1"], []), monkeypatch) == 2
    errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert errors == [
        "error: config: unknown key 'btch_size'; did you mean 'batch_size'? "
        f"(config.yaml:{line('btch_size')})",
        "error: config: model: qst_tune.models.qst_llama3_2 takes no argument 'rnk'; "
        f"did you mean 'rank'? (config.yaml:{line('rnk')})",
        f"error: config: dataset[1].packed=no must be True or False (config.yaml:{line('packed')})",
        f"error: config: optimizer.lr=fast must be a number (config.yaml:{line('lr:')})",
        "error: config: loss: qst_tune.modules.LinearCrossEntropyLoss takes no argument 'x'",
        "error: config: epochs=0 must be a whole number of at least 1",
    ]


def test_dry_run_tells_steps_and_memory_and_writes_nothing(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name for path in root.iterdir()}
    monkeypatch.setattr(sys, "argv", ["x", "--config", "config.yaml", "dry_run=true", "epochs=3"])
    with one_thread():
        run_recipe(qst_finetune.main)
    lines = capfd.readouterr().out.splitlines()
    assert (
        "dry run: 6 steps in 3 epochs of 8 rows, 5 rows for validation; nothing was written"
        in lines
    )
    assert any(line.startswith("QST") for line in lines)
    assert {path.name for path in root.iterdir()} - before <= {"cache"}


def test_dry_run_finds_what_only_the_checkpoint_contradicts(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake = Mistake("", ["dry_run=true", "model.rope_base=500"], ["rope_base is 10000.0"])
    assert run(root, mistake, monkeypatch) == 2
    assert_helpful(capfd.readouterr().err, mistake)


def test_two_mistakes_are_two_lines(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(root, Mistake("", ["btch_size=2", "epoch=3"], []), monkeypatch) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == [
        "error: config: unknown key 'btch_size'; did you mean 'batch_size'?",
        "error: config: unknown key 'epoch'; did you mean 'epochs'?",
    ]


def test_empty_file_lacks_every_required_key(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "config.yaml").write_text("")
    assert run(root, Mistake("", [], []), monkeypatch) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    required = [name for name, key in TRAINING_KEYS.items() if key.required]
    assert lines == [f"error: config: key {key!r} is missing" for key in required]


def test_through_tune_it_is_the_same(root: Path) -> None:
    mistake = next(m for m in MISTAKES if m.name == "rotary base alone")
    result = run_tune(
        "run", "qst_finetune", "--config", "config.yaml", *mistake.arguments, cwd=root
    )
    assert result.returncode == 2
    assert_helpful(result.stderr, mistake)
    assert not (root / "run").exists()


def test_a_mistake_keeps_what_was_there(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "run").mkdir()
    (root / "run" / "notes.txt").write_text("mine")
    mistake = next(m for m in MISTAKES if m.name == "missing weight")
    assert run(root, mistake, monkeypatch) == 2
    assert [path.name for path in (root / "run").iterdir()] == ["notes.txt"]


def test_config_of_this_file_is_without_mistakes(root: Path) -> None:
    """Otherwise each test above could see this file's mistake instead of its own."""
    with one_thread():
        qst_finetune.main(OmegaConf.load("config.yaml"))
    assert (root / "run" / "side_network").is_dir()
