"""Classify the rows of a jsonl file with a trained classifier.

Example::

    tune run qst_classify --config smollm2/135M_qst_sst2 side_network=<DIR> rows=<ROWS.jsonl>

The config is the one that the classifier was trained with: its ``dataset`` block says how a row
becomes a text, and what the classes are called. The rows need no label. They are written to
``predictions.jsonl`` in ``output_dir``, each with its ``prediction`` and, for a class, its
``probability``.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import utils
from tqdm import tqdm

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.components import instantiate
from qst_tune.config.keys import key
from qst_tune.config.model_directory import check_checkpoint_dir, fetch_models
from qst_tune.config.schema import Blocks, TunedModelConfig, training_key
from qst_tune.data import ClassificationDataset, collate_classification
from qst_tune.errors import UserError
from qst_tune.modules import QSTClassifier
from qst_tune.modules.model_limits import check_ids
from qst_tune.results.loading import load_tuned_model
from qst_tune.results.output_directory import output_directory


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(TunedModelConfig):
    """The keys of this recipe."""

    side_network: Path = key("directory of the trained classifier")
    rows: Path = key("jsonl file, each line one text to classify")
    output_dir: Path = training_key("output_dir")
    dataset: Blocks = training_key("dataset")
    batch_size: int = training_key("batch_size")
    batch_size_val: int | None = training_key("batch_size_val")


PREDICTIONS_FILE = "predictions.jsonl"

log = utils.get_logger("INFO")


def read_rows(cfg: ClassifyConfig) -> ClassificationDataset:
    """Read the rows as the config's dataset would, without their labels."""
    if isinstance(cfg.dataset, ListConfig):
        raise UserError("dataset: name one, whose template and labels the rows have")
    path = cfg.rows
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"rows={path} does not exist or is empty: name a jsonl file")
    here = {"source": "json", "data_files": str(path), "split": "train"}
    block: Any = OmegaConf.merge(cfg.dataset, here)
    dataset = instantiate(block, "rows", instantiate(cfg.tokenizer, "tokenizer"))
    if not isinstance(dataset, ClassificationDataset):
        raise UserError("dataset: use qst_tune.data.classification_dataset or glue_dataset")
    try:
        dataset.encode(dataset.rows[0])
    except KeyError as error:
        raise UserError(f"rows={path} has no column {error}, which the text needs") from error
    return dataset


@torch.no_grad()
def answers(
    model: QSTClassifier, dataset: ClassificationDataset, batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield ``prediction`` of each row, in order: a class with its ``probability``, or a score."""
    for start in tqdm(range(0, len(dataset), batch_size), desc="classifying"):
        rows = [dataset.rows[i] for i in range(start, min(start + batch_size, len(dataset)))]
        encoded = [dataset.encode(row) for row in rows]
        check_ids(model, encoded)
        batch = collate_classification([{"tokens": ids, "labels": 0} for ids in encoded], pad_id=0)
        device = model.tok_embeddings.weight.device
        inputs = {name: batch[name].to(device) for name in ("tokens", "padding_mask")}
        logits = model(**inputs)
        if dataset.labels is None:
            yield from ({"prediction": score} for score in logits[:, 0].tolist())
            continue
        likeliest = logits.softmax(-1).max(-1)
        for probability, number in zip(*map(torch.Tensor.tolist, likeliest), strict=True):
            yield {"prediction": dataset.labels[number], "probability": probability}


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = read_config(raw, ClassifyConfig)
    check_checkpoint_dir(cfg.checkpointer)
    cfg = fetch_models(cfg)
    with output_directory(cfg.output_dir) as directory:
        dataset = read_rows(cfg)
        model = load_tuned_model(cfg, "classes").model
        found = answers(model, dataset, cfg.batch_size_val or cfg.batch_size)
        lines = [
            json.dumps({**row, **answer}, default=str)
            for row, answer in zip(dataset.rows, found, strict=True)
        ]
        path = directory / PREDICTIONS_FILE
        path.write_text("".join(f"{line}\n" for line in lines))
    log.info(f"{len(lines)} rows written to {path}")


if __name__ == "__main__":
    run_recipe(main, ClassifyConfig, __doc__)
