"""Decode FP8 weights: values of 8 bits with a scale for the whole, each channel or each block."""

import torch


def decode_float8(
    weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None
) -> torch.Tensor:
    """Multiply FP8 values with their scales.

    Source: ``weight_dequant`` of github.com/deepseek-ai/DeepSeek-V3 (its ``weight_scale_inv`` is
    multiplied too, despite its name); "float-quantized" of compressed-tensors.

    Args:
        weight (torch.Tensor): ``[..., O, I]``, any floating-point dtype.
        scale (torch.Tensor): one number; one a row, ``[..., O]`` or ``[..., O, 1]``; or, with
            ``block``, ``[..., ceil(O / b), ceil(I / c)]``.
        block (tuple[int, int] | None): b and c.

    Returns:
        torch.Tensor: ``[..., O, I]`` fp32.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    values, factors = weight.float(), scale.float()
    if factors.numel() == 1:
        return values * factors.reshape(())
    if factors.shape == values.shape[:-1]:
        factors = factors.unsqueeze(-1)
    sizes = (1, values.shape[-1]) if block is None else block
    wanted = tuple(-(-size // b) for size, b in zip(values.shape[-2:], sizes, strict=True))
    if factors.shape != (*values.shape[:-2], *wanted):
        raise ValueError(
            f"scales {tuple(scale.shape)} are not those of {tuple(weight.shape)} in blocks of "
            f"{sizes[0]} x {sizes[1]}"
        )
    for dim, size in zip((-2, -1), sizes, strict=True):
        factors = factors.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
    return values * factors
