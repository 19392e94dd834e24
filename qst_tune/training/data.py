"""Datasets and loaders as torchtune's recipes build them, with their mistakes made readable."""

from collections.abc import Sized
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune.config._utils import _get_component_from_path
from torchtune.data import padded_collate_packed
from torchtune.datasets import ConcatDataset, PackedDataset

from qst_tune.errors import UserError
from qst_tune.training.cli import instantiate
from qst_tune.training.distributed import rank_and_world_size

DEFAULT_COLLATE = "torchtune.data.padded_collate_sft"


def build_dataset(block: DictConfig | ListConfig, name: str, tokenizer: Any) -> Any:
    """Build one dataset, or the concatenation of a list of them.

    Args:
        block (DictConfig | ListConfig): the ``dataset`` block of the config.
        name (str): its key, for error messages.
        tokenizer (Any): torchtune model tokenizer.

    Returns:
        Any: a map-style dataset.

    Raises:
        UserError: if it cannot be built or has no rows.
    """
    if isinstance(block, ListConfig):
        parts = [
            instantiate(part, f"{name}[{index}]", tokenizer) for index, part in enumerate(block)
        ]
        dataset = ConcatDataset(datasets=parts)
    else:
        dataset = instantiate(block, name, tokenizer)
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise UserError(f"{name}: the dataset has no rows")
    return dataset


def build_dataloader(
    dataset: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    ignore_index: int,
    collate_fn: str = DEFAULT_COLLATE,
    drop_last: bool = True,
) -> StatefulDataLoader:
    """Build a loader over this process's share of a dataset.

    Args:
        dataset (Any): map-style, from :func:`build_dataset`.
        tokenizer (Any): gives the padding id.
        batch_size (int): rows a batch and process.
        shuffle (bool): a new order each epoch, a function of ``seed`` and the epoch alone.
        seed (int): of the order.
        ignore_index (int): label of padding.
        collate_fn (str): dotted name of a collate function for unpacked rows.
        drop_last (bool): drop an incomplete last batch.

    Returns:
        StatefulDataLoader: batches of ``tokens`` and ``labels`` ``[B, T]``; packed ones also have
        ``mask`` and ``input_pos``.
    """
    rank, world_size = rank_and_world_size()
    sampler = StatefulDistributedSampler(
        dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last
    )
    collate = partial(
        _get_component_from_path(collate_fn),
        padding_idx=tokenizer.pad_id,
        ignore_idx=ignore_index,
    )
    return StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=padded_collate_packed if is_packed(dataset) else collate,
        drop_last=drop_last,
    )


def is_packed(dataset: Any) -> bool:
    """Tell whether rows are packs of several samples.

    Args:
        dataset (Any): from :func:`build_dataset`.

    Returns:
        bool: True for packs.
    """
    return isinstance(dataset, PackedDataset) or bool(getattr(dataset, "packed", False))


def check_length(tokens: torch.Tensor, max_seq_len: int) -> None:
    """Refuse a batch that is longer than the model can see.

    Args:
        tokens (torch.Tensor): ``[B, T]``.
        max_seq_len (int): the model's.

    Raises:
        UserError: if T is larger.
    """
    if tokens.shape[1] > max_seq_len:
        raise UserError(
            f"a row of {tokens.shape[1]} tokens is longer than the model's max_seq_len "
            f"{max_seq_len}: set tokenizer.max_seq_len={max_seq_len} or lower to truncate rows"
        )
