"""The loader of tuned models: from a config, or from a directory and its backbone.

A directory may be anyone's. Of what it names, only builders of ``qst_tune.models`` and torchtune's
families are called, and the checkpointers of :mod:`~qst_tune.results.recipe_config`; they only read
tensors and numbers.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from torchtune.modules.peft import disable_adapter

import qst_tune.models
from qst_tune.backbone.identity import BackboneId
from qst_tune.config.components import instantiate
from qst_tune.config.device import choose_device, choose_dtype
from qst_tune.config.model_directory import check_checkpoint_dir, fetch_models
from qst_tune.config.schema import RUN, Block, TunedModelConfig
from qst_tune.errors import UserError
from qst_tune.json_files import read_json
from qst_tune.models.build import build_any_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules.meta_device import materialize
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.modules.side.per_row import SideNetworks, share_backbone
from qst_tune.quantization.kernels import allow_triton
from qst_tune.results.description import (
    FORMATS,
    SIDE_NETWORK,
    ModelBlock,
    TunedFormat,
    read_description,
)
from qst_tune.results.recipe_config import checkpointer_of
from qst_tune.results.start import result_to_load
from qst_tune.results.tuned_directory import Tensors, Tuned, check_fits, load_tuned

TunableModel = QSTModel | PEQAModel
Use = Literal["text", "classes", "integers"]  # what the model must give


# Arguments of builders -> what config.json calls them.
_SIZES = {
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "vocab_size": "vocab_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_dim": "intermediate_size",
}
# A million positions take half a GiB of rotary angles.
_MOST = {"num_layers": 1024, "max_seq_len": 1 << 20}
_MOST_OF_OTHERS = 1 << 24
_MOST_ENTRIES = 1024  # of a list; OmegaConf takes half a minute for 100,000


@dataclass(frozen=True)
class TunedModel:
    """A model on its device, in evaluation mode, that can be used tuned or as it was.

    Args:
        model (Any): a ``QSTModel`` or ``PEQAModel``.
        backbone (BackboneId): what the model was loaded from.
        is_tuned (bool): whether there is anything tuned to use.
        tokenizer (Any): of a config's model for text: torchtune model tokenizer, cuts nothing.
        untuned_scales (Tensors): of a PEQA model, as rounding left them.
    """

    model: Any
    backbone: BackboneId
    is_tuned: bool
    tokenizer: Any = None
    untuned_scales: Tensors = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the tuned model is, for people."""
        if not isinstance(self.model, QSTModel):
            return "with the tuned scales"
        side = self.model.side
        parts = {"side network": side.layers, "LoRA": side.lora}
        return f"with the {' and '.join(name for name, part in parts.items() if part)}"

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Make the model the quantised base model for as long as the context lasts."""
        if isinstance(self.model, QSTModel):
            with disable_adapter(self.model):
                yield
            return
        tuned = {name: value.clone() for name, value in self.model.task().items()}
        self.model.load_task(self.untuned_scales)
        try:
            yield
        finally:
            self.model.load_task(tuned)


def load_tuned_model(cfg: TunedModelConfig, use: Use = "text") -> TunedModel:
    """Load a model for a use, with its side network or scales.

    ``side_network`` (QST) or ``scales`` (PEQA) names the directory of the result; null is the base
    model. Without the key, or if it names what the run started from, it is the result in
    ``output_dir``. UserError if the model is of another kind, or the result does not fit it.
    """
    check_checkpoint_dir(cfg.checkpointer)
    cfg = fetch_models(cfg)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.dtype, device)
    allow_triton(cfg.triton_kernels)
    model = build_any_on_meta(cfg.model, dtype)
    _check_kind(model, f"model: {cfg.model._component_}", use)
    key = "side_network" if isinstance(model, QSTModel) else "scales"
    for other in FORMATS.keys() - {key}:
        named = getattr(cfg, other)
        if named not in (None, RUN / other):
            raise UserError(f"{other}={named} does not go with this model: it takes {key}")
    tokenizer = None
    if use == "text":  # without a limit: what training cuts off is where the answer begins
        tokenizer = instantiate(_without_limit(cfg.tokenizer), "tokenizer")
    directory = result_to_load(getattr(cfg, key), cfg.output_dir, key)
    block = cfg.checkpointer
    return _fill(model, block, directory, dtype=dtype, device=device, tokenizer=tokenizer)


def load_directory(
    directory: Path,
    backbone_directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    use: Use = "text",
) -> TunedModel:
    """Load a side network and its backbone by the result's directory alone.

    UserError if one of the directories is not what it should be, or they do not belong together.
    """
    model = build_described(directory, dtype, backbone_directory, use)
    block = checkpointer_of(directory, backbone_directory)
    return _fill(model, block, directory, dtype=dtype, device=device)


def load_side_networks(
    model: QSTModel,
    directories: Mapping[str, Path],
    *,
    backbone: BackboneId,
    backbone_directory: Path | None = None,
) -> SideNetworks:
    """Load side networks by name and put them in the place of a model's own, ``model.side``.

    The backbone is left alone; ``side.use`` chooses a network. ``backbone_directory`` is the
    backbone's directory, where a side network's model is built from it; None: where it was at its
    training. UserError if a directory is no side network of this backbone, or they read different
    layers.
    """
    networks = {
        name: load_side_network(model, directory, backbone, backbone_directory)
        for name, directory in directories.items()
    }
    try:
        return share_backbone(model, networks)
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, directories.values()))}: {error}") from error


def load_side_network(
    model: QSTModel,
    directory: Path,
    backbone: BackboneId,
    backbone_directory: Path | None = None,
) -> SideNetwork:
    """Load a side network for a model's backbone, to be put in the place of the model's own."""
    weight: torch.Tensor = model.tok_embeddings.weight
    side = build_described(directory, weight.dtype, backbone_directory).side
    check_fits(directory, side)
    materialize(side, weight.device)
    load_tuned(directory, side, backbone=backbone)
    return side.requires_grad_(False).eval()


def build_described(
    directory: Path,
    dtype: torch.dtype,
    backbone_directory: Path | None = None,
    use: Use = "text",
) -> QSTModel:
    """Build a side network's model on meta; the backbone has ``dtype``.

    ``backbone_directory`` is the backbone's directory now, for a builder that reads it; None: where
    it was. UserError if the model is not one of ``qst_tune.models``, or not for this ``use``.
    """
    model = build_any_described(directory, SIDE_NETWORK, dtype, backbone_directory)
    _check_kind(model, str(directory), use)
    if not isinstance(model, QSTModel):
        raise UserError(f"{directory} is no side network: its model block builds another model")
    return model


def build_any_described(
    directory: Path, form: TunedFormat, dtype: torch.dtype, backbone_directory: Path | None = None
) -> TunableModel:
    """Build the model of a result on meta, of either format; see :func:`build_described`."""
    block = dict(read_description(directory, form).model)
    # A classifier names two builders: its own and its backbone's.
    names = [str(block.get("_component_", "")), str(block.get("backbone", ""))]
    for name in names if "." in names[1] else names[:1]:
        if not _is_known(name):
            raise UserError(
                f"{directory} names the model {name!r}; from a directory, which may be anyone's, "
                "only builders that qst_tune.models has are called: use a config with that model "
                "block, or if it is a qst_opt_*, which are gone, tune again with qst_from_hf"
            )
    _check_sizes(directory, block, backbone_directory)
    if names[0].endswith("_from_hf"):
        block.pop("backbone", None)  # until 0.1 a choice; BackboneId knows what it was
    if backbone_directory is not None and "checkpoint_dir" in block:  # of a builder *_from_hf
        block["checkpoint_dir"] = str(backbone_directory)
    for name, value in block.items():
        if "${" in str(value):
            raise UserError(
                f"{directory}: model.{name} is {value!r}, which this machine would fill in: "
                "write the value itself, or name the backbone's directory"
            )
    model: TunableModel = build_any_on_meta(OmegaConf.create(block), dtype)
    return model


def described_model(side_network: str, checkpoint_dir: str) -> QSTModel:
    """Build a side network's model from its directory alone, as a config's ``model``.

    ``checkpoint_dir`` is the backbone's directory. With :func:`described_checkpointer` and
    :func:`~qst_tune.results.recipe_config.described_tokenizer` a config (auto/qst_chat) runs a
    directory of someone else without any component of that directory's choice.
    """
    return build_described(Path(side_network), torch.get_default_dtype(), Path(checkpoint_dir))


def described_checkpointer(side_network: str, checkpoint_dir: str) -> Any:
    """Build the checkpointer that a side network's directory was made with, from the allow list."""
    block = checkpointer_of(Path(side_network), Path(checkpoint_dir))
    return instantiate(block, "checkpointer")


def tuned_part(model: TunableModel) -> Tuned:
    """Return what of a model a directory's tensors fill."""
    return model.side if isinstance(model, QSTModel) else model


def _fill(
    model: TunableModel,
    block: Block,
    directory: Path | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: object = None,
) -> TunedModel:
    """Fill a model that was built on meta: the backbone, and what was tuned if there is any."""
    if directory and isinstance(model, QSTModel):
        check_fits(directory, model.side)
    backbone = load_frozen_backbone(model, block, dtype=dtype, device=device)
    untuned: Tensors = {}
    if isinstance(model, QSTModel):
        materialize(model.side, device)
    else:
        untuned = {name: value.detach().clone() for name, value in model.task().items()}
    if directory:
        load_tuned(directory, tuned_part(model), backbone=backbone)
    return TunedModel(model.eval(), backbone, bool(directory), tokenizer, untuned)


def _check_sizes(directory: Path, block: ModelBlock, backbone_directory: Path | None) -> None:
    """Compare sizes with the backbone's ``config.json`` before anything of that size is built."""
    home = backbone_directory
    config = {} if home is None else read_json(home / "config.json", optional=True)
    for name, value in block.items():
        if isinstance(value, list) and len(value) > _MOST_ENTRIES:
            raise UserError(f"{directory}: model.{name} has {len(value)} entries: too many")
        if not isinstance(value, int) or "rope" in name:
            continue
        stored = config.get(_SIZES.get(name, ""))
        if isinstance(stored, int) and value != stored:
            raise UserError(
                f"{directory} is for a model whose {name} is {value}, {home} has {stored}"
            )
        most = _MOST.get(name, _MOST_OF_OTHERS)
        if name == "max_seq_len" and isinstance(config.get("max_position_embeddings"), int):
            most = max(most, config["max_position_embeddings"])
        if value > most:
            raise UserError(f"{directory}: model.{name} is {value}, and no model has above {most}")


def _is_known(name: str) -> bool:
    """Whether it is a public builder of ours, or of a family of torchtune."""
    home, _, leaf = name.rpartition(".")
    is_ours = home == "qst_tune.models" and leaf in qst_tune.models.__all__
    if is_ours or not re.fullmatch(r"torchtune\.models\.\w+", home):
        return is_ours
    try:
        return leaf in import_module(home).__all__
    except (ImportError, AttributeError):
        return False


def _check_kind(model: object, named: str, use: Use) -> None:
    is_classifier = isinstance(model, QSTClassifier)
    if use == "classes" and not is_classifier:
        raise UserError(f"{named} is no classifier; use qst_tune.models.qst_classifier")
    if use == "integers" and not isinstance(model, PEQAModel):
        raise UserError(f"{named} is no PEQA model; use one of qst_tune.models.peqa_*")
    if use == "text" and is_classifier:
        raise UserError(
            f"{named} is a classifier, which writes no text: use qst_classify, or "
            "QSTForSequenceClassification in Python"
        )
    if not isinstance(model, QSTModel | PEQAModel):
        raise UserError(
            f"{named} builds no model that writes text; use one of qst_tune.models.qst_* or peqa_*"
        )


def _without_limit(block: Block) -> Block:
    if "max_seq_len" not in block:
        return block
    unlimited = block.copy()
    unlimited.max_seq_len = None
    return unlimited
