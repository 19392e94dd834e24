"""The methods of the study: what each trains, at which learning rate, and what a step costs.

Notation: N = 30 layers; k, the last layers in which LoRA trains (the depth dial).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import learners
from benchmarks.study.learners import Learner

NUM_LAYERS = 30
# Forwards of the whole model: one, one more to recompute it, and a backward pass that needs no
# gradient of weights. Equal time is the time of this method, checkpointed QLoRA.
REFERENCE_FORWARDS = 3.0

# The best of those tried with seed 0 (results/study.jsonl has all), on the same held-out rows.
FULL_RATES = {"wikitext2": 3e-4}
LORA_RATES = {"wikitext2": 3e-3}
QST_RATES = {"sst2": 1e-3, "rte": 1e-3, "wikitext2": 1e-2}
QST_WIDE_RATES = {"sst2": 1e-3, "rte": 1e-3, "alpaca": 1e-3, "alpaca_chat": 1e-3}
# LoRA beside a side network learns at a third of the rate: at the rates of LoRA alone.
DIAL_RATES = {"wikitext2": 1e-2}


@dataclass(frozen=True)
class Method:
    """One line of the tables.

    Args:
        title (str): for people.
        build (Callable[[Path, torch.device], Learner]): from the directory of
            SmolLM2-135M-Instruct.
        rate (float): learning rate where ``--rates`` gives none.
        rates (dict[str, float]): learning rates that differ from :attr:`rate`, by task.
        forwards (float): products of a step, in forwards of the whole model.
        same_as (str | None): another method, which takes the same steps in another time and memory:
            its runs are this one's.
    """

    title: str
    build: Callable[[Path, torch.device], Learner]
    rate: float
    rates: dict[str, float] = field(default_factory=dict)
    forwards: float = 1.0
    same_as: str | None = None

    def rate_for(self, task: str) -> float:
        """Return the default learning rate on a task."""
        return self.rates.get(task, self.rate)

    def steps_of_equal_time(self, steps: int) -> int:
        """Return how many steps take as long as ``steps`` of checkpointed QLoRA."""
        return round(steps * REFERENCE_FORWARDS / self.forwards)


def qst(title: str, rates: dict[str, float] = QST_RATES, **changes: Any) -> Method:
    """Describe a variant of ours.

    Args:
        title (str): for people.
        rates (dict[str, float]): learning rates by task.
        **changes (Any): arguments of ``qst_decoder`` that differ from the shipped config.

    Returns:
        Method: a line of the tables.
    """
    return Method(title, partial(learners.qst, **changes), 3e-3, rates)


# The depth dial.

DEPTHS = (0, 3, 6, 10, 15, 20, 30)
# What ends a method's name, with the arguments of ``qst_decoder`` and how a title goes on.
BACKBONES: dict[str, tuple[dict[str, Any], str]] = {
    "": ({}, ""),
    "_nf4": ({"base_quantization": "nf4"}, " over NF4"),
    "_nf4_rank_32": (
        {"base_quantization": "nf4", "repair_rank": 32},
        " over NF4, repaired with rank 32",
    ),
}


@dataclass(frozen=True)
class Setting:
    """A setting of the dial: 0 layers are QST, all of them without a side network QLoRA.

    Args:
        depth (int): k.
        side (bool): whether a side network trains too.
        backbone (str): key of :data:`BACKBONES`.
    """

    depth: int
    side: bool
    backbone: str

    @property
    def name(self) -> str:
        """Of its method."""
        start = f"dial_{self.depth}" if self.side else f"last_{self.depth}"
        return (start if self.depth else "qst") + self.backbone

    @property
    def title(self) -> str:
        """What trains."""
        layers = f"LoRA in the last {self.depth} of {NUM_LAYERS} layers"
        if self.depth == NUM_LAYERS:
            layers = f"LoRA in all {NUM_LAYERS} layers"
        if not self.side:
            return layers
        return f"side network and {layers}" if self.depth else "side network alone (QST)"


def settings(backbone: str) -> list[Setting]:
    """Return the dial over a backbone, from QST to LoRA in all layers.

    Args:
        backbone (str): key of :data:`BACKBONES`.

    Returns:
        list[Setting]: with the side network and without it.
    """
    every = [Setting(k, side, backbone) for k in DEPTHS for side in (True, False)]
    return [setting for setting in every if setting.depth or setting.side]


def _of_dial(setting: Setting) -> Method:
    arguments, over = BACKBONES[setting.backbone]
    changes = {**arguments, "lora_layers": setting.depth}
    if not setting.side:
        changes["num_side_blocks"] = 0
    recomputed = partial(learners.qst, recompute=True, **changes)
    title, forwards = setting.title + over, 1 + 2 * setting.depth / NUM_LAYERS
    if setting.side:
        return Method(title, recomputed, 3e-3, DIAL_RATES, forwards)
    return Method(title, recomputed, 1e-3, LORA_RATES, forwards)


# Suffix of a method's name, the rows that run at a time, and how a title says it.
_ROWS_AT_A_TIME = (
    ("by_row", 1, "one row"),
    *((f"by_{rows}_rows", rows, f"{rows} rows") for rows in (2, 4, 8)),
)


def _dial_methods() -> Iterator[tuple[str, Method]]:
    """Each setting recomputed, as shipped; with its activations saved; and some rows at a time."""
    for setting in (s for backbone in BACKBONES for s in settings(backbone) if s.depth):
        name, method = setting.name, _of_dial(setting)
        build: Any = method.build
        yield name, method
        yield (
            f"{name}_saved",
            replace(
                method,
                title=f"{method.title}, activations saved",
                build=partial(build.func, **{**build.keywords, "recompute": False}),
                forwards=1 + setting.depth / NUM_LAYERS,
                same_as=name,
            ),
        )
        for suffix, rows, words in _ROWS_AT_A_TIME:
            title = f"{method.title}, {words} at a time"
            by_rows = partial(build, rows=rows)
            yield f"{name}_{suffix}", replace(method, title=title, build=by_rows, same_as=name)


_lora = partial(partial, learners.lora)

METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", learners.full, 1e-4, FULL_RATES, 3),
    "lora": Method("LoRA, rank 16", _lora(quantize=False), 1e-3, LORA_RATES, 2),
    "lora_last_6": Method(
        "torchtune's LoRA in the last 6 of 30 layers",
        _lora(quantize=False, last=6),
        1e-3,
        LORA_RATES,
        1.2,
    ),
    "lora_last_15": Method(
        "torchtune's LoRA in the last 15 of 30 layers",
        _lora(quantize=False, last=15),
        1e-3,
        LORA_RATES,
        1.5,
    ),
    "qlora": Method("QLoRA, rank 16", _lora(quantize=True), 1e-3, LORA_RATES, 2),
    "qlora_checkpointed": Method(
        "QLoRA, rank 16, checkpointed",
        _lora(quantize=True, checkpointing=True),
        1e-3,
        LORA_RATES,
        REFERENCE_FORWARDS,
        same_as="qlora",
    ),
    "qlora_by_row": Method(
        "QLoRA, rank 16, checkpointed, one row at a time",
        _lora(quantize=True, checkpointing=True, rows=1),
        1e-3,
        LORA_RATES,
        REFERENCE_FORWARDS,
        same_as="qlora",
    ),
    "qst": qst("QST"),
    "qst_nf4": qst("QST over NF4", base_quantization="nf4"),
    **{
        f"qst_nf4_rank_{rank}": qst(
            f"QST over NF4, repaired with rank {rank}", base_quantization="nf4", repair_rank=rank
        )
        for rank in (16, 32, 64)
    },
    "peqa": Method("PEQA, 4 bits, per channel", partial(learners.peqa, bits=4), 3e-3, forwards=3),
    "lst": qst("LST: QST over the unquantised model", base_quantization="none"),
    "qst_r32": qst("QST, r = 32", reduction_factor=32),
    "qst_r8": qst("QST, r = 8", reduction_factor=8),
    "qst_r4": qst("QST, r = 4", QST_WIDE_RATES, reduction_factor=4),
    "qst_paper": qst("QST, the paper's equations", variant="paper"),
    "qst_authors": qst("QST, the authors' code", variant="authors"),
    # One change of the default each.
    "blocks_3": qst("QST, 3 side blocks", num_side_blocks=3),
    "blocks_10": qst("QST, 10 side blocks", num_side_blocks=10),
    "blocks_30": qst("QST, a side block for every layer", num_side_blocks=30),
    "unnormalised": qst("QST, hidden states read as they are", normalize_hidden=False),
    "linear": qst("QST, linear downsamplers", downsample="linear"),
    "lora_down": qst("QST, LoRA downsamplers", downsample="lora"),
    "maxpool": qst("QST, max pooling", downsample="maxpool"),
    "avgpool": qst("QST, average pooling", downsample="avgpool"),
    "rank_4": qst("QST, downsamplers of rank 4", rank=4),
    "rank_64": qst("QST, downsamplers of rank 64", rank=64),
    "channel_gates": qst("QST, a gate for every channel", gate_per_channel=True),
    "alpha_mix": qst("QST, the paper's output mix", output_mix="alpha"),
    "sigmoid_mix": qst("QST, the authors' output mix", output_mix="sigmoid"),
    "heads_4": qst("QST, side heads 4 wide", min_head_dim=4),
    "heads_12": qst("QST, side heads 12 wide", min_head_dim=12),
    "bf16": Method("QST, trained in bf16", learners.qst_in_bf16, 3e-3, QST_RATES),
    "fp4": qst("QST over FP4", base_quantization="fp4"),
    **dict(_dial_methods()),
}
# Names for several methods at once.
GROUPS: dict[str, list[str]] = {
    f"dial{backbone}": [setting.name for setting in settings(backbone)] for backbone in BACKBONES
}
