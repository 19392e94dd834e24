"""Build the trials of a run: a side network, an optimizer and a loop each, one backbone."""

from functools import partial

from qst_tune.config.schema import TrainingConfig
from qst_tune.config.trials import Halving, Settings, Trials, title
from qst_tune.data.batches.read_once import ReadOnce
from qst_tune.data.batches.schedule import Schedule, schedule_of
from qst_tune.data.batches.training_data import TrainingData
from qst_tune.errors import UserError
from qst_tune.models.build import build_on_meta
from qst_tune.modules.qst_model import QSTModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.training.methods import fill_backbone, fill_side, prepare_frozen
from qst_tune.training.preference import reference_of
from qst_tune.training.resume import set_run_seed
from qst_tune.training.run import Run, build_trainer
from qst_tune.training.task import Task, on_device
from qst_tune.training.trials import Trial, use_side


def build_trials(
    run: Run,
    trials: Trials[TrainingConfig],
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
    dtype, device, settings = run.dtype, run.device, trials.settings
    _check_halving(trials.halving, schedule_of(run.cfg, data.train))
    sides = [  # what fits no backbone fails before one is loaded
        _side_on_meta(number, own, one)
        for number, (own, one) in enumerate(zip(settings, run.trials, strict=True), start=1)
    ]
    backbone = fill_backbone(model, run.cfg, dtype, device)
    move = partial(on_device, device=device)
    read_once = ReadOnce(data.train, move), data.validation and ReadOnce(data.validation, move)
    built = []
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
        built.append(Trial(number, own, trainer, side, model.reference_side))
    prepare_frozen(model, run.cfg, [trial.side for trial in built], backbone, dtype, device)
    return built


def _check_halving(halving: Halving | None, schedule: Schedule) -> None:
    """Refuse a first choice at a step of which there is no figure."""
    if halving is not None and not schedule.validates_after(halving.first_step):
        raise UserError(
            f"trials.halving: first_step={halving.first_step} must be a step after which trials "
            f"validate: set run_val_every_n_steps={halving.first_step}, or an epoch's end as "
            "first_step"
        )


def _side_on_meta(number: int, settings: Settings, run: Run) -> SideNetwork:
    try:
        return build_on_meta(run.cfg.model, run.dtype).side
    except UserError as error:
        raise UserError(f"trial {number} ({title(settings)}): {error}") from error
