"""The builder of classifiers, for any backbone."""

from typing import Any

from qst_tune.models.qst import is_opt_model, qst_builder
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.side.output_mix import SigmoidMix
from qst_tune.torchtune_compat import component_of


def qst_classifier(backbone: str, num_labels: int, **arguments: Any) -> QSTClassifier:
    """Build a QST model that classifies sequences.

    In a torchtune config::

        model:
          _component_: qst_tune.models.qst_classifier
          backbone: qst_tune.models.smollm2_135m
          num_labels: 2
          reduction_factor: 16

    ``variant="authors"`` over OPT is their classifier's: z of the output mix starts at 0 unless
    ``initial_mix`` is set, and the last token is found by counting
    (:class:`~qst_tune.modules.qst_classifier.QSTClassifier`).

    ``backbone`` is the dotted name of a builder of a plain decoder, ours or torchtune's;
    ``arguments`` are those of it and of :func:`~qst_tune.models.qst.qst_decoder`. One label makes a
    regression. ValueError if ``backbone`` names nothing or a whole model, or as ``qst_decoder``.
    """
    try:
        builder = component_of(backbone)
    except Exception as error:  # importing a user's own module may raise anything
        raise ValueError(f"backbone={backbone!r} cannot be imported") from error
    plain = getattr(builder, "backbone_builder", None)
    if plain is not None:
        raise ValueError(
            f"backbone={backbone!r} builds a whole model: name the builder of its plain backbone, "
            f"{plain.__name__} ({plain.__module__})"
        )
    decoder = qst_builder(builder)(**arguments)
    as_their_opt = is_opt_model(decoder.backbone) and arguments.get("variant") == "authors"
    mix = getattr(decoder.side, "output_mix", None)  # LoRA alone has none
    if as_their_opt and isinstance(mix, SigmoidMix) and arguments.get("initial_mix") is None:
        mix.initial_logit = 0.0  # modeling_opt_qst.py: of a classifier zeros, else ones
        mix.reset_parameters()
    return QSTClassifier(decoder, num_labels, counts_tokens=as_their_opt)
