"""The GPTQ layout, read back by a reader written from its description, bit by bit."""

import pytest
import torch

from qst_tune.quantization.affine import AffineWeight, quantize_affine
from qst_tune.quantization.gptq import from_gptq, pack_words, to_gptq
from tests.reference import stored_formats
from tests.reference.gptq_reader import decode, read_bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_the_numbers_one_after_another(bits: int) -> None:
    values = torch.randint(0, 2**bits, (64, 5))
    words = pack_words(values, bits)
    assert (words.dtype, words.shape) == (torch.int32, (64 * bits // 32, 5))
    for column in range(5):
        assert read_bits(words[:, column].tolist(), bits) == values[:, column].tolist()


def test_a_number_of_three_bits_spans_two_words() -> None:
    """Number 10 has bits 30 to 32, number 21 bits 63 to 65, as in AutoGPTQ's packing."""
    values = torch.zeros(32, 1, dtype=torch.int64)
    values[10], values[21] = 0b110, 0b011
    assert [word & 0xFFFFFFFF for word in pack_words(values, 3)[:, 0].tolist()] == [
        0b10 << 30,
        0b1 | 1 << 31,
        0b01,
    ]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 96])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_the_reader_gets_the_weight_back(bits: int, group_size: int, form: str) -> None:
    weight = quantize_affine(torch.randn(64, 96), bits=bits, group_size=group_size)
    tensors = to_gptq(weight, bits=bits, group_size=group_size, form=form)
    scale = weight.weight_scale.half().float().repeat_interleave(group_size, dim=1)
    zero_point = weight.zero_point.float().repeat_interleave(group_size, dim=1)
    expected = scale * (weight.codes.float() - zero_point)
    assert torch.equal(decode(tensors, bits=bits, form=form), expected)


def test_shapes_and_types_are_the_formats() -> None:
    weight = quantize_affine(torch.randn(64, 96), bits=4, group_size=32)
    tensors = to_gptq(weight, bits=4, group_size=32, form="gptq")
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        "qweight": (torch.int32, (12, 64)),
        "qzeros": (torch.int32, (3, 8)),
        "scales": (torch.float16, (3, 64)),
        "g_idx": (torch.int32, (96,)),
    }


def test_zero_point_0_fits_only_version_2() -> None:
    weight = quantize_affine(torch.rand(32, 32), bits=4)
    assert not weight.zero_point.any()
    with pytest.raises(ValueError, match="zero point 0, which the format gptq cannot store"):
        to_gptq(weight, bits=4, group_size=32, form="gptq")
    tensors = to_gptq(weight, bits=4, group_size=32, form="gptq_v2")
    assert not tensors["qzeros"].any()


@pytest.mark.parametrize(("out_dim", "in_dim", "group_size"), [(33, 64, 64), (64, 80, 32)])
def test_sizes_that_do_not_fit_are_refused(out_dim: int, in_dim: int, group_size: int) -> None:
    weight = quantize_affine(torch.randn(out_dim, in_dim), bits=4)
    weight = AffineWeight(weight.codes, weight.weight_scale, weight.zero_point)
    with pytest.raises(ValueError, match=f"{out_dim} x {in_dim} does not fit the GPTQ format"):
        to_gptq(weight, bits=4, group_size=group_size, form="gptq")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (4, 64), (8, -1)])
def test_what_another_program_wrote_is_taken_over_exactly(
    bits: int, group_size: int, form: str, act_order: bool
) -> None:
    """128 input channels in groups of 32, 64 or one; 64 output channels."""
    generator = torch.Generator().manual_seed(0)
    kind = {"bits": bits, "group_size": group_size, "form": form, "act_order": act_order}
    parts, dense = stored_formats.gptq(64, 128, generator, **kind)
    stored = from_gptq(parts, bits=bits, form=form)
    assert (stored.order is not None) == (act_order and group_size != -1)
    assert torch.equal(stored.dense(torch.float32), dense)
    assert torch.equal(stored.dense(torch.float32), decode(parts, bits=bits, form=form))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_is_taken_over_is_written_again_to_the_last_bit(
    bits: int, form: str, act_order: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    kind = {"bits": bits, "form": form, "act_order": act_order}
    parts, _ = stored_formats.gptq(64, 128, generator, **kind)
    stored = from_gptq(parts, bits=bits, form=form)
    written = to_gptq(stored.weight, bits=bits, group_size=32, form=form, order=stored.order)
    assert written.keys() == parts.keys()
    for name, tensor in parts.items():
        assert torch.equal(written[name], tensor), name


def test_a_last_group_may_be_smaller_than_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    parts, dense = stored_formats.gptq(32, 80, generator, group_size=32)
    # Three groups of 32 would be 96 channels; the size is not in the tensors.
    assert len(parts["scales"]) == 3
    assert torch.equal(
        from_gptq(parts, bits=4, form="gptq", group_size=32).dense(torch.float32), dense
    )


def test_groups_of_other_sizes_are_refused() -> None:
    parts, _ = stored_formats.gptq(32, 64, torch.Generator().manual_seed(0))
    g_idx = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(ValueError, match="in groups that are not of 32, which is not supported"):
        from_gptq({**parts, "g_idx": g_idx}, bits=4, form="gptq")


def test_tensors_of_another_linear_are_refused() -> None:
    parts, _ = stored_formats.gptq(32, 64, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"scales \(16, 2\) and zero points \(32, 2\) are not"):
        from_gptq({**parts, "scales": parts["scales"][:, :16]}, bits=4, form="gptq")
