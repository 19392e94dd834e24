"""QST and PEQA over torchtune's Llama families."""

from torchtune.models.llama2 import llama2, llama2_7b, llama2_13b, llama2_70b
from torchtune.models.llama3_1 import llama3_1, llama3_1_8b, llama3_1_70b
from torchtune.models.llama3_2 import llama3_2, llama3_2_1b, llama3_2_3b

from qst_tune.models.peqa import peqa_builder
from qst_tune.models.qst import qst_builder

# Component builders: every size given as an argument.
qst_llama2 = qst_builder(llama2)
qst_llama3_1 = qst_builder(llama3_1)
qst_llama3_2 = qst_builder(llama3_2)
peqa_llama2 = peqa_builder(llama2)
peqa_llama3_1 = peqa_builder(llama3_1)
peqa_llama3_2 = peqa_builder(llama3_2)

# Model builders: the published sizes.
qst_llama2_7b = qst_builder(llama2_7b)
qst_llama2_13b = qst_builder(llama2_13b)
qst_llama2_70b = qst_builder(llama2_70b)
qst_llama3_1_8b = qst_builder(llama3_1_8b)
qst_llama3_1_70b = qst_builder(llama3_1_70b)
qst_llama3_2_1b = qst_builder(llama3_2_1b)
qst_llama3_2_3b = qst_builder(llama3_2_3b)
peqa_llama2_7b = peqa_builder(llama2_7b)
peqa_llama2_13b = peqa_builder(llama2_13b)
peqa_llama2_70b = peqa_builder(llama2_70b)
peqa_llama3_1_8b = peqa_builder(llama3_1_8b)
peqa_llama3_1_70b = peqa_builder(llama3_1_70b)
peqa_llama3_2_1b = peqa_builder(llama3_2_1b)
peqa_llama3_2_3b = peqa_builder(llama3_2_3b)
