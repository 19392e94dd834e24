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
DIAL = "QST, lora_layers = N/4"


@dataclass(frozen=True)
class Method:
    """How to build a model on a device, and what one training step of it is."""

    build: Callable[[Backbone, RandomWeights], Any]
    train: Callable[[Any], Step]


METHODS = {
    QST: Method(ours.qst_model, ours.recipe_step),
    DIAL: Method(ours.dial_model, ours.recipe_step),
    peers.TORCHTUNE: Method(peers.torchtune_qlora, peers.torchtune_step),
    peers.TORCHTUNE_COMPILED: Method(
        partial(peers.torchtune_qlora, compiled=True), partial(peers.torchtune_step, compiled=True)
    ),
    peers.PEFT: Method(peers.peft_qlora, peers.peft_step),
    peers.PEFT_LIGER: Method(partial(peers.peft_qlora, liger=True), peers.peft_step),
}
