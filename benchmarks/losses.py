"""Final losses of short runs with each optimisation on and off: ``python -m benchmarks losses``.

Beside them stands how far each optimisation moves the gradient of the same side network, the one
that the default has learnt, on the same rows.

The text is Python's own documentation and always the same. The backbone is SmolLM2-135M-Instruct
where ``make quickstart`` has fetched it, else one with random weights that reads bytes.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any
from unittest import mock

import torch
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import training
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.modules.loss import CEWithChunkedOutputLoss

from benchmarks.backbones import BACKBONES, DTYPE, Backbone
from benchmarks.methods import (
    CPU,
    Batch,
    Trainee,
    default_config,
    load_random_backbone,
    load_smollm2,
    model_arguments,
    qst_trainee,
    recomputes_by_default,
)
from qst_tune.data.batches.collate import align_labels
from qst_tune.models import qst_decoder, smollm2_135m
from qst_tune.modules import nf4_linear
from qst_tune.modules.loss import connect_loss, next_token_loss
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.language_modelling import validation_passes
from qst_tune.training.task import complete

BATCH_SIZE = 4
HELD_OUT_BATCHES = 4
NUM_LAST = 10
NUM_SEEDS = 3


@dataclass(frozen=True)
class Source:
    """Where the backbone and the text come from.

    Args:
        name (str): for people.
        build (Callable[..., QSTModel]): makes the model from arguments of its model block; the
            side network is on the meta device.
        tokens (torch.Tensor): the text, ``[number of rows, T]``.
    """

    name: str
    build: Callable[..., QSTModel]
    tokens: torch.Tensor


@dataclass(frozen=True)
class Variant:
    """One setting that must not change what is learnt.

    Args:
        model (dict[str, Any]): changes of the config's model block.
        attributes (dict[str, Any]): changes of the built model, by dotted name.
        loss (Callable[[], nn.Module] | None): in place of the config's.
        running (Callable[[], AbstractContextManager[Any]]): holds during the run.
    """

    model: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    loss: Callable[[], nn.Module] | None = None
    running: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Outcome:
    """What a run ended with.

    Args:
        train (float): mean training loss of the last steps, nats a token.
        held_out (float): loss of the validation rows, nats a token.
        side (dict[str, torch.Tensor]): the side network.
        gradient (torch.Tensor): fp32, one vector: of the first validation batch, for the side
            network that the run was given to compare, its own if it was given none.
    """

    train: float
    held_out: float
    side: dict[str, torch.Tensor]
    gradient: torch.Tensor

    def gradient_error(self, reference: "Outcome") -> float:
        """Return ``|g - g_ref| / |g_ref|``, both of the same side network.

        Args:
            reference (Outcome): of the run whose side network was compared.

        Returns:
            float: 0 for the same gradient.
        """
        difference = (self.gradient - reference.gradient).norm()
        return float(difference / reference.gradient.norm())


def variants(row_tokens: int) -> dict[str, Variant]:
    """Return what is compared; the first is the default.

    Args:
        row_tokens (int): tokens of one row, the smallest part of a batch that runs by itself.

    Returns:
        dict[str, Variant]: by title.
    """
    recompute = recomputes_by_default()
    other_bits = 8 if default_config().model.get("hidden_bits", 16) == 16 else 16
    torchao = partial(mock.patch.object, nf4_linear, "dequantize_nf4", _torchao_decoding)
    return {
        "default": Variant(),
        f"recomputation {'off' if recompute else 'on'}": Variant(
            attributes={"side.recompute": not recompute}
        ),
        "frozen layers one row at a time": Variant(attributes={"frozen_chunk_tokens": row_tokens}),
        "plain cross entropy over all logits": Variant(loss=nn.CrossEntropyLoss),
        "torchtune's chunked cross entropy": Variant(loss=CEWithChunkedOutputLoss),
        "torchao's NF4 decoding": Variant(running=torchao),
        f"hidden states kept in {other_bits} bits": Variant(model={"hidden_bits": other_bits}),
    }


def _torchao_decoding(weight: NF4Tensor) -> torch.Tensor:
    decoded: torch.Tensor = weight.get_original_weight()
    return decoded


def run(path: Path, *, num_steps: int, backbone_name: str | None = None) -> None:
    """Train all variants, print and save their losses.

    Args:
        path (Path): of the JSON file.
        num_steps (int): training steps of each.
        backbone_name (str | None): random weights of this size; None: SmolLM2 if it is there.
    """
    source = random_source(BACKBONES[backbone_name]) if backbone_name else find_source()
    runs = {(title, 0): variant for title, variant in variants(source.tokens.shape[1]).items()}
    runs.update({("default", seed): Variant() for seed in range(1, NUM_SEEDS)})
    outcomes: dict[tuple[str, int], Outcome] = {}
    print(f"{source.name}; {num_steps} steps", flush=True)
    for (title, seed), variant in runs.items():
        start = time.perf_counter()
        compared = outcomes["default", 0].side if outcomes else None
        outcome = train(source, variant, seed=seed, num_steps=num_steps, compared=compared)
        outcomes[title, seed] = outcome
        error = outcome.gradient_error(outcomes["default", 0])
        print(
            f"{title:38s} seed {seed}: training {outcome.train:.4f}, held out "
            f"{outcome.held_out:.4f}, gradient {error:.1e} "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    summary = summarise(source.name, outcomes, num_steps)
    print()
    print(summary["verdict"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"written to {path}; the next `python -m benchmarks` puts it on the page")


def summarise(
    name: str, outcomes: dict[tuple[str, int], Outcome], num_steps: int
) -> dict[str, Any]:
    """Compare the variants with the spread of the default's seeds.

    Args:
        name (str): of the source.
        outcomes (dict[tuple[str, int], Outcome]): by title and seed.
        num_steps (int): of each run.

    Returns:
        dict[str, Any]: for the page.
    """
    reference = outcomes["default", 0]
    default = reference.held_out
    rows = [
        {
            "variant": title if seed == 0 else f"{title}, seed {seed}",
            "train": outcome.train,
            "held_out": outcome.held_out,
            "change": outcome.held_out - default,
            # Another seed draws other dropout and projections: not an error of the same gradient.
            "gradient_error": outcome.gradient_error(reference) if seed == 0 else None,
        }
        for (title, seed), outcome in outcomes.items()
    ]
    of_seeds = [outcome.held_out for (title, _), outcome in outcomes.items() if title == "default"]
    noise = max(of_seeds) - min(of_seeds)
    changes = {
        title: abs(outcome.held_out - default)
        for (title, seed), outcome in outcomes.items()
        if seed == 0
    }
    farthest = max(changes, key=lambda title: changes[title])
    verdict = (
        f"Between {len(of_seeds)} seeds the default's validation loss varies by {noise:.4f}; the "
        f'setting that changes it most is "{farthest}", by {changes[farthest]:.4f}: '
        f"{'within' if changes[farthest] <= noise else 'NOT within'} the noise of seeds."
    )
    what = (
        f"{name}; {num_steps} steps on {BATCH_SIZE} rows, the same seed and batches but where a "
        f"seed is named. The training loss is the mean of the last {NUM_LAST} steps, the "
        "validation loss that of rows not trained on after the last step, both in nats a token. "
        "The gradient's error is relative, of one batch and the side network that the first row "
        "has learnt."
    )
    command = "python -m benchmarks losses"
    return {"command": command, "what": what, "rows": rows, "verdict": verdict}


def train(
    source: Source,
    variant: Variant,
    *,
    seed: int,
    num_steps: int,
    compared: dict[str, torch.Tensor] | None = None,
) -> Outcome:
    """Train one variant.

    Args:
        source (Source): backbone and text.
        variant (Variant): what differs from the default.
        seed (int): of the side network's weights and of the order of the text.
        num_steps (int): training steps.
        compared (dict[str, torch.Tensor] | None): a side network whose gradient is taken after the
            run; None: the one just trained.

    Returns:
        Outcome: losses, side network and gradient.
    """
    gc.collect()
    held_out, to_train = _split(source.tokens)
    with variant.running():
        trainee = _trainee(source, variant, seed)
        batches = _batches(to_train, seed)
        losses = [trainee.step(next(batches)) for _ in range(num_steps)]
        after = complete(validation_passes(trainee.model, trainee.loss, held_out, CPU))
        side: Any = trainee.model.get_submodule("side")
        learnt = {name: tensor.clone() for name, tensor in side.state_dict().items()}
        side.load_state_dict(compared or learnt)
        gradient = _gradient(trainee, held_out[0])
    return Outcome(mean(losses[-NUM_LAST:]), after, learnt, gradient)


def _gradient(trainee: Trainee, batch: Batch) -> torch.Tensor:
    loss, _ = next_token_loss(trainee.model, trainee.loss, batch)
    gradients = torch.autograd.grad(loss, trainee.trained, allow_unused=True)
    return torch.cat([g.float().flatten() for g in gradients if g is not None])


def _trainee(source: Source, variant: Variant, seed: int) -> Trainee:
    model = source.build(**variant.model)
    torch.manual_seed(seed)
    trainee = qst_trainee(model)
    for name, value in variant.attributes.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    if variant.loss is not None:
        model.skip_output_layer = False
        trainee.loss = variant.loss()
        connect_loss(trainee.loss, model)
    return trainee


def _split(tokens: torch.Tensor) -> tuple[list[Batch], torch.Tensor]:
    """Held-out batches from the end of the text, and all rows before them."""
    num_held_out = HELD_OUT_BATCHES * BATCH_SIZE
    held_out = tokens[-num_held_out:].split(BATCH_SIZE)
    return [{"tokens": rows, "labels": align_labels(rows)} for rows in held_out], tokens[
        :-num_held_out
    ]


def _batches(rows: torch.Tensor, seed: int) -> Iterator[Batch]:
    """Random rows without end; the order depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(BATCH_SIZE)[:-1]:
            yield {"tokens": rows[chosen], "labels": align_labels(rows[chosen])}


# Backbone and text.


def find_source() -> Source:
    """Take SmolLM2 if it was fetched, else random weights.

    Returns:
        Source: backbone and text.
    """
    directory = Path(default_config().checkpointer.checkpoint_dir)
    if not (directory / "tokenizer.json").is_file():
        print(
            f"{directory} is not there (`make quickstart` fetches it): random weights", flush=True
        )
        return random_source(BACKBONES["quick"])
    return pretrained_source(directory)


def pretrained_source(directory: Path, row_tokens: int = 128) -> Source:
    """Take SmolLM2 and its tokenizer.

    Args:
        directory (Path): of Hugging Face.
        row_tokens (int): tokens a row.

    Returns:
        Source: backbone and text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(_text(), add_special_tokens=False).ids

    return Source(
        name=f"{directory.name} on Python's documentation, rows of {row_tokens} tokens",
        build=partial(_build, smollm2_135m, load_smollm2),
        tokens=_rows(ids, row_tokens),
    )


def random_source(backbone: Backbone, row_tokens: int = 64) -> Source:
    """Take random weights, and bytes as tokens.

    Args:
        backbone (Backbone): sizes, with a vocabulary of 256 or more.
        row_tokens (int): tokens a row.

    Returns:
        Source: backbone and text.
    """
    return Source(
        name=f"random weights on bytes of Python's documentation, rows of {row_tokens} bytes",
        build=partial(
            _build,
            partial(llama3_2, **backbone.builder_arguments()),
            partial(load_random_backbone, backbone=backbone),
        ),
        tokens=_rows(list(_text().encode()), row_tokens),
    )


def _build(
    backbone_builder: Callable[[], TransformerDecoder],
    load: Callable[[QSTModel], None],
    **changes: Any,
) -> QSTModel:
    with training.set_default_dtype(DTYPE), torch.device("meta"):
        model = qst_decoder(backbone_builder(), **{**model_arguments(), **changes})
    load(model)
    return model


def _text() -> str:
    return "\n\n".join(topics[name] for name in sorted(topics))


def _rows(ids: list[int], row_tokens: int) -> torch.Tensor:
    num_rows = len(ids) // row_tokens
    return torch.tensor(ids[: num_rows * row_tokens]).view(num_rows, row_tokens)
