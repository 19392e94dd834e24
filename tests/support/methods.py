"""The methods that train something, each on tiny data, in one table."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from qst_tune.recipes import peqa_finetune, qst_dpo, qst_finetune
from safetensors.torch import load_file
from torchtune.data import Message

from qst_tune.config.schema import TunedModelConfig
from qst_tune.data import hf_chat_tokenizer
from qst_tune.results.loading import TunedModel, load_tuned_model
from tests.support.checkpoints import SIZES, Config, finetune_config, write_jsonl
from tests.support.configs import typed_config
from tests.support.recipe_runs import FinetuneResult, merged, one_thread, val_loss

TEMPLATE = "box {text} is"
LABELS = ["red", "blue"]


@dataclass(frozen=True)
class Method:
    """How to train with one method and how to measure its result without the training code.

    ``loss_of(model, root)`` is the validation loss of a loaded :class:`TunedModel`.
    """

    name: str
    recipe: ModuleType
    config: Callable[[Path], Config]
    loss_of: Callable[[TunedModel, Path], float]
    result: str = "side_network"
    slow: bool = False

    def run(self, root: Path, output_dir: Path, *overrides: str) -> FinetuneResult:
        """Train inside this process; data and model are in ``root``."""
        with one_thread():
            self.recipe.main(merged(self.config(root), f"output_dir={output_dir}", *overrides))
        return FinetuneResult(output_dir)

    def load(self, root: Path, directory: Path | None) -> TunedModel:
        """Load the result in ``directory``, or the base model, as chat and evaluation do."""
        path = "null" if directory is None else directory
        raw = merged(self.config(root), f"{self.result}={path}", f"output_dir={root / 'none'}")
        cfg = typed_config(raw, TunedModelConfig)
        return load_tuned_model(cfg, "classes" if self.name == "classifier" else "text")

    def tensors(self, directory: Path) -> dict[str, torch.Tensor]:
        """What was trained, as it is on disk."""
        return load_file(directory / self.result / f"{self.result}.safetensors")

    def description(self, directory: Path) -> dict[str, Any]:
        """The JSON beside the tensors."""
        name = {"side_network": "qst_config.json", "scales": "peqa_config.json"}[self.result]
        return json.loads((directory / self.result / name).read_text())


# Data and configs.


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    """The class is whether the text has an x, in rows of different lengths."""
    if path.exists():  # a new file would be read into a new cache
        return path
    texts = [
        "ab" * (i % 3 + 1) + ("x" if i % 2 else "y") + "c" * (i % 2) for i in range(start, count)
    ]
    return write_jsonl(path, [{"text": t, "label": LABELS[int("x" in t)]} for t in texts])


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


def write_pairs(path: Path, count: int) -> Path:
    """Blue is always better than red."""
    if path.exists():
        return path
    questions = [f"what is the colour of box {i}" for i in range(count)]
    pairs = [
        {"chosen": conversation(q, "it is blue"), "rejected": conversation(q, "it is red")}
        for q in questions
    ]
    return write_jsonl(path, pairs)


def lst_config(root: Path) -> Config:
    config = finetune_config(root)
    return {**config, "model": {**config["model"], "quantize_base": False}}


def dial_config(root: Path) -> Config:
    """LoRA in the last layer beside a side network."""
    config = finetune_config(root)
    return {**config, "model": {**config["model"], "lora_layers": 1, "lora_rank": 4}}


def lora_config(root: Path) -> Config:
    """QLoRA: all layers, and no side network."""
    config = finetune_config(root)
    every = {"num_side_blocks": 0, "lora_layers": SIZES["num_layers"]}
    return {**config, "model": {**config["model"], **every}}


def repaired_config(root: Path) -> Config:
    """The dial over a backbone whose rounding is repaired."""
    config = dial_config(root)
    return {**config, "model": {**config["model"], "repair_rank": 8}}


def peqa_config(root: Path) -> Config:
    """Three bits, so that there is something to repair."""
    model = {"_component_": "qst_tune.models.peqa_llama3_2", **SIZES, "bits": 3}
    return {**finetune_config(root), "model": model}


def classifier_config(root: Path) -> Config:
    config = finetune_config(root)
    dataset = {
        "_component_": "qst_tune.data.classification_dataset",
        "source": "json",
        "template": TEMPLATE,
        "labels": LABELS,
        "metrics": ["accuracy", "f1"],
        "cache_dir": str(root / "cache"),
    }
    sizes = {k: v for k, v in config["model"].items() if k != "_component_"}
    return {
        **config,
        "model": {
            "_component_": "qst_tune.models.qst_classifier",
            "backbone": "torchtune.models.llama3_2.llama3_2",
            "num_labels": 2,
            **sizes,
        },
        "dataset": {**dataset, "data_files": str(write_rows(root / "rows.jsonl", 16))},
        # Not a multiple of the batch size: the last rows must count too.
        "dataset_val": {**dataset, "data_files": str(write_rows(root / "dev.jsonl", 7))},
        "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
    }


def dpo_config(root: Path) -> Config:
    dataset = {
        "_component_": "torchtune.datasets.preference_dataset",
        "source": "json",
        "cache_dir": str(root / "cache"),
    }
    return {
        **finetune_config(root),
        "dataset": {**dataset, "data_files": str(write_pairs(root / "pairs.jsonl", 16))},
        "dataset_val": {**dataset, "data_files": str(write_pairs(root / "val_pairs.jsonl", 5))},
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"},
    }


def dial_dpo_config(root: Path) -> Config:
    return {**dpo_config(root), "model": dial_config(root)["model"]}


# Validation losses, one example at a time and from whole logits.


def text_loss(tuned: TunedModel, root: Path) -> float:
    return val_loss(tuned.model, root)


@torch.no_grad()
def class_loss(tuned: TunedModel, root: Path) -> float:
    tokenizer = hf_chat_tokenizer(str(root / "model"))
    losses = []
    for row in map(json.loads, (root / "dev.jsonl").read_text().splitlines()):
        ids = tokenizer.encode(TEMPLATE.format(text=row["text"]), add_bos=False, add_eos=False)
        losses.append(F.cross_entropy(tuned.model(torch.tensor([ids])), label_of(row)))
    return torch.stack(losses).mean().item()


def label_of(row: dict[str, str]) -> torch.Tensor:
    return torch.tensor([LABELS.index(row["label"])])


@torch.no_grad()
def preference_loss(tuned: TunedModel, root: Path) -> float:
    """DPO's loss with its beta of 0.1 against the model without what was tuned."""
    losses = []
    for row in map(json.loads, (root / "val_pairs.jsonl").read_text().splitlines()):
        policy = log_ratio(tuned.model, row, root)
        with tuned.untuned():
            reference = log_ratio(tuned.model, row, root)
        losses.append(-F.logsigmoid(0.1 * (policy - reference)))
    return torch.stack(losses).mean().item()


def log_ratio(model: torch.nn.Module, row: dict[str, Any], root: Path) -> torch.Tensor:
    chosen, rejected = (log_probability(model, row[key], root) for key in ("chosen", "rejected"))
    return chosen - rejected


def log_probability(
    model: torch.nn.Module, messages: list[dict[str, str]], root: Path
) -> torch.Tensor:
    tokenizer = hf_chat_tokenizer(str(root / "model"), max_seq_len=64)
    tokens, mask = tokenizer.tokenize_messages(
        [
            Message(role="user", content=messages[0]["content"], masked=True),
            Message(role="assistant", content=messages[1]["content"]),
        ]
    )
    ids = torch.tensor(tokens)
    picked = model(ids[None])[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return picked[~torch.tensor(mask)[1:]].sum()


METHODS = {
    method.name: method
    for method in (
        Method("qst", qst_finetune, finetune_config, text_loss),
        Method("lst", qst_finetune, lst_config, text_loss),
        # What they have alone is tested by "repaired", a dial too, and by the tests of each part.
        Method("dial", qst_finetune, dial_config, text_loss, slow=True),
        Method("lora", qst_finetune, lora_config, text_loss, slow=True),
        Method("repaired", qst_finetune, repaired_config, text_loss),
        Method("peqa", peqa_finetune, peqa_config, text_loss, result="scales"),
        Method("classifier", qst_finetune, classifier_config, class_loss),
        Method("dpo", qst_dpo, dpo_config, preference_loss),
        Method("dial dpo", qst_dpo, dial_dpo_config, preference_loss, slow=True),
    )
}
