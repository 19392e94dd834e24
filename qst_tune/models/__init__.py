"""Model builders, named in configs as ``qst_tune.models.<builder>``."""

from qst_tune.models.classifier import qst_classifier
from qst_tune.models.from_hf import (
    backbone_from_hf,
    peqa_from_hf,
    qst_from_hf,
)
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
from qst_tune.models.peqa import (
    peqa_builder,
    peqa_decoder,
    peqa_llama2,
    peqa_llama2_7b,
    peqa_llama2_13b,
    peqa_llama2_70b,
    peqa_llama3_1,
    peqa_llama3_1_8b,
    peqa_llama3_1_70b,
    peqa_llama3_2,
    peqa_llama3_2_1b,
    peqa_llama3_2_3b,
    peqa_smollm2_1_7b,
    peqa_smollm2_135m,
    peqa_smollm2_360m,
)
from qst_tune.models.qst import qst_builder, qst_decoder
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
    "backbone_from_hf",
    "peqa_builder",
    "peqa_decoder",
    "peqa_from_hf",
    "peqa_llama2",
    "peqa_llama2_7b",
    "peqa_llama2_13b",
    "peqa_llama2_70b",
    "peqa_llama3_1",
    "peqa_llama3_1_8b",
    "peqa_llama3_1_70b",
    "peqa_llama3_2",
    "peqa_llama3_2_1b",
    "peqa_llama3_2_3b",
    "peqa_smollm2_1_7b",
    "peqa_smollm2_135m",
    "peqa_smollm2_360m",
    "qst_builder",
    "qst_classifier",
    "qst_decoder",
    "qst_from_hf",
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


def __getattr__(name: str) -> None:
    hint = ": OPT is tuned with qst_from_hf and its directory" if "opt" in name.split("_") else ""
    raise AttributeError(f"qst_tune.models has no {name}{hint}")
