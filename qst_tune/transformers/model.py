"""A side network and its backbone as a model of transformers; it computes nothing of its own."""

import copy
from typing import Any

import torch
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from qst_tune.errors import UserError
from qst_tune.modules.backbone_formats import BaseQuantization
from qst_tune.modules.loss import linear_cross_entropy
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.scaled_head import ScaledHead
from qst_tune.modules.side.config import SideConfig
from qst_tune.results.tuned_directory import Provenance
from qst_tune.transformers.config import QSTConfig
from qst_tune.transformers.over_model import side_over
from qst_tune.transformers.passes import cached_length, head_input, packed_mask
from qst_tune.transformers.pretrained import QSTPreTrainedModel


class QSTForCausalLM(QSTPreTrainedModel, GenerationMixin):
    """A causal language model of transformers around a ``QSTModel``.

    Caches are transformers' own: the attentions of the backbone are the first layers of a cache
    and those of the side network the rest, so that whatever reorders, crops or repeats a cache does
    so to both networks. ``DynamicCache`` (the default) and ``StaticCache`` work.

    With labels the loss comes from the LM head's input, a chunk of tokens at a time. In training
    the output then has no logits, unless ``skip_logits=False`` asks for them.
    """

    def __init__(self, config: QSTConfig, decoder: QSTModel, provenance: Provenance) -> None:
        head = decoder.output
        if isinstance(head, ScaledHead):  # TRL multiplies with the head's weight itself
            config.final_logit_softcapping, config.logit_scale = head.cap, head.scale
        super().__init__(config, decoder, provenance)

    @property
    def base_model(self) -> Any:
        """From tokens to the LM head's input, as TRL's fused loss calls it."""
        return self.states

    def get_output_embeddings(self) -> Any:
        """Return the linear layer of the LM head."""
        head = self.model.output
        return head.linear if isinstance(head, ScaledHead) else head

    def forward(  # noqa: PLR0913  # the arguments of a causal language model of transformers
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        **unsupported: object,
    ) -> CausalLMOutputWithPast:
        """Compute fp32 logits, or a loss in nats a token, as a model of transformers.

        ``input_ids``, ``[B, T]``, are the tokens after the cached ones. ``attention_mask`` is ``[B,
        L]`` over cached and new tokens, 0 for padding, or ``[B, 1, T, L]`` booleans, True where a
        token may attend. In rows without a mask, packed samples begin where ``position_ids`` begin
        again. ``labels`` are -100 for tokens without loss; ``Trainer`` wants the sum of the losses
        divided by ``num_items_in_batch``, otherwise it is their mean. ``logits_to_keep`` are of the
        last so many tokens, or of these; 0: of all. ``skip_logits=None`` leaves them out in
        training, where there are labels. ValueError if another argument asks for anything that is
        not supported, or there are too many tokens.
        """
        output = self.states(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, **unsupported
        )
        y_BTD: Any = output.last_hidden_state
        loss, logits = None, None
        if labels is not None:
            loss = self._loss(y_BTD, labels, num_items_in_batch)
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if not skip_logits:
            logits = self.model.output(_tokens_of(y_BTD, logits_to_keep)).float()
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values
        )

    def states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **unsupported: object,
    ) -> BaseModelOutputWithPast:
        """Compute the input of the LM head; arguments as :meth:`forward`."""
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        length = cached_length(self.model, past_key_values) + input_ids.shape[1]
        self._check(length, unsupported)
        if attention_mask is None and position_ids is not None and past_key_values is None:
            attention_mask = packed_mask(position_ids)
        y_BTD = head_input(self.model, input_ids, attention_mask, position_ids, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=y_BTD, past_key_values=past_key_values)

    def _loss(
        self, y_BTD: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Cross entropy of the next tokens, without all logits at once."""
        shifted = labels[:, 1:].to(y_BTD.device)
        kept = shifted.flatten() != CROSS_ENTROPY_IGNORE_IDX
        hidden, rows = y_BTD[:, :-1].flatten(0, 1), kept.nonzero()[:, 0]
        losses = linear_cross_entropy(hidden, shifted.flatten(), self.model.output, rows=rows)
        count = kept.sum().clamp(min=1) if num_items is None else num_items
        return losses.sum() / torch.as_tensor(count, device=losses.device)


def _tokens_of(head_input_BTD: torch.Tensor, wanted: int | torch.Tensor) -> torch.Tensor:
    """The last so many tokens, or these; 0: all.

    As a copy, not as a view: through a view of the last of 128 tokens, 8 rows of a head of 49,152 x
    576 take 1.0 s instead of 11 ms on one core, since torch copies the weight for each row.
    """
    if isinstance(wanted, int):
        if wanted == 0:
            return head_input_BTD
        wanted = torch.arange(head_input_BTD.shape[1], device=head_input_BTD.device)[-wanted:]
    return head_input_BTD[:, wanted]


class QSTForSequenceClassification(QSTPreTrainedModel):
    """A classifier of transformers around a ``QSTClassifier``."""

    def __init__(self, config: QSTConfig, decoder: QSTModel, provenance: Provenance) -> None:
        super().__init__(config, decoder, provenance)
        config.num_labels = len(decoder.side.get_parameter("score.weight"))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **unsupported: object,
    ) -> SequenceClassifierOutputWithPast:
        """Compute the fp32 logits ``[B, C]`` of whole sequences ``[B, T]``, and a loss with labels.

        Without a mask, the configuration's padding token is padding. ``labels`` ``[B]`` are classes
        or scores. ValueError if an argument is not supported, or there are too many tokens.
        """
        self._check(input_ids.shape[1], unsupported)
        pad = getattr(self.config, "pad_token_id", None)
        if attention_mask is None and pad is not None:
            attention_mask = (input_ids != pad).long()
        padding = None if attention_mask is None else attention_mask.bool()
        logits = self.model(input_ids, padding_mask=padding)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits)


def get_qst_model(
    model: PreTrainedModel,
    config: SideConfig | None = None,
    *,
    quantize: BaseQuantization = "none",
) -> QSTForCausalLM | QSTForSequenceClassification:
    """Put a side network over a model of transformers; only that trains.

    ``model`` is a loaded causal language model or sequence classifier, dense or quantised by
    another program; it is taken over and frozen. A classifier's own head joins the side network and
    trains. ``quantize`` ("nf4", "fp4", "int4", "int8") rounds the linears of a dense model's layers
    in place, one after the other. Returns a ``QSTForCausalLM`` or ``QSTForSequenceClassification``
    with the logits of the model, for ``Trainer``, ``SFTTrainer`` or a loop. UserError if the model
    is not supported, or a setting does not fit it.
    """
    if not isinstance(model, PreTrainedModel) or isinstance(model, QSTPreTrainedModel):
        raise UserError(
            f"get_qst_model takes a model of transformers, as AutoModelForCausalLM loads it, not "
            f"{type(model).__name__}"
        )
    decoder, provenance = side_over(model, config or SideConfig(), quantize)
    known = QSTConfig(backbone=provenance.backbone_path)
    known.name_or_path = model.name_or_path
    tuned: QSTForCausalLM | QSTForSequenceClassification
    if isinstance(decoder, QSTClassifier):
        known.id2label = model.config.id2label
        known.problem_type = model.config.problem_type
        tuned = QSTForSequenceClassification(known, decoder, provenance)
    else:
        tuned = QSTForCausalLM(known, decoder, provenance)
        tuned.generation_config = copy.deepcopy(model.generation_config)
    tuned.eval()  # type: ignore[no-untyped-call]  # as transformers decorates it
    return tuned
