"""The top-level keys of configs: what each means, takes and defaults to, one table for all readers.

``TRAINING_KEYS`` are those of the training recipes, whose configs every recipe accepts; a recipe
names the keys that it reads in its own ``KEYS``. The checks, ``--help`` and the table in
docs/training.md are made from them.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Key:
    """One top-level key.

    Args:
        meaning (str): one line of plain text.
        kind (type): ``int``, ``float``, ``bool``, ``str``, ``list``, ``Path``, or ``dict`` for a
            block with a ``_component_``. null is allowed wherever the key is not required.
        default (Any): without the key; None is null.
        required (bool): whether a recipe that reads the key can do without.
        least (float | None): smallest number allowed.
        above (float | None): numbers must be greater.
        most (float | None): largest number allowed.
        below (float | None): numbers must be smaller.
        choices (tuple[Any, ...]): the only values allowed; empty: any of the kind.
    """

    meaning: str
    kind: type
    default: Any = None
    required: bool = False
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether a value that is not null is of the kind and within the bounds."""
        if self.choices:
            return value in self.choices and not isinstance(value, bool)
        if self.kind not in (int, float):
            return isinstance(value, _TYPES[self.kind]) and value != ""
        if isinstance(value, bool) or (self.kind is int and not isinstance(value, int)):
            return False
        try:
            number = float(value)  # in YAML a number may be quoted
        except (TypeError, ValueError):
            return False
        return number == number and all(holds(number, to) for _, holds, to in self._bounds())

    def values(self) -> str:
        """Return what the key accepts, as the end of a sentence."""
        if self.choices:
            *others, last = map(str, self.choices if self.required else (*self.choices, "null"))
            return f"{', '.join(others)} or {last}"
        limits = " and ".join(f"{words} {to:g}" for words, _, to in self._bounds())
        null = "" if self.required or self.default is not None else ", or null"
        return f"{NOUNS[self.kind]} {limits}".strip() + null

    def _bounds(self) -> list[tuple[str, Callable[[float, float], bool], float]]:
        bounds = [
            ("of at least", operator.ge, self.least),
            ("above", operator.gt, self.above),
            ("of at most", operator.le, self.most),
            ("below", operator.lt, self.below),
        ]
        return [(words, holds, to) for words, holds, to in bounds if to is not None]


NOUNS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    list: "a list",
    dict: "a block",
}
# Of the kinds that are no numbers; blocks and lists are checked where they are used.
_TYPES: dict[type, type] = {bool: bool, str: str, Path: str, list: object, dict: object}
Keys = Mapping[str, Key]

TRAINING_KEYS: dict[str, Key] = {
    "model": Key(kind=dict, required=True, meaning="a builder of qst_tune.models"),
    "tokenizer": Key(kind=dict, required=True, meaning="a tokenizer of torchtune or qst_tune.data"),
    "checkpointer": Key(
        kind=dict, required=True, meaning="reads the weights of the frozen backbone"
    ),
    "output_dir": Key(kind=Path, required=True, meaning="directory of the run"),
    "device": Key(kind=str, default="auto", meaning="auto (cuda, mps or cpu), cpu, cuda, cuda:N"),
    "dtype": Key(
        kind=str,
        default="auto",
        meaning="auto, bf16, fp16 or fp32: of what is neither quantized nor trainable",
    ),
    "dataset": Key(
        kind=dict,
        required=True,
        meaning="the training set: qst_tune.data.auto_dataset, a dataset of torchtune, or a list",
    ),
    "side_network": Key(kind=Path, meaning="QST: start from this result; null: a new side network"),
    "scales": Key(kind=Path, meaning="PEQA: start from this result; null: the rounded model"),
    "reference": Key(
        kind=str,
        choices=("start", "backbone"),
        meaning="of qst_dpo; null: start if side_network is set, else backbone",
    ),
    "batch_size": Key(kind=int, required=True, least=1, meaning="samples of a batch"),
    "shuffle": Key(kind=bool, default=True, meaning="another order of the samples in each epoch"),
    "seed": Key(
        kind=int,
        least=0,
        # torchtune seeds each process with seed + rank, and NumPy takes 32 bits.
        most=2**32 - 2**16,
        meaning="of everything random; null: a new one, which is logged",
    ),
    "num_workers": Key(
        kind=int, default=0, least=0, meaning="processes that read samples; their order stays"
    ),
    "collate_fn": Key(kind=str, meaning="dotted name of torchtune's or your own; null: padding"),
    "on_bad_row": Key(
        kind=str,
        default="error",
        choices=("error", "skip"),
        meaning="skip leaves out samples that cannot be used, and reports how many and why",
    ),
    "epochs": Key(kind=int, required=True, least=1, meaning="passes over the training set"),
    "max_steps_per_epoch": Key(kind=int, least=1, meaning="ends each epoch early; null: whole"),
    "gradient_accumulation_steps": Key(
        kind=int, default=1, least=1, meaning="batches of an optimizer step"
    ),
    "optimizer": Key(kind=dict, required=True, meaning="one of torch.optim or torchao.optim"),
    "lr_scheduler": Key(
        kind=dict,
        meaning="qst_tune.training.lr_schedulers.cosine_with_warmup, or one of torchtune's; null: "
        "constant optimizer.lr",
    ),
    "loss": Key(
        kind=dict, required=True, meaning="qst_tune.modules.LinearCrossEntropyLoss or torchtune's"
    ),
    "clip_grad_norm": Key(
        kind=float, above=0, meaning="largest norm of all gradients together; null: no clipping"
    ),
    "skip_bad_steps": Key(
        kind=int,
        default=0,
        least=0,
        meaning="skip at most this many steps with a loss or gradient that is not finite",
    ),
    "enable_activation_checkpointing": Key(
        kind=bool,
        default=False,
        meaning="recompute in backward: the side network (QST), each layer (PEQA)",
    ),
    "enable_activation_offloading": Key(
        kind=bool, default=False, meaning="accepted when False: no method here needs it"
    ),
    "compile": Key(kind=bool, default=False, meaning="torch.compile the layers"),
    "hidden_state_cache": Key(
        kind=Path,
        meaning="QST: directory for the backbone's hidden states, which later epochs then read",
    ),
    "backbone_sharding": Key(
        kind=str,
        choices=("full", "node"),
        meaning="processes share one backbone: all of them, or those of a node",
    ),
    "fsdp_cpu_offload": Key(
        kind=bool, default=False, meaning="keep the shards of the backbone in CPU memory"
    ),
    "dataset_val": Key(
        kind=dict,
        meaning="the validation set, with what it leaves open as in dataset; or use val_fraction",
    ),
    "val_fraction": Key(
        kind=float, above=0, below=1, meaning="share of dataset to validate on, chosen by seed"
    ),
    "batch_size_val": Key(kind=int, least=1, meaning="of validation; null: batch_size"),
    "run_val_every_n_steps": Key(
        kind=int, least=1, meaning="validate also between the start and the end of an epoch"
    ),
    "early_stopping_patience": Key(
        kind=int, least=1, meaning="stop after this many validations in a row without a best one"
    ),
    "resume_from_checkpoint": Key(
        kind=bool, default=False, meaning="resume from the newest good checkpoint in output_dir"
    ),
    "save_every_n_steps": Key(
        kind=int, least=1, meaning="checkpoints in addition to that of each epoch's end"
    ),
    "keep_last_n_checkpoints": Key(
        kind=int, default=2, least=1, meaning="and the best one in any case; null: all"
    ),
    "dry_run": Key(
        kind=bool,
        default=False,
        meaning="check everything, report steps and peak memory, write nothing",
    ),
    "metric_logger": Key(
        kind=dict, required=True, meaning="one of torchtune.training.metric_logging"
    ),
    "log_every_n_steps": Key(kind=int, default=1, least=1, meaning="steps of a log entry"),
    "log_peak_memory_stats": Key(kind=bool, default=False, meaning="peak memory in each log entry"),
    "profiler": Key(kind=dict, meaning="torchtune.training.setup_torch_profiler"),
    "cudnn_deterministic_mode": Key(
        kind=str,
        # What torch.set_deterministic_debug_mode takes.
        choices=(0, 1, 2, "default", "warn", "error"),
        meaning="torch's deterministic debug mode: 2 refuses kernels that vary from run to run",
    ),
    "fsdp": Key(
        kind=dict,
        meaning="torchtune's block, accepted with cpu_offload: False; see fsdp_cpu_offload",
    ),
    "save_adapter_weights_only": Key(
        kind=bool, meaning="accepted, no effect: only trained weights are ever saved"
    ),
    "low_cpu_ram": Key(
        kind=bool, meaning="accepted, no effect: weights are quantized one by one as they are read"
    ),
}


def pick(*names: str, **changes: Any) -> dict[str, Key]:
    """Return keys of training configs by name; ``changes`` replaces some of their fields."""
    return {name: replace(TRAINING_KEYS[name], **changes) for name in names}


def setting(cfg: Mapping[Any, Any], name: str, keys: Keys = TRAINING_KEYS) -> Any:
    """Read a key; its default where it is absent or null."""
    value, key = cfg.get(name), keys[name]
    if value is None:
        return key.default
    return float(value) if key.kind is float else value  # in YAML a number may be quoted
