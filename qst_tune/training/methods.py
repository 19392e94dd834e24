"""What the training loop needs of a method; QST and PEQA as such methods."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torchtune import utils

from qst_tune.backbone.experts import compile_forward
from qst_tune.backbone.identity import BackboneId
from qst_tune.config.schema import TrainingConfig
from qst_tune.distributed.processes import broadcast_tensors, is_main_process
from qst_tune.distributed.sharding import choose_sharding
from qst_tune.errors import UserError
from qst_tune.models.build import build_any_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.modules.captured_passes import CapturedPasses
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.shared_pass import frozen_part
from qst_tune.modules.side.gate import Gate
from qst_tune.modules.side.network import SideNetwork
from qst_tune.modules.side.output_mix import AlphaMix, SigmoidMix
from qst_tune.results.peft_adapter import add_peft
from qst_tune.results.provenance import provenance_of
from qst_tune.results.start import find_start
from qst_tune.results.tuned_directory import Provenance, load_tuned, tuned_files

QST_REFUSED = {
    "scales": "is what PEQA starts from; use side_network",
    "enable_activation_offloading": "has nothing to offload: QST saves the activations of what "
    "trains alone, which enable_activation_checkpointing recomputes; set it to False",
}
_UNDECAYED_TYPES = (Gate, AlphaMix, SigmoidMix)
# The rate of a classifier's head is the optimizer's times this over the head's width D.
_SCORE_WIDTH = 64
_LORA_RATE = 1 / 3  # of LoRA beside a side network
_RATE_FACTOR = "rate_factor"

ParameterGroups = list[dict[str, Any]]
log = utils.get_logger("INFO")


class Method(Protocol):
    """A model on its device, with its weights loaded, and its trainable parameters."""

    @property
    def model(self) -> nn.Module:
        """Takes a batch's ``tokens`` ``[B, T]`` and, where the batch has them, further inputs."""

    @property
    def result_name(self) -> str:
        """Name of the directory in ``output_dir`` that the result is written to."""

    def parameter_groups(self) -> ParameterGroups:
        """Return the optimizer's groups, which contain exactly the trainable parameters."""

    def files(self, results: dict[str, float]) -> dict[str, bytes]:
        """Return everything that training has changed as files by name, no pickle.

        ``results`` are figures for the model card.
        """

    def with_other_formats(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Add to a result's :meth:`files` what other programs read."""

    def load(self, directory: Path) -> None:
        """Load a directory of :meth:`files`, bit for bit; UserError if it does not fit."""

    def statistics(self) -> dict[str, float]:
        """Return what the method would like logged besides the loss; may be empty."""


@dataclass(frozen=True)
class TunedMethod:
    """A frozen backbone with a side network that trains, or integers of which the scales train.

    ``provenance`` is what the result's directory says of the run, except for its figures.
    """

    model: QSTModel | PEQAModel
    provenance: Provenance

    @property
    def tuned(self) -> SideNetwork | PEQAModel:
        """What training changes, as a result's directory has it."""
        return self.model.side if isinstance(self.model, QSTModel) else self.model

    @property
    def result_name(self) -> str:
        """The key of a config that starts from such a result."""
        return "side_network" if isinstance(self.model, QSTModel) else "scales"

    def parameter_groups(self) -> ParameterGroups:
        """Return the parameters of the side network in its groups, or all scales in one."""
        if isinstance(self.tuned, SideNetwork):
            return parameter_groups(self.tuned)
        return [{"params": list(self.tuned.task().values())}]

    def files(self, results: dict[str, float]) -> dict[str, bytes]:
        """Return the result as files by name; ``results`` are figures for the model card."""
        return tuned_files(self.tuned, replace(self.provenance, results=results))

    def with_other_formats(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Add PEFT's adapter, where the result is LoRA alone."""
        if isinstance(self.model, QSTModel):
            return add_peft(files, self.model, self.provenance.base_model)
        return dict(files)

    def load(self, directory: Path) -> None:
        """Exchange what is trained for that of a directory; UserError if it does not fit."""
        load_tuned(directory, self.tuned, backbone=self.provenance.backbone)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Return how far the gates are open and how much of the output is the side network's.

        Nothing for scales: those of different layers have no common size to log.
        """
        side = self.tuned
        if not isinstance(side, SideNetwork):
            return {}
        figures: dict[str, torch.Tensor] = {}
        if side.lora is not None:
            b = [p.flatten() for name, p in side.lora.named_parameters() if name.endswith(".b")]
            figures["lora_b_rms"] = torch.cat(b).square().mean().sqrt()
        if side.layers:
            figures |= _side_statistics(side)
        # Together: each figure by itself would wait for the device.
        values = torch.stack(list(figures.values())).tolist() if figures else []
        return dict(zip(figures, values, strict=True))


def _side_statistics(side: SideNetwork) -> dict[str, torch.Tensor]:
    betas = torch.cat([torch.sigmoid(p).flatten() for p in side.gates.parameters()])
    figures = {
        "gate_mean": betas.mean(),
        "gate_min": betas.min(),
        "gate_max": betas.max(),
        "upsample_rms": side.upsample.get_parameter("weight").square().mean().sqrt(),
    }
    if isinstance(side.output_mix, AlphaMix):
        figures["mix_mean"] = side.output_mix.alpha.mean()
    elif isinstance(side.output_mix, SigmoidMix):
        figures["mix_mean"] = torch.sigmoid(side.output_mix.logit).mean()
    return figures


def load_qst(
    model: QSTModel, cfg: TrainingConfig, *, dtype: torch.dtype, device: torch.device
) -> TunedMethod:
    """Fill a model that was built on meta: the backbone from its checkpoint; a new side network.

    The side network starts from what ``side_network`` names, if the config has it. ``compile`` and
    ``enable_activation_checkpointing`` decide as in torchtune. UserError if the checkpoint is
    missing, damaged or not of this architecture, or what the run starts from does not fit.
    """
    backbone = fill_backbone(model, cfg, dtype, device)
    method = fill_side(model, cfg, backbone, device)
    prepare_frozen(model, cfg, [model.side], backbone, dtype, device)
    if cfg.capture_steps and device.type == "cuda" and cfg.backbone_sharding is None:
        model.captured_passes = CapturedPasses()
    return method


def fill_side(
    model: QSTModel, cfg: TrainingConfig, backbone: BackboneId, device: torch.device
) -> TunedMethod:
    """Fill a model's side network on meta, from what ``side_network`` names, or as a new one."""
    model.initialize_side(device)
    start = find_start(cfg)
    if start is not None:
        load_tuned(start.directory, model.side, backbone=backbone)
    broadcast_tensors(model.side)
    model.side.recompute = cfg.enable_activation_checkpointing
    return TunedMethod(model, provenance_of(cfg, backbone, start.lineage if start else ()))


def prepare_frozen(
    model: QSTModel,
    cfg: TrainingConfig,
    sides: Sequence[SideNetwork],
    backbone: BackboneId,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Install the cache of hidden states and compile, as the config says, for side networks."""
    if cfg.hidden_state_cache:
        model.hidden_state_cache = _hidden_state_cache(
            cfg.hidden_state_cache, model, sides, backbone, dtype, device
        )
    if cfg.compile:
        _compile(model, sides)


def _compile(model: QSTModel, sides: Sequence[SideNetwork]) -> None:
    """Compile side blocks and layers, except those with LoRA, which get other hooks each pass."""
    layers: Any = model.layers
    first = min(len(layers) if side.lora is None else side.lora.first for side in sides)
    frozen = list(layers[:first])
    compile_forward([*frozen, *(block for side in sides for block in side.blocks)])
    if len(frozen) < len(layers) and is_main_process():
        log.info(
            f"compile=True: {len(frozen)} of {len(layers)} layers are compiled; the last "
            f"{len(layers) - len(frozen)}, with LoRA, are not"
        )


def fill_backbone(
    model: QSTModel | PEQAModel, cfg: TrainingConfig, dtype: torch.dtype, device: torch.device
) -> BackboneId:
    """Fill the backbone, or this process's part of it."""
    sharding = choose_sharding(cfg.backbone_sharding, device, offload=cfg.fsdp_cpu_offload)
    twin = None if sharding is None else build_any_on_meta(cfg.model, dtype)
    return load_frozen_backbone(
        model, cfg.checkpointer, dtype=dtype, device=device, sharding=sharding, twin=twin
    )


def _hidden_state_cache(
    parent: Path,
    model: QSTModel,
    sides: Sequence[SideNetwork],
    backbone: BackboneId,
    dtype: torch.dtype,
    device: torch.device,
) -> HiddenStateCache:
    """The cache for this backbone, its dtype, this kind of device and the layers that are read."""
    layers = sorted({layer for side in sides for layer in side.layers})
    described: list[object] = [asdict(backbone), str(dtype), device.type, layers]
    taps, _ = frozen_part(sides)
    num_states = 1 + sum(tap > 0 for tap in taps)
    firsts = sorted({model.backbone.num_layers if s.lora is None else s.lora.first for s in sides})
    if any(side.lora is not None for side in sides):
        _check_cache_below_lora(parent, model, sides, last_state=firsts[-1])
        described.extend(firsts)
    key = hashlib.sha256(repr(tuple(described)).encode()).hexdigest()[:16]
    name = backbone.name.replace("/", "--")
    directory = parent / f"{name}-{key}"
    if is_main_process():
        size = num_states * model.backbone.width * dtype.itemsize
        log.info(f"hidden states are cached in {directory}: {size / 1000:.1f} kB a token")
    return HiddenStateCache(directory)


def _check_cache_below_lora(
    parent: Path, model: QSTModel, sides: Sequence[SideNetwork], *, last_state: int
) -> None:
    """Refuse a cache where no layer stays as it is, or where the model cannot run in two parts."""
    if not last_state:
        raise UserError(
            f"hidden_state_cache={parent} has nothing to keep: lora_layers="
            f"{sides[0].config.lora_layers} are all layers; set it to null, or train fewer"
        )
    if not model.backbone.can_split:
        raise UserError(
            f"hidden_state_cache={parent} does not go with lora_layers over this model, whose "
            "layers share more than their states; set one of them to null"
        )


def load_peqa(
    model: PEQAModel, cfg: TrainingConfig, *, dtype: torch.dtype, device: torch.device
) -> TunedMethod:
    """Fill a model that was built on meta from its checkpoint, rounding weight by weight.

    The scales start from those of the config's directory ``scales``, if it has one. ``compile`` and
    ``enable_activation_checkpointing`` decide as in torchtune. UserError if the checkpoint is
    missing, damaged or not of this architecture, or what the run starts from does not fit.
    """
    backbone = fill_backbone(model, cfg, dtype, device)
    start = find_start(cfg)
    if start is not None:
        load_tuned(start.directory, model, backbone=backbone)
    if cfg.compile:
        compile_forward(model.layers)
    if cfg.enable_activation_checkpointing:
        model.recompute_layers()
    return TunedMethod(model, provenance_of(cfg, backbone, start.lineage if start else ()))


def parameter_groups(side: nn.Module) -> ParameterGroups:
    """Split the trainable parameters for the optimizer: matrices decay, everything else does not.

    A classifier's head, ``side.score``, learns at ``64 / D`` of the rate. A step of Adam moves each
    of its D weights by the rate, so a logit by the rate times the sum of the state's magnitudes,
    which grows with D: at the rate of the rest one step moved SmolLM2's logits by 1.6, and
    classifiers learnt less (docs/results.md). Rates that fall with the width are those of
    https://arxiv.org/abs/2203.03466. LoRA beside a side network learns at a third of the rate, and
    alone at the rate: the ratio of their best rates (docs/record.md, "The depth dial").

    Call :func:`scale_rates` once the optimizer is built.

    Weight decay pulls towards zero. For a gate, a mix or a norm that is not "small" but another
    function (beta 0.5, a norm that outputs nothing), so they are exempt, and biases with them; the
    authors' code decays them all.
    """
    score, lora = getattr(side, "score", None), getattr(side, "lora", None)
    head = [] if score is None else list(score.parameters())
    low_rank = [] if lora is None else list(lora.parameters())
    undecayed = {
        id(parameter)
        for module in side.modules()
        for parameter in module.parameters(recurse=False)
        if isinstance(module, _UNDECAYED_TYPES) or parameter.ndim < 2
    }
    others = {id(parameter) for parameter in [*head, *low_rank]}
    trainable = [p for p in side.parameters() if p.requires_grad and id(p) not in others]
    groups: ParameterGroups = [
        {"params": [p for p in trainable if id(p) not in undecayed]},
        {"params": [p for p in trainable if id(p) in undecayed], "weight_decay": 0.0},
        {"params": low_rank, _RATE_FACTOR: _LORA_RATE if trainable else 1.0},
    ]
    if head:
        groups.append({"params": head, _RATE_FACTOR: _SCORE_WIDTH / head[0].shape[-1]})
    return [group for group in groups if group["params"]]


def scale_rates(optimizer: Optimizer) -> None:
    """Give groups with a rate of their own that rate, before a schedule takes the rates."""
    for group in optimizer.param_groups:
        # Not in place: some optimizers share one tensor among the groups.
        group["lr"] = group["lr"] * group.pop(_RATE_FACTOR, 1.0)
