"""Build the trials of a run: a side network, an optimizer and a loop each, one backbone."""

from collections.abc import Sequence
from functools import partial

from qst_tune.config.trials import Settings, title
from qst_tune.data.batches.read_once import ReadOnce
from qst_tune.data.batches.training_data import TrainingData
from qst_tune.errors import UserError
from qst_tune.models.build import build_on_meta
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.training.methods import fill_side, load_backbone, prepare_frozen
from qst_tune.training.preference import reference_of
from qst_tune.training.resume import set_run_seed
from qst_tune.training.run import Run, build_trainer
from qst_tune.training.task import Task, on_device
from qst_tune.training.trials import Trial, use_side


def build_trials(
    run: Run,
    settings: Sequence[Settings],
    model: QSTModel,
    task: Task,
    data: TrainingData,
    *,
    is_preference: bool = False,
) -> list[Trial]:
    """Load the backbone into a model on meta, and build the trials ``run.trials`` over it.

    Each has the side network that it has alone and, with ``is_preference``, what that is compared
    with. UserError as for one run.
    """
    dtype, device = run.dtype, run.device
    sides = [  # what fits no backbone fails before one is loaded
        _side_on_meta(number, own, one)
        for number, (own, one) in enumerate(zip(settings, run.trials, strict=True), start=1)
    ]
    backbone = load_backbone(model, run.cfg, dtype, device)
    move = partial(on_device, device=device)
    read_once = ReadOnce(data.train, move), data.validation and ReadOnce(data.validation, move)
    trials = []
    for number, (own, one, side) in enumerate(
        zip(settings, run.trials, sides, strict=True), start=1
    ):
        use_side(model, side)
        set_run_seed(one.cfg, one.saved)
        method = fill_side(model, one.cfg, backbone, device)
        if is_preference and reference_of(one.cfg) == "start":
            model.keep_reference()
        trainer = build_trainer(one, method, task, data)
        trainer.train_data, trainer.validation_data = read_once
        trials.append(Trial(number, own, trainer, side, model.reference_side))
    prepare_frozen(model, run.cfg, [trial.side for trial in trials], backbone, dtype, device)
    return trials


def _side_on_meta(number: int, settings: Settings, run: Run) -> SideNetwork:
    try:
        return build_on_meta(run.cfg.model, run.dtype).side
    except UserError as error:
        raise UserError(f"trial {number} ({title(settings)}): {error}") from error
