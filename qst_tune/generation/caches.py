"""Key-value caches for the attentions of any torchtune decoder, both networks of QST included."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet, proxy

import torch
from torchtune import utils
from torchtune.modules import TransformerDecoder

from qst_tune.backbone.masks import causal_mask, positions
from qst_tune.errors import first_line
from qst_tune.generation.captured import CapturedStep, recorder
from qst_tune.generation.one_token import Substitute, substituted, substitutes
from qst_tune.modules.backbone_formats import QuantizedLinear
from qst_tune.modules.model_limits import check_finite
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel
from qst_tune.quantization.decoded_once import Decoded, decoding_once
from qst_tune.quantization.kernels import has_int8_kernel

log = utils.get_logger("INFO")

# A model of ours or torchtune's, in evaluation mode.
Decoder: TypeAlias = QSTModel | PEQAModel | TransformerDecoder

# Models over transformers' decoders, by the rows and rooms whose recorded steps gave what plain
# ones give; and any model that is not recorded.
_RECORDED: WeakKeyDictionary[Any, set[tuple[int, int]]] = WeakKeyDictionary()
_NOT_RECORDED: WeakSet[Any] = WeakSet()
# The third is the first that is replayed behind more tokens than it was recorded behind: what the
# model's Python read of them, as a length, stays in a recording.
_STEPS_TRIED = 3
# Of the largest logit, between sums in another order.
_TOLERANCE = {torch.float32: 1e-3}
_NARROW_TOLERANCE = 0.05

# Two bytes for each weight of a model of 1B parameters.
MOST_DECODED_BYTES = 2**31


class GrowingCache:
    """Keys and values of one attention: only the filled part, unlike torchtune's ``KVCache``.

    It doubles when it is full, and can forget its end. With a ``slot``, ``[1]`` int64, it computes
    on tensors that stay where they are, as a CUDA graph does: one token is written at that place,
    and all of the room is returned, of which a mask hides the rest.
    """

    def __init__(self) -> None:
        self.length = 0
        self.slot: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def update(self, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``[B, H, T, C]``, and return all so far, ``[B, H, length, C]``."""
        if self.slot is not None and self._keys is not None and self._values is not None:
            written = (self._keys, k_val), (self._values, v_val)
            keys, values = (held.index_copy_(2, self.slot, new) for held, new in written)
            return keys, values
        start, self.length = self.length, self.length + k_val.shape[2]
        keys = self._keys = _with_room(self._keys, k_val, start)
        values = self._values = _with_room(self._values, v_val, start)
        keys[:, :, start : self.length] = k_val
        values[:, :, start : self.length] = v_val
        return keys[:, :, : self.length], values[:, :, : self.length]

    def reserve(self, room: int) -> bool:
        """Make room for exactly ``room`` tokens; returns whether they are in other tensors now.

        There is nothing to do for an attention that never ran.
        """
        if self._keys is None or self._values is None or self._keys.shape[2] == room:
            return False
        self._keys = _copied(self._keys, self.length, self._keys, room)
        self._values = _copied(self._values, self.length, self._values, room)
        return True

    def cut(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        self.length = min(self.length, length)


def _with_room(held: torch.Tensor | None, new: torch.Tensor, start: int) -> torch.Tensor:
    """Return ``held``, or a longer copy of its first ``start`` tokens that has room for ``new``."""
    needed = start + new.shape[2]
    if held is not None and held.shape[2] >= needed:
        return held
    return _copied(held, start, new, max(needed, 2 * start))


def _copied(
    held: torch.Tensor | None, start: int, like: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    # Zeros: what is not finite would go through a mask that hides it.
    room = like.new_zeros(*like.shape[:2], num_tokens, like.shape[3])
    if held is not None:
        room[:, :, :start] = held[:, :, :start]
    return room


def attentions(model: Decoder) -> list[Any]:
    """Return each attention once: the backbone's from first to last, then the side network's."""
    # By what they can do, since Gemma 2's is no MultiHeadAttention.
    return [module for module in model.modules() if hasattr(module, "cache_enabled")]


@contextmanager
def attached(layers: Sequence[Any], caches: Sequence[Any]) -> Iterator[None]:
    """Let each of :func:`attentions` use a cache here; a pass needs ``mask`` and ``input_pos``."""
    for layer, cache in zip(layers, caches, strict=True):
        layer.kv_cache, layer.cache_enabled = cache, True
    try:
        yield
    finally:
        for layer in layers:
            layer.kv_cache, layer.cache_enabled = None, False


class ModelCaches:
    """What a model keeps from token to token.

    Keys and values of all attentions, those of the backbone and of the side network; and on a CPU
    the decoded weights, if they are no more than :data:`MOST_DECODED_BYTES`.
    """

    def __init__(self, model: Decoder) -> None:
        self._model, self._has_run = model, False
        self._substitutes: list[Substitute] | None = None
        # Found once: to look for them takes a CPU as long as two layers of SmolLM2 do.
        self._attentions = attentions(model)
        self._own = [GrowingCache() for _ in self._attentions]
        # Over transformers the backbone's attentions are not torchtune's, and have their own cache.
        new_cache = getattr(getattr(model, "backbone", None), "new_cache", None)
        self._frozen = None if new_cache is None else new_cache()
        self._decoded: Decoded | None = {} if _may_keep_decoded(model) else None
        self.step: CapturedStep | None = None
        record = recorder(model.tok_embeddings.weight.device)
        frozen = [] if self._frozen is None else [self._frozen]
        if record and all(cache.has_slots for cache in frozen) and model not in _NOT_RECORDED:
            # No cycle: what is on the GPU is free as soon as nobody has the caches.
            compute = partial(next_logits, model, proxy(self))
            self.step = CapturedStep(compute, [*self._own, *frozen], record)
        self.is_foreign = bool(frozen)

    def cut(self, length: int, num_new: int) -> int:
        """Forget all tokens after the first ``length``; ``num_new`` are added by the next pass.

        Returns the number of tokens that are left: 0 if the backbone must begin again.
        """
        kept = length if self._frozen is None else self._frozen.cut(length, num_new)
        for cache in self._own:
            cache.cut(kept)
        return kept

    def drop_slots(self, length: int) -> None:
        """Take what was in the caches before the last step moved the backbone's into slots."""
        if self._frozen is not None:
            self._frozen.drop_slots()
        self.cut(length, 1)

    @contextmanager
    def attached(self, *, one_token: bool = False) -> Iterator[None]:
        """Let the model use the caches in this context; it needs ``mask`` and ``input_pos``.

        ``one_token`` says that passes are of one token a row.
        """
        with ExitStack() as contexts:
            if one_token and self._has_run:
                if self._substitutes is None:
                    self._substitutes = substitutes(self._model, self._decoded)
                contexts.enter_context(substituted(self._substitutes))
            contexts.enter_context(attached(self._attentions, self._own))
            if self._frozen is not None:
                contexts.enter_context(self._frozen.attached())
            if self._decoded is not None:
                contexts.enter_context(decoding_once(self._decoded))
            yield
            self._has_run = True


def _may_keep_decoded(model: Decoder) -> bool:
    """Whether weights are decoded once for a text, which is reported.

    Decoding takes a CPU most of a token's time: SmolLM2-135M in NF4 generates twice as fast.
    """
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    decoded = [m for m in linears if not has_int8_kernel(getattr(m, "layout", None))]
    embedding = model.tok_embeddings.weight
    num_bytes = embedding.dtype.itemsize * sum(m.in_features * m.out_features for m in decoded)
    keeps: bool = embedding.device.type == "cpu" and 0 < num_bytes <= MOST_DECODED_BYTES
    if keeps:
        _report_decoded(num_bytes)
    return keeps


@lru_cache(maxsize=8)  # once a model, not once a text
def _report_decoded(num_bytes: int) -> None:
    log.info(f"decoded weights of {num_bytes / 2**30:.3f} GiB are kept while text is generated")


@contextmanager
def without_head(model: Decoder) -> Iterator[None]:
    """Let a decoder return the LM head's input ``[B, T, D]`` here: all logits would be large."""
    before = model.skip_output_layer
    model.skip_output_layer = True
    try:
        yield
    finally:
        model.skip_output_layer = before


def last_logits(
    model: Decoder, caches: ModelCaches, new_BN: torch.Tensor, is_real_BT: torch.Tensor
) -> torch.Tensor:
    """Run the last N of T tokens, and return the last one's logits ``[B, V]``, fp32.

    ``is_real_BT`` is false for padding. A logit that is not finite is a UserError.
    """
    is_step = new_BN.shape[1] == 1 < is_real_BT.shape[1]
    step = caches.step if is_step else None
    if step is None or not step.is_possible:
        logits_BV = _computed_logits(model, caches, new_BN, is_real_BT)
    elif caches.is_foreign:
        logits_BV = _step_or_trial(model, caches, step, new_BN, is_real_BT)
    else:
        logits_BV = step.logits(new_BN, is_real_BT)
    if step is not None and not step.is_possible:
        _NOT_RECORDED.add(model)
    check_finite(logits_BV, model, "logits")
    return logits_BV


def _step_or_trial(
    model: Decoder,
    caches: ModelCaches,
    step: CapturedStep,
    new_B1: torch.Tensor,
    is_real_BT: torch.Tensor,
) -> torch.Tensor:
    """Take a step; compare the first ones of each shape with plain ones, once a model.

    Of some hundred types in transformers not all take keys that are not there yet under a mask, and
    some compute with the number of tokens in Python, which a recording does not follow.
    """
    tried = _RECORDED.setdefault(model, set())
    if step.shape_of(is_real_BT) in tried:
        return step.logits(new_B1, is_real_BT)
    before, reason = is_real_BT.shape[1] - 1, ""
    expected = _computed_logits(model, caches, new_B1, is_real_BT)
    caches.cut(before, 1)
    try:
        found = step.logits(new_B1, is_real_BT)
        limit = _TOLERANCE.get(model.tok_embeddings.weight.dtype, _NARROW_TOLERANCE)
        if not (found - expected).abs().max() <= limit * expected.abs().max():
            reason = "a step of this model at a fixed place gives other logits"
    except Exception as error:  # a model's own code, of any kind
        reason = f"{type(error).__name__}: {first_line(error)}"
    if reason:
        step.refuse(reason)
        caches.drop_slots(before)  # it may have written over any token
        return _computed_logits(model, caches, new_B1, is_real_BT)
    if step.num_steps >= _STEPS_TRIED:
        tried.add(step.shape)
    return expected


def _computed_logits(
    model: Decoder, caches: ModelCaches, new_BN: torch.Tensor, is_real_BT: torch.Tensor
) -> torch.Tensor:
    num_new = new_BN.shape[1]
    takes_padding = getattr(model, "takes_padding", False)
    mask = is_real_BT if takes_padding else causal_mask(is_real_BT, num_new)
    return next_logits(model, caches, new_BN, mask, positions(is_real_BT, num_new))


def next_logits(
    model: Decoder,
    caches: ModelCaches,
    new_BN: torch.Tensor,
    mask: torch.Tensor,
    input_pos_BN: torch.Tensor,
) -> torch.Tensor:
    """Run new tokens behind those in the caches; fp32 logits ``[B, V]`` behind the last one."""
    with caches.attached(one_token=new_BN.shape[1] == 1), without_head(model):
        head_input_BND = model(new_BN, mask=mask, input_pos=input_pos_BN)
    # Not [:, -1:]: with its strides torch copies the head's whole weight on a CPU.
    logits_BV: torch.Tensor = model.output(head_input_BND[:, -1]).float()
    return logits_BV
