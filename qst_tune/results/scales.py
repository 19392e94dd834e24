"""A task of PEQA on disk: a tuned directory with nothing but the trained scales.

============================== ===================================================================
``scales.safetensors`` the scales, fp32 (and the zero points, if they were trained)
``peqa_config.json`` method, format, model block, the backbone's name and fingerprint
``recipe_config.yaml`` the config of the run that made it ``README.md`` a model card
============================== ===================================================================

It has no codes: whoever has the backbone's checkpoint gets the same ones by rounding it again.
"""

from pathlib import Path

from qst_tune import __version__
from qst_tune.backbone.identity import BackboneId
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.results.tuned_directory import Provenance, TunedFormat, load_tuned, tuned_files

SCALES = TunedFormat(
    method="peqa",
    title="set of PEQA scales",
    weights_file="scales.safetensors",
    config_file="peqa_config.json",
    origin="peqa_finetune wrote (<output_dir>/scales)",
)


def scales_files(model: PEQAModel, provenance: Provenance) -> dict[str, bytes]:
    """Return the directory's files by name."""
    backbone = provenance.backbone
    about = f"""\
Made with qst_tune {__version__} by PEQA (https://arxiv.org/abs/2305.14152). It is not a model by
itself: it replaces the scales of {backbone.name} after rounding to integers
({backbone.quantization}), whose weights have the fingerprint `{backbone.fingerprint[:16]}...`. The
codes are the same for every task. `tune run peqa_export --config <config> scales=<this directory>`
writes the tuned model for other programs."""
    return tuned_files(SCALES, model.task(), provenance, about=about)


def load_scales(directory: Path, model: PEQAModel, *, backbone: BackboneId) -> None:
    """Exchange a loaded model's scales for those of a directory; its codes stay.

    UserError, as :func:`load_tuned`, if they do not belong to ``backbone`` and this model.
    """
    model.load_task(load_tuned(SCALES, directory, model.task(), backbone=backbone))
