"""Convert side networks from and to the authors' code (github.com/YouAreSpecialToMe/QST).

Examples::

    tune run qst_convert --config llama2/7B_qst from_authors=<THEIRS> side_network=<NEW DIR>
    tune run qst_convert --config llama2/7B_qst side_network=<OURS> to_authors=<NEW DIR>

The config is one of qst_finetune's: its model and checkpointer blocks name the backbone, and a
classifier's is for their classifiers. Their directories have no description: r, rank and number of
labels are found by the tensors. Both ways are exact; pickles are read as plain tensors only, and
nothing is replaced.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from qst_tune.config.check import check_checkpoint_dir, check_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.hub_models import fetch_models, with_hub_names
from qst_tune.config.keys import Key, pick
from qst_tune.errors import UserError
from qst_tune.models.load import identify_backbone
from qst_tune.results.authors.checkpoint import write_authors_directory
from qst_tune.results.authors.conversion import export_authors, import_authors
from qst_tune.results.tuned_directory import Provenance, save_tuned

KEYS = {
    **pick("model", "checkpointer"),
    "side_network": Key(kind=Path, meaning="a directory of ours: to read, or a new one to write"),
    "from_authors": Key(kind=Path, meaning="a directory of theirs to read"),
    "to_authors": Key(kind=Path, meaning="a new directory to write, for their code"),
}

log = utils.get_logger("INFO")


def import_directory(cfg: DictConfig, theirs: Path, ours: Path) -> None:
    """Make one of our directories out of one of theirs."""
    _check_new(ours, "side_network")
    fetch_models(cfg)
    check_checkpoint_dir(cfg.checkpointer)
    model, block = import_authors(theirs, cfg)
    plain = OmegaConf.to_container(OmegaConf.create({**cfg, "model": block}), resolve=True)
    save_tuned(
        ours,
        model.side,
        Provenance(
            backbone=identify_backbone(model, cfg),
            model_block=with_hub_names(block),
            recipe_config=OmegaConf.to_yaml(OmegaConf.create(with_hub_names(plain))),
        ),
    )
    found = ("variant", "reduction_factor", "rank", "num_labels")
    settings = " ".join(f"model.{name}={block[name]}" for name in found if name in block)
    log.info(f"{ours} written; to use it: side_network={ours} {settings}")


def export_directory(cfg: DictConfig, ours: Path, theirs: Path) -> None:
    """Make a directory that the authors' code loads out of one of ours."""
    _check_new(theirs, "to_authors")
    state, settings = export_authors(ours, cfg)
    write_authors_directory(theirs, state)
    said = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    log.info(f"{theirs} written; their configuration must say {said}")


def _check_new(directory: Path, key: str) -> None:
    if directory.exists():
        raise UserError(f"{key}={directory} exists already: name a new directory")


def main(cfg: DictConfig) -> None:
    """Run the recipe."""
    check_config(cfg, KEYS)
    source, target = cfg.get("from_authors"), cfg.get("to_authors")
    if not cfg.get("side_network") or bool(source) == bool(target):
        raise UserError(
            "name two directories: from_authors=<theirs> side_network=<new>, or "
            "side_network=<ours> to_authors=<new>"
        )
    if source:
        import_directory(cfg, Path(source), Path(cfg.side_network))
    else:
        export_directory(cfg, Path(cfg.side_network), Path(target))


if __name__ == "__main__":
    run_recipe(main, KEYS, __doc__)
