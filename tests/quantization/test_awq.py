"""AWQ's weights decode to the numbers that a literal writer drew."""

import pytest
import torch

from qst_tune.quantization.awq import from_awq
from tests.reference import stored_formats as formats


@pytest.mark.parametrize(("shape", "group_size"), [((16, 64), 32), ((72, 96), 48), ((8, 32), 32)])
def test_codes_scales_and_zero_points_are_taken_over_exactly(shape, group_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parts, dense = formats.awq(*shape, generator, group_size=group_size)
    stored = from_awq(parts)
    assert stored.layout.group_size == group_size
    assert torch.equal(stored.dense(torch.float32), dense)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    parts, _ = formats.awq(16, 64, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"scales \(8, 2\) and zero points \(16, 2\)"):
        from_awq({**parts, "scales": parts["scales"][:, :8]})
