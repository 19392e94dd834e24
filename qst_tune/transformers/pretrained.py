"""What all our transformers models share: a ``QSTModel`` of which the side network is saved."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from qst_tune.atomic_files import replace_files
from qst_tune.backbone.transformers_models import QSTTransformer
from qst_tune.errors import UserError
from qst_tune.modules.qst_model import QSTModel
from qst_tune.results.description import SIDE_NETWORK
from qst_tune.results.loading import load_directory
from qst_tune.results.peft_adapter import add_peft
from qst_tune.results.recipe_config import TunedTemplate, tuned_template
from qst_tune.results.tuned_directory import Provenance, tuned_files
from qst_tune.sharing.hub_directory import Publication, base_model_of, make_hub_directory
from qst_tune.sharing.push import push_directory
from qst_tune.transformers.config import (
    FETCHING,
    QSTConfig,
    backbone_directory,
    side_network_directory,
)
from qst_tune.transformers.over_model import load_over
from qst_tune.transformers.passes import num_cache_layers, num_side_layers

_SIDE = "model.side."
# Trainer resumes from a directory with this file; it names the tensors of side_network.safetensors.
_INDEX = "model.safetensors.index.json"
# What Trainer and other callers pass to any model; a side network is always written whole.
_SAVED_SO_ANYWAY = {"state_dict", "safe_serialization", "max_shard_size", "save_peft_format"}

# What transformers passes along and is so in any case: nothing is loaded but tensors, and
# torchtune's attention chooses its own kernel.
_SO_ANYWAY = {
    "adapter_kwargs", "attn_implementation", "code_revision", "low_cpu_mem_usage", "tqdm_class",
    "trust_remote_code", "use_safetensors",
}  # fmt: skip

# generate() hands its caller's tokenizer, for stop strings, to every model too. The rest
# gives some attention kernels what the positions of packed rows give.
_ADDRESSED_TO_OTHERS = (
    "return_dict",
    "seq_idx", "tokenizer", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
)  # fmt: skip


class QSTPreTrainedModel(PreTrainedModel):
    """A ``QSTModel`` as a model of transformers; its side network and LoRA train and are saved.

    ``config`` gets its sizes here; the loaded ``decoder`` is taken over, not copied; ``provenance``
    is what the saved directory says of the model.
    """

    config_class = QSTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # torchtune's attention calls it

    def __init__(self, config: QSTConfig, decoder: QSTModel, provenance: Provenance) -> None:
        config.vocab_size = decoder.tok_embeddings.num_embeddings
        config.hidden_size = decoder.backbone.width
        config.num_attention_heads = _num_heads(decoder)
        config.num_hidden_layers = num_cache_layers(decoder) + num_side_layers(decoder)
        if isinstance(decoder, QSTTransformer):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config, name, getattr(decoder.backbone.config, name, None))
        config.max_position_embeddings = decoder.max_seq_len
        super().__init__(config)
        self.model = decoder
        self.provenance = provenance
        # DistributedDataParallel would send the frozen weights around, which NF4 tensors cannot.
        self._ddp_params_and_buffers_to_ignore = [
            *(name for name, p in self.named_parameters() if not p.requires_grad),
            *(name for name, _ in self.named_buffers()),
        ]

    def _replicate_for_data_parallel(self) -> NoReturn:
        """Refuse nn.DataParallel: fused layers would compute with the first GPU's weights."""
        raise UserError(
            "a QST model does not run on several GPUs in one process (nn.DataParallel): start one "
            "process a GPU with torchrun, or show it one, CUDA_VISIBLE_DEVICES=0"
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # of the many arguments few have a meaning here
        cls,
        pretrained_model_name_or_path: str,
        *,
        config: QSTConfig | None = None,
        backbone: str | PreTrainedModel | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        allow_download: bool = False,
        **settings: Any,
    ) -> Any:
        """Load a side network, by its directory or name on the hub, with its backbone.

        ``backbone`` is the backbone's directory or name on the hub, in place of the one in the
        configuration, or the loaded model itself. ``dtype`` is of what is not quantised; None and
        "auto" are the configuration's, else bfloat16. ``device_map`` is one device for all, or
        "auto"; None is the CPU. A backbone that only the directory names is downloaded with
        ``allow_download`` alone. ``settings`` say how to fetch what is not here: ``token``,
        ``cache_dir``, ``revision`` of the side network and the like. UserError if an argument has
        no meaning for a side network, a directory is not to be had, or the two do not belong
        together.
        """
        strange = sorted(
            name
            for name, value in settings.items()
            if value and name not in FETCHING | _SO_ANYWAY and not name.startswith("_")
        )
        if strange:
            raise UserError(f"{strange[0]}={settings[strange[0]]} has no meaning for a QST model")
        fetching = {k: v for k, v in settings.items() if k in FETCHING and v is not None}
        directory = side_network_directory(str(pretrained_model_name_or_path), **fetching)
        config = config or QSTConfig.from_pretrained(directory)
        decoder: QSTModel
        generation: Any = None
        if isinstance(backbone, PreTrainedModel):
            decoder, provenance = load_over(directory, backbone)
            generation = copy.deepcopy(getattr(backbone, "generation_config", None))
        else:
            fetching.pop("revision", None)
            name, may = backbone or config.backbone, allow_download or backbone is not None
            home = backbone_directory(name, directory, allow_download=may, **fetching)
            decoder = load_directory(
                directory,
                home,
                dtype=_dtype(config.dtype if dtype in (None, "auto") else dtype),
                device=_device(device_map),
                use="text" if cls.can_generate() else "classes",
            ).model
            provenance = Provenance.of_directory(directory, backbone or config.backbone)
            if cls.can_generate():
                generation = _generation_config(home, tuned_template(directory, home))
        model = cls(config, decoder, provenance)
        model.generation_config = generation
        model.eval()  # type: ignore[no-untyped-call]  # as transformers decorates it
        return model

    def _check(self, length: int, unsupported: dict[str, Any]) -> None:
        """Refuse arguments that would be ignored, and rows that are too long."""
        for name, value in unsupported.items():
            if value is not None and value is not False and name not in _ADDRESSED_TO_OTHERS:
                raise ValueError(f"{name} is not supported by {type(self).__name__}")
        if length > self.model.max_seq_len:
            raise ValueError(
                f"{length} tokens are more than the model's max_seq_len {self.model.max_seq_len}"
            )

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's embedding."""
        embeddings: nn.Module = self.model.tok_embeddings
        return embeddings

    def save_pretrained(  # type: ignore[override]  # the directory is ours
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        **settings: object,
    ) -> None:
        """Write the side network, as the recipes do; other files of the directory stay.

        Of several processes only the main one writes. A setting that would change what is written
        is a UserError; :meth:`push_to_hub` uploads.
        """
        for name, value in settings.items():
            if value and name not in _SAVED_SO_ANYWAY:
                raise UserError(f"save_pretrained: {name}={value} is not supported by a QST model")
        if not is_main_process:
            return
        files = tuned_files(self.model.side, self.provenance)
        files = add_peft(files, self.model, self.provenance.base_model)
        names = dict.fromkeys(self.state_dict(), SIDE_NETWORK.weights_file)
        index = {"metadata": {}, "weight_map": names}
        files[_INDEX] = (json.dumps(index, indent=2) + "\n").encode()
        replace_files(Path(save_directory), files)

    def push_to_hub(  # type: ignore[override]  # the directory is ours, not transformers'
        self,
        repo_id: str,
        *,
        private: bool = False,
        base_model: str | None = None,
        license: str | None = None,
        data: str | None = None,
    ) -> str:
        """Upload the side network with a model card, without local paths; return its address.

        ``base_model`` is the backbone's name on the hub (None: where it came from), ``license``
        that of the side network in the hub's names, and ``data`` what it was trained on, for
        people. UserError if the backbone has no name on the hub, or the hub refuses.
        """
        with tempfile.TemporaryDirectory() as made:
            saved, shared = Path(made) / "saved", Path(made) / "shared"
            self.save_pretrained(saved)
            base_model = base_model or base_model_of(saved)
            make_hub_directory(saved, shared, Publication(repo_id, base_model, license, data))
            return push_directory(shared, repo_id, private=private)

    def state_dict(
        self, *, destination: object = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """Return the trainable tensors alone: the frozen ones are never saved."""
        return self.model.side.state_dict(
            destination=destination, prefix=prefix + _SIDE, keep_vars=keep_vars
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Fill the side network; ``strict`` or not, all of its tensors must be there, and no other.

        Their names are those of :meth:`state_dict` or of the saved file.
        """
        own = {name.removeprefix(_SIDE): value for name, value in state_dict.items()}
        return self.model.side.load_state_dict(own, assign=assign)

    def gradient_checkpointing_enable(self, *_: object, **__: object) -> None:
        """Recompute in backward the side network, and each layer with LoRA; others save nothing."""
        self.model.side.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        """Save the activations of the side network and of layers with LoRA."""
        self.model.side.recompute = False

    def print_trainable_parameters(self) -> None:
        """Print, as PEFT does, how many parameters train."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = num_weights(self)
        share = 100 * trainable / total
        text = (
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"
        )
        print(text)  # noqa: T201  # what the caller asked for


def num_weights(model: nn.Module) -> int:
    """Count a model's weights; those in codes as dense weights, tied ones once."""
    total = 0
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        coded: Any = module
        if hasattr(module, "in_features") and type(module) is not nn.Linear:
            own = [p for p in own if p is getattr(module, "bias", None)]
            total += coded.in_features * coded.out_features
        total += sum(p.numel() for p in own)
    return total


def _num_heads(decoder: Any) -> int:
    if isinstance(decoder, QSTTransformer):
        return int(getattr(decoder.backbone.config, "num_attention_heads", None) or 1)
    return int(decoder.num_heads)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None:
        return torch.bfloat16
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        known = "torch.bfloat16, torch.float16 or torch.float32"
        raise UserError(f"dtype={dtype} is not supported: use {known}")
    return dtype


def _device(device_map: dict[str, Any] | str | torch.device | None) -> torch.device:
    if isinstance(device_map, dict):
        devices = set(map(str, device_map.values()))
        if len(devices) != 1:
            raise UserError(f"device_map={device_map}: a QST model must be on one device")
        device_map = devices.pop()
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cpu" if device_map is None else device_map)


def _generation_config(backbone: Path, template: TunedTemplate | None) -> GenerationConfig:
    """The backbone's, with the tokens that end an answer of the run's chat template."""
    try:
        config = GenerationConfig.from_pretrained(backbone)
    except OSError:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(backbone))
    if template is not None:
        config.eos_token_id = template.stop_tokens
    return config
