"""What is not finite is refused, with the dtype's name where that may be the cause."""

import pytest
import torch
from torch import nn

from qst_tune.errors import UserError
from qst_tune.modules.precision import check_finite, overflow_hint


def test_only_fp16_is_named_as_the_cause() -> None:
    assert overflow_hint(nn.Linear(2, 2)) == overflow_hint(nn.Linear(2, 2).bfloat16()) == ""
    assert "dtype=fp16 ends at 65504" in overflow_hint(nn.Linear(2, 2).half())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    check_finite(torch.zeros(3), nn.Linear(2, 2), "logits")
    with pytest.raises(UserError, match=r"^logits of the model are not finite$"):
        check_finite(torch.tensor([0.0, value]), nn.Linear(2, 2), "logits")
