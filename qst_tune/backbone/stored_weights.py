"""How a quantised directory stores its weights, and how transformers' loader gets to see them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torchtune import utils

from qst_tune.backbone.directory import read_weights_file
from qst_tune.backbone.experts import with_dense
from qst_tune.backbone.identity import WeightDigests
from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import BaseQuantization, LinearFormat, MakeLinear
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.quantization.stored import (
    Stored,
    StoredAffine,
    StoredNF4,
    StoredTransposed,
    stored_on,
)

_aten = torch.ops.aten
# A list: the experts of a mixture, in one tensor.
Decode = Callable[[dict[str, torch.Tensor]], Stored | list[Stored]]


class StoredWeight(torch.Tensor):
    """A tensor that keeps its codes for as long as it is only moved, and decodes for all else.

    transformers' loader renames weights, and for some model types stacks, splits or fuses them. A
    weight that is only renamed arrives with its codes, and so do the experts of a mixture, stacked
    and perhaps joined along their outputs; any other one arrives dense. ``pieces`` has one of one
    weight ``[O, I]``; of experts ``[E, O, I]``, for each piece of their outputs, the E weights.
    """

    pieces: list[list[Stored]]

    @staticmethod
    def __new__(
        cls, pieces: list[list[Stored]], shape: tuple[int, ...], dtype: torch.dtype
    ) -> "StoredWeight":
        """Make the tensor without memory of its own."""
        made: StoredWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("cpu")
        )
        made.pieces = pieces
        return made

    @property
    def is_stack(self) -> bool:
        """Whether it is ``[E, O, I]`` of experts that are stored each by itself."""
        return self.ndim > len(self.pieces[0][0].shape)

    def dense(self, device: torch.device | None = None) -> torch.Tensor:
        """Decode the weight to its dtype, on the CPU by default."""
        there = device or torch.device("cpu")
        pieces = [
            [stored_on(weight, there).dense(self.dtype) for weight in weights]
            for weights in self.pieces
        ]
        if not self.is_stack:
            return pieces[0][0]
        return torch.cat([torch.stack(experts) for experts in pieces], dim=1)

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes an argument
        kind = type(self.pieces[0][0]).__name__
        return f"StoredWeight({kind}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Keep the codes where only name, dtype or the experts' tensor changes."""
        kwargs = kwargs or {}
        first = args[0]
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(first.pieces, tuple(first.shape), first.dtype)
        if func is _aten._to_copy.default and _stays(kwargs.get("device")):
            return cls(first.pieces, tuple(first.shape), kwargs.get("dtype") or first.dtype)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if func is _aten.stack.default and dim == 0 and _are(first, is_stack=False):
            weights = [weight.pieces[0][0] for weight in first]
            return cls([weights], (len(first), *first[0].shape), first[0].dtype)
        if func is _aten.cat.default and dim == 1 and _are(first, is_stack=True):
            shape = list(first[0].shape)
            shape[1] = sum(stack.shape[1] for stack in first)
            return cls([p for stack in first for p in stack.pieces], tuple(shape), first[0].dtype)
        return with_dense(cls, func, args, kwargs)


def _stays(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


def _are(weights: Any, *, is_stack: bool) -> bool:
    return all(isinstance(w, StoredWeight) and w.is_stack == is_stack for w in weights)


@dataclass
class FileTensor:
    """One tensor of a file for transformers' loader; it is hashed when it is read."""

    name: str
    tensor: torch.Tensor  # a view of the memory-mapped file
    digests: WeightDigests

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self.tensor.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Copy what is asked for: the model does not hold on to the file."""
        self.identify()
        return self.tensor[index].clone()

    def identify(self) -> None:
        """Hash the whole tensor, once."""
        self.digests.add(self.name, self.tensor)


@dataclass
class LazyWeight:
    """One weight for transformers' loader: its tensors are read and put together on demand."""

    name: str
    parts: dict[str, FileTensor]
    decode: Decode
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> StoredWeight:
        """Read the whole weight, not decoded, whatever the index: the loader asks for ``[...]``.

        UserError if a tensor is missing or they do not belong together.
        """
        try:
            stored = self.decode({end: part[...] for end, part in self.parts.items()})
        except KeyError as error:
            raise UserError(f"{self.name} is damaged: its tensor {error} is missing") from error
        except (ValueError, RuntimeError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.name} cannot be read: {reason}") from error
        if isinstance(stored, list):
            return StoredWeight([stored], (len(stored), *stored[0].shape), self.dtype)
        return StoredWeight([[stored]], stored.shape, self.dtype)


# Of a list of layers; a vision-language model's had another name before transformers 4.52.
_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers")


class Layout(NamedTuple):
    """The tensors that make one weight; all share what comes before these ends of their names.

    ``main`` is the end of the first one. Without one that ends in ``needs`` it is an ordinary
    weight. ``parts`` are all ends, optional ones included; ``target`` is that of the dense weight.
    """

    main: str
    needs: str
    parts: tuple[str, ...]
    target: str = ".weight"


@dataclass(frozen=True)
class DirectoryFormat:
    """How a directory stores its weights."""

    title: str  # for messages
    layouts: tuple[Layout, ...]  # of the tensors of a weight
    decode: Decode  # puts them together
    own: str | None  # our linear format with the same codes; None: no format has them
    make: MakeLinear  # makes a linear of that format, of a weight on meta
    skips: Callable[[str], bool]  # whether a module of this name is not quantised

    @property
    def default(self) -> BaseQuantization:
        """The format unless another is asked for: "auto" is the directory's own, of integers."""
        if self.own in (None, "nf4"):
            return "nf4"
        return "fp4" if self.own == "fp4" else "auto"

    def leaves_out(self, name: str) -> bool:
        """Whether a linear, such as "0.self_attn.q_proj" of the layers, is not quantised."""
        return any(self.skips(f"{prefix}.{name}") for prefix in _PREFIXES)

    def takes_over(self, base_quantization: LinearFormat) -> bool:
        """Whether codes are taken over; else weights are decoded and quantised again."""
        return self.own is not None and base_quantization in ("auto", self.own)

    def linear(self, stored: Stored, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Module:
        """Make a frozen linear of codes, which decodes to ``dtype``, and of a bias ``[O]``."""
        if isinstance(stored, StoredTransposed):
            stored = stored.weight  # of experts, which are linear layers here
        if isinstance(stored, StoredNF4):
            taken = NF4Linear(stored.nf4(dtype), bias, quant_type=stored.quant_type)
            taken.quantization = self.own or taken.quantization
            return taken
        assert isinstance(stored, StoredAffine)
        linear: Any = self.make(torch.empty(stored.shape, device="meta"), bias)
        linear.take_(stored)
        frozen: nn.Module = linear.requires_grad_(False)
        return frozen


log = utils.get_logger("INFO")


def open_tensors(paths: Iterable[Path], digests: WeightDigests) -> dict[str, FileTensor]:
    """Open files; their tensors are read, and hashed, on demand. UserError if one is damaged."""
    named = (item for path in paths for item in read_weights_file(path).items())
    return {name: FileTensor(name, tensor, digests) for name, tensor in named}


def check_dtypes(tensors: Mapping[str, FileTensor]) -> None:
    """Refuse integers where a model that is not quantised has weights, with a UserError."""
    for name, file in tensors.items():
        is_weight = name.endswith("weight") or file.tensor.ndim == 3
        if is_weight and not file.tensor.is_floating_point():
            raise UserError(
                f"the backbone's weight {name} is {file.dtype}, where floating-point numbers are "
                "expected: its config.json lacks the quantization_config, or the file is of "
                "another program"
            )


def as_dense(
    tensors: Mapping[str, FileTensor], stored: DirectoryFormat, dtype: torch.dtype
) -> dict[str, Any]:
    """Name a directory's weights as a dense one would; the loader reads each with ``[...]``.

    ``dtype`` is that of decoded weights. UserError if no weight is stored as ``stored`` says.
    """
    weights: dict[str, Any] = {}
    used: set[str] = set()
    for stem, layout in _stems(tensors, stored.layouts):
        own = {part: stem + part for part in layout.parts if stem + part in tensors}
        parts = {part.lstrip("._"): tensors[name] for part, name in own.items()}
        name = stem + layout.target
        weights[name] = LazyWeight(name, parts, stored.decode, dtype)
        used.update(own.values())
    if not weights:
        raise UserError(
            f"config.json: quantization_config is of {stored.title}, but no weight is stored so "
            f"(no tensor is named *{stored.layouts[0].needs})"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in used} | weights


def _stems(names: Mapping[str, Any], layouts: Iterable[Layout]) -> Iterator[tuple[str, Layout]]:
    for layout in layouts:
        for name in names:
            stem = name.removesuffix(layout.main)
            if stem != name and stem + layout.needs in names:
                yield stem, layout
            elif stem != name and layout.main != layout.target:
                raise UserError(
                    f"the weights are damaged: {name} is there, {stem}{layout.needs} not"
                )


def check_unused(unexpected: Iterable[str], weights: Mapping[str, Any], directory: Path) -> None:
    """Refuse biases that the model has no place for, and count the other unused tensors.

    UserError if a bias is not zero. (AutoGPTQ wrote zeros for linears without a bias.)
    """
    biases = {name for name in unexpected if name.endswith(".bias")}
    for name in sorted(biases):
        if name not in weights or weights[name][...].any():
            raise UserError(f"{directory} has a bias that the model lacks: {name}")
    others = sorted(set(unexpected) - biases)
    if others:
        log.info(f"{len(others)} tensors of {directory} are not used, for example {others[0]}")
