"""Model builders, named in configs as ``qst_tune.models.<builder>``."""

from qst_tune.models.llama import (
    qst_llama2,
    qst_llama2_7b,
    qst_llama2_13b,
    qst_llama2_70b,
    qst_llama3_1,
    qst_llama3_1_8b,
    qst_llama3_1_70b,
    qst_llama3_2,
    qst_llama3_2_1b,
    qst_llama3_2_3b,
)
from qst_tune.models.qst import VARIANTS, qst_builder, qst_decoder
from qst_tune.models.smollm2 import (
    qst_smollm2_1_7b,
    qst_smollm2_135m,
    qst_smollm2_360m,
    smollm2,
    smollm2_1_7b,
    smollm2_135m,
    smollm2_360m,
)

__all__ = [
    "VARIANTS",
    "qst_builder",
    "qst_decoder",
    "qst_llama2",
    "qst_llama2_7b",
    "qst_llama2_13b",
    "qst_llama2_70b",
    "qst_llama3_1",
    "qst_llama3_1_8b",
    "qst_llama3_1_70b",
    "qst_llama3_2",
    "qst_llama3_2_1b",
    "qst_llama3_2_3b",
    "qst_smollm2_1_7b",
    "qst_smollm2_135m",
    "qst_smollm2_360m",
    "smollm2",
    "smollm2_1_7b",
    "smollm2_135m",
    "smollm2_360m",
]
