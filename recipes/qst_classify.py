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
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torchtune import utils
from tqdm import tqdm

from qst_tune.config.check import check_checkpoint_dir, check_config
from qst_tune.config.cli import instantiate, run_recipe
from qst_tune.config.hub_models import fetch_models
from qst_tune.config.keys import Key, pick
from qst_tune.data import ClassificationDataset, collate_classification
from qst_tune.errors import UserError
from qst_tune.modules import QSTClassifier
from qst_tune.modules.model_limits import check_ids
from qst_tune.results.loading import load_tuned_model
from qst_tune.results.output_directory import output_directory

KEYS = {
    "side_network": Key(kind=Path, required=True, meaning="directory of the trained classifier"),
    "rows": Key(kind=Path, required=True, meaning="jsonl file, each line one text to classify"),
    **pick("output_dir", "model", "tokenizer", "checkpointer", "dataset", "batch_size"),
    **pick("batch_size_val", "device", "dtype"),
}
PREDICTIONS_FILE = "predictions.jsonl"

log = utils.get_logger("INFO")


def read_rows(cfg: DictConfig) -> ClassificationDataset:
    """Read the rows as the config's dataset would, without their labels."""
    if isinstance(cfg.dataset, ListConfig):
        raise UserError("dataset: name one, whose template and labels the rows have")
    path = Path(str(cfg.rows))
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


def main(cfg: DictConfig) -> None:
    """Run the recipe."""
    check_config(cfg, KEYS)
    check_checkpoint_dir(cfg.checkpointer)
    fetch_models(cfg)
    with output_directory(Path(cfg.output_dir)) as directory:
        dataset = read_rows(cfg)
        model = load_tuned_model(cfg, "classes").model
        found = answers(model, dataset, cfg.get("batch_size_val") or cfg.batch_size)
        lines = [
            json.dumps({**row, **answer}, default=str)
            for row, answer in zip(dataset.rows, found, strict=True)
        ]
        path = directory / PREDICTIONS_FILE
        path.write_text("".join(f"{line}\n" for line in lines))
    log.info(f"{len(lines)} rows written to {path}")


if __name__ == "__main__":
    run_recipe(main, KEYS, __doc__)
