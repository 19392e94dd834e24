"""Inside the context a weight is decoded once, and not kept after it."""

import gc
import weakref

import torch

from qst_tune.quantization.decoded_once import decoded, decoding_once


def test_a_weight_is_decoded_once_for_a_dtype_and_forgotten_with_the_context():
    weights, made = torch.randn(2, 3), []

    def of(index: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        made.append((index, dtype))
        return weights[index].to(dtype)

    first, second = weights[0], weights[1]
    with decoding_once():
        for dtype in (torch.float32, torch.float16, torch.float32):
            kept = decoded(first, dtype, lambda dtype=dtype: of(0, dtype).clone())
            assert torch.equal(kept, first.to(dtype))
        decoded(second, torch.float32, lambda: of(1))
        alive = weakref.ref(kept)
    assert made == [(0, torch.float32), (0, torch.float16), (1, torch.float32)]
    del kept
    gc.collect()
    assert alive() is None
    for _ in range(2):
        decoded(first, torch.float32, lambda: of(0))
    assert len(made) == 5
