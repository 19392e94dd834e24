"""Builders of a method's model out of builders of torchtune's decoders."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def method_builder(
    prefix: str,
    method: Callable[..., nn.Module],
    backbone_builder: Callable[..., nn.Module],
) -> Callable[..., Any]:
    """Turn a builder of a decoder into a builder of a method's model over it.

    The new builder takes the arguments of both, all flat, as torchtune's configs want them, with a
    signature in which ``tune validate`` finds a misspelt one. ``prefix`` is in front of its name,
    in place of ``backbone_``; its attribute ``backbone_builder`` is the one given.
    """
    backbone_parameters = inspect.signature(backbone_builder).parameters
    own_signature = inspect.signature(method)
    own_parameters = list(own_signature.parameters.values())[1:]

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        for_backbone = {
            name: kwargs.pop(name) for name in list(kwargs) if name in backbone_parameters
        }
        return method(backbone_builder(*args, **for_backbone), **kwargs)

    name = f"{prefix}_{backbone_builder.__name__.removeprefix('backbone_')}"
    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"Build {name}: torchtune's ``{backbone_builder.__name__}`` with {method.__name__}."
    )
    build.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # read by inspect
        [*backbone_parameters.values(), *own_parameters],
        return_annotation=own_signature.return_annotation,
    )
    build.backbone_builder = backbone_builder  # type: ignore[attr-defined]  # read by the estimator
    return build
