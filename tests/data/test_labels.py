"""Each label is moved to the position that predicts it, and never across the end of a sample."""

import torch

from qst_tune.data.batches.collate import align_labels

LABELS = torch.tensor([[-100, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]])


def test_position_holds_the_label_of_the_token_behind_it() -> None:
    expected = [[1, 2, 3, 4, 5, -100], [7, 8, 9, 10, 11, -100]]
    assert align_labels(LABELS).tolist() == expected
    assert align_labels(LABELS, ignore_index=-1)[:, -1].tolist() == [-1, -1]


def test_sample_ends_where_positions_begin_anew() -> None:
    input_pos = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 3]])
    expected = [[1, 2, -100, 4, 5, -100], [-100, 8, 9, 10, -100, -100]]
    assert align_labels(LABELS, input_pos=input_pos).tolist() == expected
