import pytest

from qst_tune.estimation.largest_batch import LargestBatch, largest_batch


@pytest.mark.parametrize("start", [1, 4, 16])
@pytest.mark.parametrize("limit", [150, 1000, 1009, 1010, 5000])
def test_affine_memory_gives_the_exact_answer(start: int, limit: int) -> None:
    answer = largest_batch(lambda b: 100 + 10 * b, limit, start=start, max_trial=10_000)
    assert answer == LargestBatch((limit - 100) // 10, is_verified=True)


def test_nothing_fits() -> None:
    answer = largest_batch(lambda b: 100 + 10 * b, 105, start=4, max_trial=64)
    assert answer == LargestBatch(0, is_verified=True)
    assert str(answer) == "none"


def test_batches_that_are_too_large_to_try_are_extrapolated() -> None:
    tried = []

    def peak(batch: int) -> int:
        tried.append(batch)
        return 100 + 10 * batch

    answer = largest_batch(peak, 10_000, start=4, max_trial=64)
    assert answer == LargestBatch(990, is_verified=False)
    assert str(answer) == "about 990"
    assert max(tried) == 8


def test_answer_fits_where_memory_bends() -> None:
    def peak(batch: int) -> int:
        return max(500, 10 * batch * batch)

    answer = largest_batch(peak, 4000, start=2, max_trial=64)
    assert peak(answer.batch_size) <= 4000
