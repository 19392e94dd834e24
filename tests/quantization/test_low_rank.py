"""A repair is the best product of low rank for the error that its inputs weigh."""

import pytest
import torch

from qst_tune.quantization.low_rank import input_scale, low_rank, repair_factors
from qst_tune.quantization.nf4 import dequantize_nf4, quantize_nf4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation, of the whole decomposition in fp64."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


@pytest.mark.parametrize(("shape", "rank"), [((24, 40), 8), ((40, 24), 24), ((20, 17), 1)])
def test_of_a_small_matrix_it_is_the_exact_decomposition(shape: tuple[int, int], rank: int) -> None:
    """Rank and oversampling reach the smaller side."""
    matrix = random(*shape)
    left, right = low_rank(matrix, rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    torch.testing.assert_close((left @ right).double(), exact(matrix, rank), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(192, 576), (576, 192), (300, 301)])
@pytest.mark.parametrize("rank", [1, 16, 32])
def test_of_a_weights_rounding_it_is_nearly_the_best(shape: tuple[int, int], rank: int) -> None:
    """The hardest case: the singular values of rounding fall slowly."""
    weight = random(*shape)
    error = weight - dequantize_nf4(quantize_nf4(weight))
    left, right = low_rank(error, rank)
    best = (error.double() - exact(error, rank)).norm()
    ours = (error.double() - left.double() @ right.double()).norm()
    assert best <= ours < 1.001 * best


def test_the_error_of_outputs_is_what_is_made_least() -> None:
    """Inputs of very different sizes: what counts is E x, on inputs with these mean squares."""
    error, sizes = random(24, 40), torch.logspace(-1, 1, 40)
    left, right = repair_factors(error, sizes.square(), 8)
    best = exact(error * sizes, 8) / sizes
    torch.testing.assert_close((left @ right).double(), best, rtol=0, atol=1e-4)
    x = random(4096, 40, seed=1) * sizes

    def lost(repair: torch.Tensor) -> torch.Tensor:
        return (x.double() @ (error.double() - repair).T).norm()

    assert lost(left.double() @ right.double()) < 0.8 * lost(exact(error, 8))


def test_a_silent_channel_is_neither_divided_by_zero_nor_lost() -> None:
    mean_square = torch.ones(40)
    mean_square[7] = 0
    left, right = repair_factors(random(24, 40), mean_square, 24)
    torch.testing.assert_close(left @ right, random(24, 40), rtol=0, atol=1e-3)
    assert torch.equal(input_scale(torch.zeros(3)), torch.ones(3))
    assert torch.equal(
        input_scale(torch.tensor([0.0, 0.0, 3.0])), torch.tensor([0.01, 0.01, 3**0.5])
    )


def test_one_channel_of_huge_inputs_does_not_make_the_others_count_alike() -> None:
    mean_square = torch.tensor([1.0, 4.0, 0.25, 1e8, 1.0])
    expected = torch.tensor([1.0, 2.0, 0.5, 1e4, 1.0])
    torch.testing.assert_close(input_scale(mean_square), expected)


def test_the_same_matrix_gives_the_same_bits_whatever_was_drawn_before() -> None:
    matrix = random(96, 80)
    torch.manual_seed(3)
    first = low_rank(matrix, 8)
    state = torch.random.get_rng_state()
    torch.manual_seed(4)
    second = low_rank(matrix, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_matrix_of_zeros_has_a_product_of_zeros() -> None:
    left, right = low_rank(torch.zeros(12, 20), 4)
    assert torch.equal(left @ right, torch.zeros(12, 20))
