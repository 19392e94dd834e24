"""The neural network modules of QST; those that a config can name are exported here."""

from qst_tune.modules.loss import LinearCrossEntropyLoss
from qst_tune.modules.nf4_linear import NF4Linear
from qst_tune.modules.qst_classifier import QSTClassifier
from qst_tune.modules.qst_decoder import QSTDecoder

__all__ = ["LinearCrossEntropyLoss", "NF4Linear", "QSTClassifier", "QSTDecoder"]
