"""Datasets and tokenizers that torchtune lacks, named in configs as ``qst_tune.data.<name>``."""

from qst_tune.data.auto_dataset import AutoDataset, auto_dataset
from qst_tune.data.chat.template import ChatTemplate
from qst_tune.data.chat.tokenizer import HFChatTokenizer
from qst_tune.data.chat.tokenizer_files import hf_chat_tokenizer
from qst_tune.data.classification import (
    ClassificationDataset,
    classification_dataset,
    collate_classification,
)
from qst_tune.data.glue import GLUE_TASKS, glue_dataset

__all__ = [
    "GLUE_TASKS",
    "AutoDataset",
    "ChatTemplate",
    "ClassificationDataset",
    "HFChatTokenizer",
    "auto_dataset",
    "classification_dataset",
    "collate_classification",
    "glue_dataset",
    "hf_chat_tokenizer",
]
