"""How much of a classification task the frozen backbone knows already, without any side network.

Example::

    python -m benchmarks.linear_probe --config configs/smollm2/135M_qst_sst2.yaml key=value ...

Takes a config of a classifier and reads its backbone's last state of every row, training and
validation, as the classifier would. A logistic regression on the training rows, its strength chosen
by cross-validation there, gives the figures; beside it stand those of the commonest class.
"""

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchtune import training
from tqdm import tqdm

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.components import instantiate
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.schema import TrainingConfig
from qst_tune.data import collate_classification
from qst_tune.data.batches.datasets import build_dataset
from qst_tune.errors import UserError
from qst_tune.models.build import build_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules import QSTClassifier
from qst_tune.training.classification import METRICS, labelled_rows

BATCH_SIZE = 64


@torch.no_grad()
def backbone_states(
    model: QSTClassifier, dataset: Any, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return the last token's state of each row and its label.

    Args:
        model (QSTClassifier): its side network is not used.
        dataset (Any): of ``qst_tune.data``.
        device (torch.device): the model's.

    Returns:
        tuple[np.ndarray, np.ndarray]: fp32 ``[M, D]`` and ``[M]``.
    """
    # A head that changes nothing, so that its logits are the states; long rows go last.
    embed_dim = model.layers[0].attn.embed_dim
    model.side.score = torch.nn.Linear(embed_dim, embed_dim, bias=False, device=device)
    torch.nn.init.eye_(model.side.score.weight)
    model.side.disabled = True
    rows = sorted((dataset[i] for i in range(len(dataset))), key=lambda row: len(row["tokens"]))
    states, labels = [], []
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc="states"):
        batch = collate_classification(rows[start : start + BATCH_SIZE], pad_id=0, multiple=1)
        inputs = {name: batch[name].to(device) for name in ("tokens", "padding_mask")}
        states.append(model(**inputs).cpu())
        labels.append(batch["labels"])
    return torch.cat(states).numpy(), torch.cat(labels).numpy()


def main(raw: DictConfig) -> None:
    """Print the figures of the commonest class and of the linear probe.

    Args:
        raw (DictConfig): a config of ``qst_finetune``.

    Raises:
        UserError: if the config is not that of a classifier of classes.
    """
    cfg = read_config(raw, TrainingConfig)
    training.set_seed(seed=cfg.seed)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device)
    tokenizer = instantiate(cfg.tokenizer, "tokenizer")
    model = build_on_meta(cfg.model, dtype)
    if not isinstance(model, QSTClassifier) or model.num_labels == 1:
        raise UserError("model: name a classifier with classes, such as qst_classifier")
    datasets = [build_dataset(raw[name], name, tokenizer)[0] for name in ("dataset", "dataset_val")]
    load_frozen_backbone(model, cfg.checkpointer, dtype=dtype, device=device)
    model.initialize_side(device)
    model.eval()
    (x, y), (x_val, y_val) = (backbone_states(model, rows, device) for rows in datasets)
    probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=8, cv=5, max_iter=1000))
    probe.fit(x, y)
    commonest = np.full_like(y_val, np.bincount(y).argmax())
    for name in labelled_rows(datasets[1]).metrics:
        metric = METRICS[name]
        for title, predictions in (
            ("commonest class", commonest),
            ("linear probe", probe.predict(x_val)),
        ):
            value = metric(torch.from_numpy(predictions), torch.from_numpy(y_val))
            print(f"{name}, {title}: {value:.4f} ({len(y)} training, {len(y_val)} validation rows)")


if __name__ == "__main__":
    run_recipe(main)
