"""What a result's directory says of the run that made it."""

from pathlib import Path

from omegaconf import OmegaConf

from qst_tune.backbone.hub import hub_name
from qst_tune.backbone.identity import BackboneId
from qst_tune.config.file import PlainConfig, variables_in
from qst_tune.config.model_directory import with_hub_names
from qst_tune.config.record import recorded
from qst_tune.config.schema import TRAINING_KEYS, TrainingConfig
from qst_tune.results.description import Ancestor
from qst_tune.results.tuned_directory import Provenance


def provenance_of(
    cfg: TrainingConfig, backbone: BackboneId, lineage: tuple[Ancestor, ...] = ()
) -> Provenance:
    """Return what the directory of a run's result says of the run, without its results."""
    plain = with_hub_names(recorded(cfg.raw))
    still_used = variables_in(OmegaConf.create(plain))
    for name in variables_in(cfg.raw) - set(TRAINING_KEYS) - still_used:
        plain.pop(name, None)  # nothing refers to it any more: it would be an unknown key
    _take_in_template(plain.get("tokenizer") or {})
    return Provenance(
        backbone,
        dict(plain["model"]),
        OmegaConf.to_yaml(OmegaConf.create(plain)),
        lineage=lineage,
        backbone_path=_home_of(cfg.checkpointer.checkpoint_dir),
    )


def _take_in_template(tokenizer: PlainConfig) -> None:
    """Put the text of a chat template's file in the place of its path, which is of this machine."""
    template = tokenizer.get("chat_template")
    if isinstance(template, str) and "{" not in template and Path(template).suffix:
        file = Path(template).expanduser()
        if file.is_file():
            tokenizer["chat_template"] = file.read_text(encoding="utf-8")


def _home_of(checkpoint_dir: str) -> str:
    """Where another program finds the backbone: a name on the hub, or an absolute path."""
    return hub_name(checkpoint_dir) or str(Path(checkpoint_dir).resolve())
