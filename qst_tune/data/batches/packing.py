"""Packs of several rows, in which each row learns its own labels and nothing of its neighbours.

torchtune 0.6.1 shifts the labels of a whole pack at once, so the last token of each row learns to
predict the first one of the row behind it, which it cannot see (torchtune issue 2613). Here labels
are aligned row by row before packing.
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import Subset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import PackedDataset
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.batches.loader import MapDataset
from qst_tune.errors import UserError
from qst_tune.modules.model_limits import ModelLimits
from qst_tune.torchtune_compat import component_of

_OWN_COMPONENTS = ("torchtune.", "qst_tune.")


@dataclass(frozen=True)
class Packing:
    """A dataset block without its packing, and whether a row may continue in the next pack."""

    block: DictConfig
    split_across_pack: bool

    def apply(self, rows: MapDataset, tokenizer: ModelTokenizer, name: str) -> "AlignedPacks":
        """Pack checked rows to the tokenizer's ``max_seq_len``; ``name`` is the config's key.

        UserError if there is no length, the rows are no texts, or for a bad row.
        """
        if getattr(tokenizer, "max_seq_len", None) is None:
            raise UserError(
                f"{name}: packed=True needs tokenizer.max_seq_len, the length of a pack"
            )
        if not hasattr(rows[0].get("labels"), "__len__"):
            raise UserError(
                f"{name}: packed=True is for rows of text, not for preferences or classes: set it "
                "to False"
            )
        try:
            return _pack(
                rows,
                name,
                max_seq_len=tokenizer.max_seq_len,
                split_across_pack=self.split_across_pack,
            )
        except UserError:
            sys.stderr.write("\n")  # the packer's progress bar has not ended its line
            raise


def split_off_packing(block: DictConfig) -> Packing | None:
    """Take the packing out of a dataset block, so that rows are checked before they are packed.

    None if it does not pack, or is of the user's own code.
    """
    if not block.get("packed") or not str(block.get("_component_")).startswith(_OWN_COMPONENTS):
        return None
    parameters = inspect.signature(component_of(block._component_)).parameters
    unpacked = DictConfig({**block, "packed": False})
    split = block.get("split_across_pack")
    if split is None:
        default = parameters.get("split_across_pack")
        split = False if default is None else default.default
    return Packing(unpacked, bool(split))


def is_packed(dataset: object) -> bool:
    """Report whether the items of a map-style dataset are packs of several rows."""
    if isinstance(dataset, Subset):
        return is_packed(dataset.dataset)
    return isinstance(dataset, PackedDataset) or bool(getattr(dataset, "packed", False))


def align_packs(packs: Any, name: str, limits: ModelLimits | None = None) -> "AlignedPacks":
    """Align the labels of packs that the user's own code made.

    Items have ``tokens``, ``labels``, ``input_pos`` ``[T]`` and ``seq_lens``, as torchtune's
    PackedDataset makes them.
    """
    if type(packs) is PackedDataset and packs.split_across_pack:
        # If a row continues in the next pack, only the rows have its last label here.
        return _pack(
            packs.ds,
            name,
            limits,
            max_seq_len=packs.max_seq_len,
            split_across_pack=True,
            padding_idx=packs.padding_idx,
            max_packs=packs.max_packs,
        )
    return AlignedPacks(packs, name, limits, is_aligned=False)


def _pack(
    rows: MapDataset, name: str, limits: ModelLimits | None = None, **settings: object
) -> "AlignedPacks":
    packs = PackedDataset(_AlignedRows(rows), **settings)
    return AlignedPacks(packs, name, limits, is_aligned=True)


class _AlignedRows:
    """Rows whose labels are aligned, in the order in which they are read."""

    def __init__(self, rows: MapDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for row in (self.rows[index] for index in range(len(self.rows))):
            labels = [*row["labels"][1:], CROSS_ENTROPY_IGNORE_IDX]
            yield {"tokens": list(row["tokens"]), "labels": labels}


class AlignedPacks:
    """Packs, in the form of torchtune's PackedDataset, whose labels are aligned within each row."""

    packed = True

    def __init__(
        self, packs: MapDataset, name: str, limits: ModelLimits | None = None, *, is_aligned: bool
    ) -> None:
        self.packs = packs
        self.name = name
        self.limits = limits
        self.is_aligned = is_aligned

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pack = self.packs[index]
        problem = self.limits.problem(pack) if self.limits else None
        if problem:
            raise UserError(f"{self.name}: pack {index} cannot be used: {problem}")
        if self.is_aligned:
            # torchtune numbers positions modulo the length of a pack: in a longer row they fall
            # back to 0 among tokens that see each other.
            return {**pack, "input_pos": _positions(pack["seq_lens"])}
        missing = {"tokens", "labels", "input_pos", "seq_lens"} - set(pack)
        if missing:
            raise UserError(
                f"{self.name}: pack {index} has no {', '.join(sorted(missing))}, which "
                "torchtune.datasets.PackedDataset gives to each pack"
            )
        return {**pack, "labels": _align_pack(pack["labels"], pack["seq_lens"])}


def _positions(seq_lens: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.arange(int(length)) for length in seq_lens])


def _align_pack(labels: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
    aligned = labels.roll(-1)
    lengths = torch.as_tensor(seq_lens)
    aligned[lengths[lengths > 0].cumsum(0) - 1] = CROSS_ENTROPY_IGNORE_IDX
    return aligned
