"""Convert side networks from and to the authors' code (github.com/YouAreSpecialToMe/QST).

Examples::

    tune run qst_convert --config llama2/7B_qst from_authors=<THEIRS> side_network=<NEW DIR>
    tune run qst_convert --config llama2/7B_qst side_network=<OURS> to_authors=<NEW DIR>

The config is one of qst_finetune's: its model and checkpointer blocks name the backbone, and a
classifier's is for their classifiers. Their directories have no description: r, rank and number of
labels are found by the tensors. Both ways are exact; pickles are read as plain tensors only, and
nothing is replaced.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.keys import RecipeConfig, key
from qst_tune.config.model_directory import check_checkpoint_dir, fetch_models, with_hub_names
from qst_tune.config.record import recorded
from qst_tune.config.schema import Block, training_key
from qst_tune.errors import UserError
from qst_tune.models.load import identify_backbone
from qst_tune.results.authors.checkpoint import write_authors_directory
from qst_tune.results.authors.conversion import export_authors, import_authors
from qst_tune.results.tuned_directory import Provenance, save_tuned


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(RecipeConfig):
    """The keys of this recipe."""

    model: Block = training_key("model")
    checkpointer: Block = training_key("checkpointer")
    side_network: Path | None = key(
        "a directory of ours: to read, or a new one to write", default=None
    )
    from_authors: Path | None = key("a directory of theirs to read", default=None)
    to_authors: Path | None = key("a new directory to write, for their code", default=None)


log = utils.get_logger("INFO")


def import_directory(cfg: ConvertConfig, theirs: Path, ours: Path) -> None:
    """Make one of our directories out of one of theirs."""
    _check_new(ours, "side_network")
    cfg = fetch_models(cfg)
    check_checkpoint_dir(cfg.checkpointer)
    model, block = import_authors(theirs, cfg.model)
    plain = recorded(OmegaConf.create({**cfg.raw, "model": block}))
    save_tuned(
        ours,
        model.side,
        Provenance(
            backbone=identify_backbone(model, cfg.checkpointer),
            model_block=with_hub_names(block),
            recipe_config=OmegaConf.to_yaml(OmegaConf.create(with_hub_names(plain))),
        ),
    )
    found = ("variant", "reduction_factor", "rank", "num_labels")
    settings = " ".join(f"model.{name}={block[name]}" for name in found if name in block)
    log.info(f"{ours} written; to use it: side_network={ours} {settings}")


def export_directory(cfg: ConvertConfig, ours: Path, theirs: Path) -> None:
    """Make a directory that the authors' code loads out of one of ours."""
    _check_new(theirs, "to_authors")
    state, settings = export_authors(ours, cfg.model)
    write_authors_directory(theirs, state)
    said = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    log.info(f"{theirs} written; their configuration must say {said}")


def _check_new(directory: Path, key: str) -> None:
    if directory.exists():
        raise UserError(f"{key}={directory} exists already: name a new directory")


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = read_config(raw, ConvertConfig)
    ours, source, target = cfg.side_network, cfg.from_authors, cfg.to_authors
    if ours is None or (source is None) == (target is None):
        raise UserError(
            "name two directories: from_authors=<theirs> side_network=<new>, or "
            "side_network=<ours> to_authors=<new>"
        )
    if source is not None:
        import_directory(cfg, source, ours)
    elif target is not None:
        export_directory(cfg, ours, target)


if __name__ == "__main__":
    run_recipe(main, ConvertConfig, __doc__)
