"""A side network and its backbone as a transformers model; it computes nothing of its own."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import (
    AutoConfig,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from qst_tune.backbone.qst_transformer import QSTTransformer
from qst_tune.errors import UserError
from qst_tune.generation.caches import attached, attentions, without_head
from qst_tune.modules.qst_model import QSTModel
from qst_tune.training.described_model import load_described
from qst_tune.transformers.config import FETCHING, QSTConfig, backbone_folder, side_network_folder
from qst_tune.transformers.masks import attention_mask_of, positions_of
from qst_tune.transformers.own_backbone import cached_length, num_cache_layers
from qst_tune.transformers.own_backbone import head_input as own_backbone_pass
from qst_tune.transformers.tuned_template import TunedTemplate, tuned_template

# What transformers passes along and is so in any case: nothing is loaded but tensors, and
# torchtune's attention chooses its own kernel.
_SO_ANYWAY = {
    "adapter_kwargs", "attn_implementation", "code_revision", "low_cpu_mem_usage", "tqdm_class",
    "trust_remote_code", "use_safetensors",
}  # fmt: skip


# generate() hands its caller's tokenizer, for stop strings, to every model too.
_ADDRESSED_TO_OTHERS = ("return_dict", "tokenizer")


class QSTForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of transformers around a ``QSTModel``.

    Caches are transformers' own: the attentions of the backbone are the first layers of a cache
    and those of the side network the rest, so that whatever reorders, crops or repeats a cache does
    so to both networks. ``DynamicCache`` (the default) and ``StaticCache`` work.

    The backbone is quantised and frozen; a ``loss`` trains the side network alone.

    Args:
        config (QSTConfig): its sizes are filled in here.
        decoder (QSTModel): loaded; taken over, not copied.
    """

    config_class = QSTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True  # torchtune's attention calls it

    def __init__(self, config: QSTConfig, decoder: QSTModel) -> None:
        config.vocab_size = decoder.tok_embeddings.num_embeddings
        config.hidden_size = decoder.backbone.width
        config.num_attention_heads = _num_heads(decoder)
        config.num_hidden_layers = len(attentions(decoder))
        if isinstance(decoder, QSTTransformer):
            config.num_hidden_layers += num_cache_layers(decoder)
        config.max_position_embeddings = decoder.max_seq_len
        super().__init__(config)
        self.model = decoder

    @classmethod
    def from_pretrained(  # type: ignore[override]  # of the many arguments few have a meaning here
        cls,
        pretrained_model_name_or_path: str,
        *,
        config: QSTConfig | None = None,
        backbone: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **settings: Any,
    ) -> "QSTForCausalLM":
        """Load a side network's folder with its backbone.

        Args:
            pretrained_model_name_or_path (str): folder of the side network, or its name on the hub.
            config (QSTConfig | None): the folder's by default.
            backbone (str | None): folder of the backbone, or its name on the hub, in place of the
                one in the configuration.
            dtype (torch.dtype | str | None): of what is not quantised, torch.float32 or
                torch.bfloat16. Default, and "auto": the configuration's, else bfloat16.
            device_map (Any): one device for all, or "auto". Default: the CPU.
            **settings (Any): how to fetch what is not here: ``token``, ``cache_dir``, ``revision``
                of the side network and the like.

        Returns:
            QSTForCausalLM: in evaluation mode.

        Raises:
            UserError: if an argument has no meaning for a side network, or the two folders are not
                to be had or do not belong together.
        """
        strange = sorted(
            name
            for name, value in settings.items()
            if value and name not in FETCHING | _SO_ANYWAY and not name.startswith("_")
        )
        if strange:
            raise UserError(f"{strange[0]}={settings[strange[0]]} has no meaning for a QST model")
        fetching = {k: v for k, v in settings.items() if k in FETCHING and v is not None}
        folder = side_network_folder(str(pretrained_model_name_or_path), **fetching)
        config = config or QSTConfig.from_pretrained(folder)
        fetching.pop("revision", None)
        home = backbone_folder(backbone or config.backbone, folder, **fetching)
        decoder, _ = load_described(
            folder,
            home,
            dtype=_dtype(config.dtype if dtype in (None, "auto") else dtype),
            device=_device(device_map),
        )
        model = cls(config, decoder)
        model.generation_config = _generation_config(home, tuned_template(folder, home))
        model.eval()  # type: ignore[no-untyped-call]  # as transformers decorates it
        return model

    def save_pretrained(self, *args: Any, **settings: Any) -> None:
        """Refuse: transformers would write the backbone too, quantised, under foreign names.

        Args:
            *args (Any): not looked at.
            **settings (Any): not looked at.

        Raises:
            UserError: always.
        """
        raise UserError(
            "a side network is shared as the folder it was loaded from; after training it here, "
            "write one with qst_tune.training.side_checkpoint.save_side_network"
        )

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the backbone's embedding."""
        embeddings: torch.nn.Module = self.model.tok_embeddings
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, as a causal language model of transformers.

        Args:
            input_ids (torch.Tensor): ``[B, T]``, the tokens behind those of the cache.
            attention_mask (torch.Tensor | None): ``[B, L]`` over cached and new tokens, 0 for
                padding, or ``[B, 1, T, L]`` booleans, True where a token may attend.
            position_ids (torch.Tensor | None): ``[B, T]``; default: counted without padding.
            past_key_values (Cache | None): extended in place.
            labels (torch.Tensor | None): ``[B, T]``, -100 for tokens without loss.
            use_cache (bool | None): make a cache if there is none.
            logits_to_keep (int | torch.Tensor): of the last so many tokens, or of these; 0: of all.
            num_items_in_batch (torch.Tensor | int | None): labels of all batches of a step, by
                which ``Trainer`` wants the sum of the losses divided; None: take the mean.
            **unsupported (Any): must be None or False, but for those that are not
                addressed to a model.

        Returns:
            CausalLMOutputWithPast: fp32 ``logits``; ``loss`` with labels, nats a token;
            ``past_key_values`` if there are any.

        Raises:
            ValueError: if an argument is not supported, or there are too many tokens.
        """
        self._check_arguments(unsupported)
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        start = self._cached_length(past_key_values)
        self._check_length(start + input_ids.shape[1])
        head_input = self._head_input(
            input_ids, attention_mask, position_ids, past_key_values, start=start
        )
        logits = self.model.output(_tokens_of(head_input, logits_to_keep)).float()
        return CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels, num_items_in_batch),
            logits=logits,
            past_key_values=past_key_values,
        )

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        loss: torch.Tensor = self.loss_function(
            logits, labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items
        )
        return loss

    def _head_input(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        *,
        start: int,
    ) -> torch.Tensor:
        """The input of the LM head, ``[B, T, D]``."""
        if isinstance(self.model, QSTTransformer):
            return own_backbone_pass(self.model, input_ids, attention_mask, position_ids, cache)
        length = start + input_ids.shape[1]
        mask: torch.Tensor | None = attention_mask_of(
            attention_mask, start=start, length=length, like=input_ids
        )
        if position_ids is None:
            position_ids = positions_of(attention_mask, start=start, length=length, like=input_ids)
        # Asked in this order: to look into a mask stops a GPU.
        if cache is None and (attention_mask is None or bool((attention_mask == 1).all())):
            mask = None  # torchtune's own causal attention is faster
        with self._caches(cache, length), without_head(self.model):
            head_input: torch.Tensor = self.model(input_ids, mask=mask, input_pos=position_ids)
        return head_input

    def _cached_length(self, cache: Cache | None) -> int:
        if isinstance(self.model, QSTTransformer):
            return cached_length(self.model, cache)
        return 0 if cache is None else int(cache.get_seq_length())

    def _caches(self, cache: Cache | None, length: int) -> AbstractContextManager[None]:
        if cache is None:
            return nullcontext()
        num_layers = len(attentions(self.model))
        layers = [_CacheLayer(cache, index, length) for index in range(num_layers)]
        return attached(self.model, layers)

    def _check_arguments(self, unsupported: dict[str, Any]) -> None:
        for name, value in unsupported.items():
            if value is not None and value is not False and name not in _ADDRESSED_TO_OTHERS:
                raise ValueError(f"{name} is not supported by {type(self).__name__}")

    def _check_length(self, length: int) -> None:
        if length > self.model.max_seq_len:
            raise ValueError(
                f"{length} tokens are more than the model's max_seq_len {self.model.max_seq_len}"
            )


def _num_heads(decoder: Any) -> int:
    if isinstance(decoder, QSTTransformer):
        return int(getattr(decoder.backbone.config, "num_attention_heads", None) or 1)
    return int(decoder.num_heads)


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


class _CacheLayer:
    """One layer of a transformers cache, where torchtune's attention looks for its own."""

    def __init__(self, cache: Cache, index: int, length: int) -> None:
        self._cache, self._index, self._length = cache, index, length

    def update(self, k_val: torch.Tensor, v_val: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._cache.update(k_val, v_val, self._index)
        # A static cache also shows what is not filled yet.
        return keys[:, :, : self._length], values[:, :, : self._length]


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None:
        return torch.bfloat16
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        known = "torch.bfloat16, torch.float16 or torch.float32"
        raise UserError(f"dtype={dtype} is not supported: use {known}")
    return dtype


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict):
        devices = set(map(str, device_map.values()))
        if len(devices) != 1:
            raise UserError(f"device_map={device_map}: a QST model lies on one device")
        device_map = devices.pop()
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cpu" if device_map is None else device_map)


def _generation_config(backbone: Any, template: TunedTemplate | None) -> GenerationConfig:
    """The backbone's, with the tokens that end an answer of the run's chat template."""
    try:
        config = GenerationConfig.from_pretrained(backbone)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(backbone))
    if template is not None:
        config.eos_token_id = template.stop_tokens
    return config
