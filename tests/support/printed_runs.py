"""Runs what README and docs print, with a tiny model and tiny data in the place of theirs."""

import argparse
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torchtune._recipe_registry as registry
from omegaconf import DictConfig, OmegaConf
from torchtune._cli.tune import TuneCLIParser

from qst_tune.config.file import parse_config
from tests.support.checkpoints import SIZES, colour_rows, write_jsonl, write_model_directory
from tests.support.documented_commands import ROOT, Printed
from tests.support.fake_hub import TOKEN, serving, use
from tests.support.recipe_runs import one_thread

CONFIGS = ROOT / "configs"
# Longer than the default rows of the configs.
TINY = {**SIZES, "max_seq_len": 512}
_PLACEHOLDER = re.compile(
    r"(?:(?P<key>[\w.-]+)=)?(?:<(?P<name>[^<>]+)>|(?P<word>FILE|DIRECTORY)\b)"
)


_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object"}},
}


class Place:
    """A directory in which the commands run: what a reader has at hand, but tiny."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / ".cache/qst_tune"  # as `make quickstart` leaves it
        self.model = self.cache / "SmolLM2-135M-Instruct"
        write_model_directory(self.model, sizes=TINY)
        (self.cache / "python_docs").mkdir()
        self.rows = write_jsonl(self.cache / "python_docs/train.jsonl", colour_rows(8))
        write_jsonl(self.cache / "python_docs/heldout.jsonl", colour_rows(4, prefix="tell me "))
        write_jsonl(root / "my.jsonl", colour_rows(8))
        self.pairs = write_jsonl(root / "pairs.jsonl", [_pair(row) for row in colour_rows(8)])
        columns = ("sentence", "sentence1", "sentence2", "premise", "hypothesis")
        reviews = [
            {**dict.fromkeys(columns, row["input"]), "label": i % 2}
            for i, row in enumerate(colour_rows(8))
        ]
        alpaca = [{"instruction": r["input"], **r} for r in colour_rows(8)]
        self.alpaca = write_jsonl(root / "alpaca.jsonl", alpaca)
        (root / "tools.json").write_text(json.dumps([_TOOL]))
        self.reviews = write_jsonl(root / "reviews.jsonl", reviews)
        question = {"question": "which?", "choices": ["a", "b", "c", "d"], "answer": 1}
        question["subject"] = "colours"
        self.questions = write_jsonl(root / "questions.jsonl", [question] * 2)
        self.text = root / "text.txt"
        self.text.write_text("what is the colour of the box " * 4)
        for name in ("qst", "qst_dpo", "peqa_4bit"):
            copy = name.removeprefix("qst").strip("_").removesuffix("_4bit").upper()
            text = (CONFIGS / f"smollm2/135M_{name}.yaml").read_text()
            (root / (f"{copy}_CONFIG" if copy else "CONFIG")).write_text(text)
        write_jsonl(self.cache / "preferences.jsonl", [_pair(row) for row in colour_rows(8)])
        self.estimated: set[frozenset[str]] = set()
        self._fresh = 0

    def fresh(self) -> str:
        """A path that does not exist yet."""
        self._fresh += 1
        return str(self.root / f"new_{self._fresh}")

    def side_network(self, config: str) -> Path:
        """What the training config of that kind has left."""
        name = "auto_qst" if config.startswith("auto") else "135M_qst"
        directory = (
            self.root / "tmp/qst_tune/auto_qst" if "auto" in name else self.cache / f"runs/{name}"
        )
        if not directory.exists():
            train = "auto/qst" if "auto" in name else "smollm2/135M_qst"
            run(Printed("trained before", f"tune run qst_finetune --config {train}"), self)
        return directory / "side_network"

    def filled(self, command: str) -> list[str]:
        """The words of a command, with something real for each placeholder."""
        config = command.partition("--config ")[2].split(" ")[0]

        def fill(found: re.Match[str]) -> str:
            key, name = found["key"], found["name"] or found["word"]
            value = self._value(key or "", name, command, config)
            return f"{key}={value}" if key else value

        words = shlex.split(_PLACEHOLDER.sub(fill, command))
        return [str(self.root / word[2:]) if word[:2] == "~/" else word for word in words]

    def _value(self, key: str, name: str, command: str, config: str) -> str:
        leaf = key.rpartition(".")[2]
        if name.startswith("NEW") or leaf in ("cache_dir", "hidden_state_cache", "to_authors"):
            return self.fresh()
        known = {
            "checkpoint_dir": self.model, "path": self.model, "text": self.text,
            "questions": self.questions, "examples": self.questions,
            "base_quantization": "nf4", "embedding_quantization": "int8",
            "data_files": self.alpaca if "alpaca" in command else self._rows(config),
            "RUN": self.cache / "runs/135M_qst", "BACKBONE": self.model,
            "DATA": "dataset.source=json", "SHARED": self.root / "shared",
            "ORG/MODEL": "some-org/model", "HUB NAME": "some-org/model", "NAME": "me/mine",
            "ORG/NAME": "me/mine", "CONFIG": "smollm2/135M_qst", "ORGANISATION": "org",
            "MODEL": "model", "HF_TOKEN": "a-token", "DIRECTORY": self.model, "DIR": self.model,
        }  # fmt: skip
        if name in ("THEIRS", "OURS"):
            return self._authors(name)
        if leaf == "side_network":
            return str(self.side_network(config))
        found = known.get(leaf) or known.get(name)
        if name == "RUN":
            self.side_network("smollm2")
        if found is None:
            raise ValueError(f"no tiny thing is known for <{name}> of {command}")
        return str(found)

    def _authors(self, name: str) -> str:
        """A side network as the authors' code computes it, as a directory of ours or of theirs."""
        ours, theirs = self.root / "authors/side_network", self.root / "theirs"
        if not ours.exists():
            config = "--config llama2/7B_qst"
            train = f"tune run qst_finetune {config} model.variant=authors model.reduction_factor=4"
            run(Printed("before", f"{train} output_dir={ours.parent}"), self)
            export = f"tune run qst_convert {config} side_network={ours} to_authors={theirs}"
            run(Printed("before", export), self)
        return str(ours if name == "OURS" else theirs)

    def _rows(self, config: str) -> Path:
        return {"dpo": self.pairs, "sst2": self.reviews}.get(config.rpartition("_")[2], self.rows)


def _pair(row: dict[str, str]) -> dict[str, Any]:
    asked = {"role": "user", "content": row["input"]}
    answers = {"chosen": row["output"], "rejected": "no"}
    return {k: [asked, {"role": "assistant", "content": a}] for k, a in answers.items()}


def run(printed: Printed, place: Place) -> None:
    """Run a command in this process; a mistake of it is an exception.

    Raises:
        ValueError: if it is none that is known here.
    """
    if printed.is_python:
        _snippet(printed, place)
        return
    if "runs/first" in printed.text:
        _first_run(place)
    typed, _, command = printed.text.rpartition(" | ")
    words = place.filled(command)
    program = Path(words[0]).name
    with _inside(place, shlex.split(typed)[1] if typed else "what is it"):
        if program == "tune":
            _tune(words[1:], place)
        elif program == "python" and words[1] == "-m":
            _module(words[2], words[3:])
        elif program == "make":
            quiet = {"cwd": ROOT, "capture_output": True, "check": True}
            subprocess.run(["make", "--dry-run", *words[1:]], **quiet)
        elif program == "pip":
            _pip(words[1:])
        elif program == "hf":
            _only_helped("huggingface_hub.cli.hf", words[1:])
        else:
            raise ValueError(f"{printed}: no known program")


@contextmanager
def _inside(place: Place, typed: str = ""):
    before = Path.cwd()
    os.chdir(place.root)
    environment = {
        "HOME": str(place.root),
        "XDG_CACHE_HOME": str(place.root / ".cache"),
        "HF_HUB_OFFLINE": "1",
    }
    stdin = io.StringIO(f"{typed}\n/exit\n")
    try:
        with mock.patch.dict(os.environ, environment), mock.patch("sys.stdin", stdin), one_thread():
            yield
    finally:
        os.chdir(before)


def _tune(words: list[str], place: Place) -> None:
    if words[0] == "download":
        TuneCLIParser()._parser.parse_args(words)
        return
    if words[0] == "run":
        _recipe(words[1:], place)
        return
    with mock.patch("sys.argv", ["tune", *words]):
        parser = TuneCLIParser()
        parser.run(parser.parse_args())


def _recipe(words: list[str], place: Place) -> None:
    """Of a launcher's command (``--nproc_per_node``) what each process runs."""
    parsed = TuneCLIParser()._parser.parse_args(["run", *words])
    name, arguments = parsed.recipe, list(parsed.recipe_args)
    if "--help" in arguments:
        _only_helped(f"qst_tune.recipes.{name}", [])
        return
    index = arguments.index("--config") + 1
    shipped = CONFIGS / f"{arguments[index]}.yaml"
    arguments[index] = str(shipped if shipped.is_file() else arguments[index])
    known = {recipe.name: recipe for recipe in registry.get_all_recipes()}
    if name not in known:
        raise ValueError(f"no recipe {name}")
    cfg = shrunk(parse_config(arguments), place)
    if name == "qst_estimate":
        _shrink_estimate(cfg)
        keys = frozenset(word.partition("=")[0] for word in arguments[index + 1 :])
        if keys - {"checkpoint_dir"} in place.estimated:
            return  # the same question about another model: each takes seconds
        place.estimated.add(keys - {"checkpoint_dir"})
    if name in ("qst_chat", "qst_generate"):
        cfg.max_new_tokens = 3
    _train_before(name, cfg, arguments[index], place)
    if (ROOT / f"recipes/{name}.py").is_file():
        import_module(f"qst_tune.recipes.{name}").main(cfg)
        return
    OmegaConf.save(cfg, place.root / "stock.yaml")
    stock = Path(sys.modules["torchtune"].__file__).parents[1] / "recipes" / known[name].file_path
    arguments = mock.patch("sys.argv", [name, "--config", str(place.root / "stock.yaml")])
    with arguments, _ending_well():
        runpy.run_path(str(stock), run_name="__main__")


def _first_run(place: Place) -> None:
    """The results that a page goes on from."""
    first = place.root / "runs/first"
    if not first.exists():
        train = "tune run peqa_finetune --config smollm2/135M_peqa_4bit"
        run(Printed("before", train), place)
        first.mkdir(parents=True)
        shutil.copytree(place.cache / "runs/135M_peqa_4bit/scales", first / "scales")
        shutil.copytree(place.side_network("smollm2"), first / "side_network")


def _train_before(name: str, cfg: DictConfig, config: str, place: Place) -> None:
    """What a use of the result, or its going on, takes for granted."""
    is_use = name in ("qst_chat", "qst_generate", "qst_evaluate")
    if is_use and "side_network" not in cfg and not Path(cfg.output_dir, "side_network").exists():
        train = shrunk(parse_config(["--config", config]), place)
        import_module("qst_tune.recipes.qst_finetune").main(train)
    if cfg.get("resume_from_checkpoint"):
        train = shrunk(parse_config(["--config", config]), place)
        import_module(f"qst_tune.recipes.{name}").main(train)
    if name == "peqa_export":
        shutil.rmtree(Path(cfg.output_dir, cfg.get("format", "dense")), ignore_errors=True)
    if name == "peqa_export" and not Path(cfg.output_dir, "scales").exists():
        import_module("qst_tune.recipes.peqa_finetune").main(
            shrunk(parse_config(["--config", config]), place)
        )
    quickstart = place.cache / "runs/135M_qst/side_network"
    if name == "generate" or cfg.get("side_network") == str(quickstart):
        place.side_network("smollm2")


def shrunk(cfg: DictConfig, place: Place) -> DictConfig:
    """The config with the tiny model for its own, and local rows for those of a hub."""
    if "checkpoint_dir" in cfg:
        cfg.checkpoint_dir = str(place.model)
    elif "model" in cfg and not cfg.model._component_.endswith("_from_hf"):
        _shrink_model(cfg, place)
    _shrink_depths(cfg.get("model") or {})
    for name in ("dataset", "dataset_val"):
        if cfg.get(name) is not None:
            _shrink_data(cfg[name], place)
    if cfg.get("output_dir", "").startswith("/"):
        inside = str(cfg.output_dir).startswith(str(place.root))
        cfg.output_dir = cfg.output_dir if inside else f"{place.root}{cfg.output_dir}"
    limits = {"batch_size": 2, "gradient_accumulation_steps": 1, "max_new_tokens": 3, "epochs": 2}
    for name, limit in limits.items():
        if name in cfg:
            cfg[name] = min(cfg[name], limit)
    if "${cache}" not in OmegaConf.to_yaml(cfg):
        cfg.pop("cache", None)  # a key that nothing refers to is a mistake
    if cfg.get("tokenizer", {}).get("max_seq_len"):
        cfg.tokenizer.max_seq_len = min(cfg.tokenizer.max_seq_len, TINY["max_seq_len"])
    return cfg


def _shrink_estimate(cfg: DictConfig) -> None:
    """Short rows, of which a batch of two fits."""
    cfg.tokenizer.max_seq_len = 8
    if "fit_gib" in cfg:
        cfg.fit_gib = 1e-6


def _shrink_model(cfg: DictConfig, place: Place) -> None:
    old = cfg.model._component_
    method = "peqa" if ".peqa_" in old else "qst"
    if old.endswith("qst_classifier"):
        cfg.model.backbone = "torchtune.models.llama3_2.llama3_2"
    else:
        cfg.model._component_ = f"qst_tune.models.{method}_llama3_2"
    for name, value in TINY.items():
        cfg.model[name] = value
    tokenizer = {"_component_": "qst_tune.data.hf_chat_tokenizer", "path": str(place.model)}
    for name in ("max_seq_len", "pad_token"):
        if name in cfg.tokenizer:
            tokenizer[name] = cfg.tokenizer[name]
    cfg.tokenizer = tokenizer
    cfg.checkpointer.checkpoint_dir = str(place.model)
    cfg.checkpointer.checkpoint_files = ["model.safetensors"]
    cfg.checkpointer.output_dir = str(place.root / "unused")
    cfg.checkpointer.model_type = "LLAMA3_2"
    if "TunedCheckpointer" not in cfg.checkpointer._component_:
        cfg.checkpointer._component_ = "torchtune.training.FullModelHFCheckpointer"


def _shrink_depths(model: Any) -> None:
    for name in ("lora_layers", "num_side_blocks"):
        if model.get(name):
            model[name] = min(model[name], TINY["num_layers"])


def _shrink_data(block: DictConfig, place: Place) -> None:
    if block.get("data_files"):
        return  # of this machine: it must be there
    if "glue" in block._component_:
        block.update(source="json", data_files=str(place.reviews), split="train")
    else:
        block.clear()
        block._component_ = "torchtune.datasets.instruct_dataset"
        block.update(source="json", data_files=str(place.rows))


def _module(name: str, words: list[str]) -> None:
    if name.startswith("benchmarks") or name == "qst_tune.quickstart":
        _only_parsed(name, words)
    elif name == "qst_tune.sharing":
        with pytest.MonkeyPatch.context() as patch, serving(Path("served")) as hub:
            use(patch, hub.url, Path("home").absolute())
            patch.setenv("HF_TOKEN", TOKEN)
            _sharing(words)
    else:
        raise ValueError(f"python -m {name} is not known")


def _sharing(words: list[str]) -> None:
    if words[0] == "share":  # printed more than once
        shutil.rmtree(words[2], ignore_errors=True)
    with _ending_well():
        import_module("qst_tune.sharing.__main__").main(words)


class _Parsed(Exception):  # noqa: N818  # no error
    """The arguments are right."""


def _only_parsed(name: str, words: list[str]) -> None:
    """Start a program that takes hours, or needs a network, and stop it behind its parser."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise _Parsed

    arguments = mock.patch("sys.argv", [name, *words])
    parser = mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args)
    try:
        with arguments, parser, redirect_stdout(io.StringIO()):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
    except _Parsed:
        return
    raise ValueError(f"{name} parsed no arguments")


def _only_helped(name: str, words: list[str]) -> None:
    """A command that needs a network: its help is there."""
    arguments = mock.patch("sys.argv", [name, *words, "--help"])
    with arguments, redirect_stdout(io.StringIO()), _ending_well():
        runpy.run_module(name, run_name="__main__", alter_sys=True)


@contextmanager
def _ending_well():
    """A program that exits, with a status of 0."""
    try:
        yield
    except SystemExit as stopped:
        if stopped.code:
            raise RuntimeError(f"exit status {stopped.code}") from stopped


def _pip(words: list[str]) -> None:
    """Requirements of this directory exist; the package itself is on no index yet."""
    for word in words[1:]:
        path, _, extras = word.rstrip("]").partition("[")
        if path.startswith("qst_tune"):
            raise ValueError(f"pip install {word}: the package is not on an index")
        text = (ROOT / "pyproject.toml").read_text()
        missing = [extra for extra in extras.split(",") if extra and f"\n{extra} = [" not in text]
        if missing or not (word == "-c" or (ROOT / path).exists()):
            raise ValueError(f"pip install {word}: there is no such thing here")


def _snippet(printed: Printed, place: Place) -> None:
    """Run a snippet of Python as it is printed."""
    code = printed.text.replace("<RUN>", str(place.side_network("smollm2").parent))
    code = code.replace("<DIR>", str(place.model))
    with _inside(place):
        exec(compile(code, printed.place, "exec"), {})
