"""Repairs the rounding of a frozen backbone in closed form, while its weights are read again.

W ~ Q(W) + L R: what rounding took from each linear layer, weighed by its inputs on a short text,
comes back as a product of low rank. Where blocks have a scale each (NF4, FP4), they are first
rounded again with the scales that the same weighing chooses. Nothing is trained; all follows from
the published weights.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune import utils

from qst_tune.backbone.calibration import calibration_tokens, text_id
from qst_tune.backbone.experts import ExpertLinears, QuantizedExperts
from qst_tune.backbone.identity import Fingerprint
from qst_tune.backbone.stored_weights import DirectoryFormat
from qst_tune.distributed.processes import is_main_process
from qst_tune.errors import UserError
from qst_tune.modules.backbone import Backbone
from qst_tune.modules.backbone_formats import LinearFormat, QuantizedLinear
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.repair import Repair
from qst_tune.quantization.low_rank import input_scale, repair_factors

log = utils.get_logger("INFO")


def repairable_linears(root: nn.Module) -> dict[str, Any]:
    """Return the quantised linears below a module by their paths, without experts of mixtures."""
    experts = [m for m in root.modules() if isinstance(m, ExpertLinears)]
    left_out = {id(part) for expert in experts for part in expert.modules()}
    return {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, QuantizedLinear) and id(module) not in left_out
    }


def reserve_repairs(
    layers: nn.Module, rank: int, dtype: torch.dtype, stored: DirectoryFormat | None = None
) -> None:
    """Give the quantised linears of layers on meta a repair of this rank, in place; 0: none.

    Loading fills it. A narrower linear gets as much as it has. ``stored`` is how the model's
    directory is quantised. ValueError if the rank is no whole number from 0, no linear is quantised
    or all are narrower than the rank, the directory is quantised already, or the layers have
    weights.
    """
    if type(rank) is not int or rank < 0:
        raise ValueError(f"repair_rank={rank!r} must be a whole number from 0 (0: no repair)")
    if rank == 0:
        return
    if stored is not None:
        raise ValueError(
            f"repair_rank={rank} needs the weights before they were rounded, and the directory is "
            f"{stored.title}: name that of the model that is not quantised, or set it to 0"
        )
    linears = repairable_linears(layers)
    if not linears:
        raise ValueError(
            f"repair_rank={rank} repairs what rounding took from linear layers, and none is "
            "rounded: set base_quantization to nf4, or repair_rank to 0"
        )
    full = max(map(_full_rank, linears.values()))
    if rank > full:
        raise ValueError(
            f"repair_rank={rank} is more than the rank of any weight of the layers: set it to "
            f"{full} or less"
        )
    if any(not p.is_meta for linear in linears.values() for p in linear.parameters()):
        raise ValueError(
            f"repair_rank={rank} is computed while the weights are read from the model's "
            "directory: build the model on the meta device and load it, as the recipes do"
        )
    for linear in linears.values():
        own = min(rank, _full_rank(linear))
        left, right = (linear.out_features, own), (own, linear.in_features)
        empty = partial(torch.empty, dtype=dtype, device="meta")
        linear.repair = Repair(empty(left), empty(right), _name(linear, rank))


def _full_rank(linear: Any) -> int:
    return min(int(linear.in_features), int(linear.out_features))


def _name(linear: Any, rank: int) -> str:
    searched = ", scales searched" if isinstance(linear, NF4Linear) else ""
    return f"rank {rank}{searched} (text {text_id()})"


def device_of(backbone: Backbone) -> torch.device:
    """Where a backbone computes."""
    device: torch.device = backbone.embedding.weight.device
    return device


def repair_rank_of(root: nn.Module) -> int:
    """The rank that :func:`reserve_repairs` was given; 0: none."""
    return max((m.rank for m in root.modules() if isinstance(m, Repair)), default=0)


class Repairs:
    """Fills the repairs of a backbone that is loaded, rounded and not repaired yet.

    One pass over the calibration text measures the inputs of each linear; then :meth:`take` gets
    the dense weights one after the other, and keeps nothing of them but two factors. ``root`` has
    the linears under the names that :meth:`take` gets. UserError if ``directory`` has no tokenizer,
    or the pass overflows.
    """

    def __init__(self, root: nn.Module, backbone: Backbone, directory: Path, rank: int) -> None:
        self._start = time.perf_counter()
        self._rank = rank
        self._root = root
        self._linears = repairable_linears(root)
        self._dtype = backbone.embedding.weight.dtype
        self._forget()
        vocab_size, self._device = len(backbone.embedding.weight), device_of(backbone)
        tokens = calibration_tokens(directory, vocab_size, backbone.max_seq_len).to(self._device)
        run = partial(self._run, backbone, tokens)
        self._mean_squares = mean_squares(run, self._linears)
        if not all(bool(found.isfinite().all()) for found in self._mean_squares.values()):
            raise UserError(
                "model.repair_rank: on the calibration text the model computes values that are not "
                f"finite in {self._dtype}: set dtype=bf16 or fp32"
            )
        # Of each linear, by its path: which part of its weighed squared error was taken back.
        self._shares: dict[str, float] = {}

    def _forget(self) -> None:
        """Let the linears run without a repair."""
        for linear in self._linears.values():
            linear.repair = None

    def _run(self, backbone: Backbone, tokens: torch.Tensor) -> None:
        backbone.run(tokens, taps=(), visit=lambda h: None)

    def _rounded(self, path: str, weight: torch.Tensor) -> Any:
        """The linear of this path, with its weight rounded."""
        return self._linears[path]

    def _keep(self, path: str, linear: nn.Module) -> None:
        """Store what was made of :meth:`_rounded`."""

    @torch.no_grad()
    def take(self, name: str, weight: torch.Tensor) -> None:
        """Repair the linear whose dense weight this is, if it is one's."""
        path, _, leaf = name.rpartition(".")
        if path not in self._linears or leaf != "weight":
            return
        linear = self._rounded(path, weight)
        # Of a linear that the text does not reach, all inputs count alike.
        mean_square = self._mean_squares.get(path, weight.new_ones(weight.shape[1])).float()
        lost = _error_of_outputs(_error_of(linear, weight), mean_square)
        if isinstance(linear, NF4Linear):
            linear.quantize_weighed_(weight, input_scale(mean_square).square())
        error = _error_of(linear, weight)
        factors = repair_factors(error, mean_square.to(error), self._rank)
        left, right = (factor.to(self._dtype) for factor in factors)
        linear.repair = Repair(
            left.to(self._device), right.to(self._device), _name(linear, self._rank)
        )
        error.addmm_(left.float(), right.float(), alpha=-1)
        remains = _error_of_outputs(error, mean_square)
        self._shares[path] = 1 - remains / lost if lost > 0 else 1.0
        self._keep(path, linear)

    def finish(self, before: Fingerprint, again: Fingerprint) -> None:
        """Check that both readings found the same weights, all of them; report what was done.

        UserError if they differ.
        """
        if before != again or self._linears.keys() != self._shares.keys():
            raise UserError(
                "the model's weights changed while they were read: start again once nothing writes "
                "to its directory"
            )
        if is_main_process():
            log.info(self._report())

    def _report(self) -> str:
        repairs = [linear.repair for linear in self._linears.values()]
        num_bytes = sum(p.nbytes for repair in repairs for p in repair.parameters())
        share = sum(self._shares.values()) / len(self._shares)
        experts = _num_experts(self._root)
        left_out = f"; {experts} weights of experts stay as they were rounded" if experts else ""
        return (
            f"{len(repairs)} linears repaired with rank {self._rank}: {100 * share:.0f} % of the "
            f"squared errors of their outputs taken back, {num_bytes / 1e6:.1f} MB, "
            f"{time.perf_counter() - self._start:.1f} s{left_out}"
        )


def _error_of(linear: Any, weight: torch.Tensor) -> torch.Tensor:
    """What rounding has taken from the weight, fp32."""
    rounded: torch.Tensor = linear.dense_weight(torch.float32)
    if rounded.device.type != "cuda":  # others, such as mps, lack decompositions
        rounded = rounded.cpu()
    return weight.to(rounded) - rounded


def _error_of_outputs(error: torch.Tensor, mean_square: torch.Tensor) -> float:
    """The squared error of a linear's outputs, up to a factor."""
    return float((error * input_scale(mean_square).to(error)).norm()) ** 2


def _num_experts(root: nn.Module) -> int:
    in_codes = sum(len(p) for p in root.parameters() if isinstance(p, QuantizedExperts))
    return in_codes + sum(len(m) for m in root.modules() if isinstance(m, ExpertLinears))


@torch.no_grad()
def mean_squares(
    run: Callable[[], object], linears: Mapping[str, nn.Module]
) -> dict[str, torch.Tensor]:
    """Measure the mean square of each input channel, fp32 ``[I]``, of the linears that run."""
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(linears, 0)

    def add(path: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()
        sums[path] = sums.get(path, 0) + x.square().sum(0)
        counts[path] += len(x)

    handles = [
        linear.register_forward_pre_hook(partial(add, path)) for path, linear in linears.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / counts[path] for path, total in sums.items()}


class RepairPlacing:
    """Hands the weights that transformers' loader reads to a backbone's repairs, and drops them.

    It stands where :class:`~qst_tune.backbone.placing.Placing` does at the first reading.
    """

    stored: DirectoryFormat | None = None
    error: UserError | None = None

    def __init__(self, repairs: Repairs, base_quantization: LinearFormat) -> None:
        self.repairs = repairs
        self.base_quantization = base_quantization

    def __deepcopy__(self, memo: dict[int, object]) -> "RepairPlacing":
        return self  # transformers copies the configuration that it is in

    def __call__(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Take one weight; the model that transformers fills keeps an empty one."""
        self.repairs.take(name, weight)
        path, _, leaf = name.rpartition(".")
        empty = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark
        model.get_submodule(path)._parameters[leaf] = empty
