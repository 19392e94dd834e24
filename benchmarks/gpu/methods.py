"""The methods by name: how the model is built, and how a step trains it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.backbones import Backbone
from benchmarks.gpu import ours, peers
from benchmarks.gpu.random_weights import RandomWeights
from benchmarks.gpu.turns import Step

QST = "QST"
# LoRA in the last k of N layers too, by what part of them k is.
DIAL = {
    "QST, lora_layers = N/4": 1 / 4,
    "QST, lora_layers = 2N/3": 2 / 3,
    "QST, lora_layers = N": 1.0,
}


@dataclass(frozen=True)
class Method:
    """How to build a model on a device, and what one training step of it is."""

    build: Callable[[Backbone, RandomWeights], Any]
    train: Callable[[Any], Step]


METHODS = {
    QST: Method(ours.qst_model, ours.recipe_step),
    **{
        name: Method(partial(ours.dial_model, part=part), ours.recipe_step)
        for name, part in DIAL.items()
    },
    peers.TORCHTUNE: Method(peers.torchtune_qlora, peers.torchtune_step),
    peers.TORCHTUNE_COMPILED: Method(
        partial(peers.torchtune_qlora, compiled=True), partial(peers.torchtune_step, compiled=True)
    ),
    peers.PEFT: Method(peers.peft_qlora, peers.peft_step),
    peers.PEFT_LIGER: Method(partial(peers.peft_qlora, liger=True), peers.peft_step),
}
