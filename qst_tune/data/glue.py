"""Eight tasks of GLUE (https://arxiv.org/abs/1804.07461), with the metrics of its authors.

The columns and the numbers of the classes are those of ``nyu-mll/glue``. Every template ends where
a language model would answer, so that the last token's state, which the classifier reads, is about
the answer.
"""

from dataclasses import dataclass

from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.classification import ClassificationDataset, classification_dataset
from qst_tune.errors import UserError, did_you_mean

HUB_NAME = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task."""

    template: str  # columns in braces
    labels: tuple[str, ...] | None  # names of the classes; None for a score
    metrics: tuple[str, ...] = ("accuracy",)  # the first is that of the QST paper's table


GLUE_TASKS = {
    "rte": GlueTask(
        "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
        ("entailment", "not_entailment"),
    ),
    "mrpc": GlueTask(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
        "Question: Do both sentences mean the same?\nAnswer:",
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
    ),
    "stsb": GlueTask(
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nSimilarity from 0 to 5:",
        None,
        ("pearson", "spearman"),
    ),
    "cola": GlueTask(
        "Sentence: {sentence}\nQuestion: Is this sentence good English?\nAnswer:",
        ("unacceptable", "acceptable"),
        ("matthews",),
    ),
    "sst2": GlueTask("Review: {sentence}\nSentiment:", ("negative", "positive")),
    "qnli": GlueTask(
        "{sentence}\nQuestion: {question}\nIs the question answered above?\nAnswer:",
        ("entailment", "not_entailment"),
    ),
    "qqp": GlueTask(
        "Question 1: {question1}\nQuestion 2: {question2}\nAre they the same question?\nAnswer:",
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
    ),
    "mnli": GlueTask(
        "{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
        ("entailment", "neutral", "contradiction"),
    ),
}


def glue_dataset(
    tokenizer: ModelTokenizer, *, task: str, source: str = HUB_NAME, **arguments: object
) -> ClassificationDataset:
    """Load a task of GLUE, from the hub or from local files with the same columns.

    In a torchtune config::

        dataset:
          _component_: qst_tune.data.glue_dataset
          task: sst2
          source: json
          data_files: train.jsonl

    Args:
        tokenizer (ModelTokenizer): of torchtune's interface.
        task (str): rte, mrpc, stsb, cola, sst2, qnli, qqp or mnli.
        source (str): as for :func:`~qst_tune.data.classification.classification_dataset`.
        **arguments (object): of that function; ``template``, ``labels`` and ``metrics`` have the
            task's values by default.

    Returns:
        ClassificationDataset: the rows may have labels as numbers or as names.
    """
    if task not in GLUE_TASKS:
        raise UserError(
            f"task={task!r} is none of {', '.join(GLUE_TASKS)}{did_you_mean(task, GLUE_TASKS)}"
        )
    if source == HUB_NAME:
        arguments = {"name": task, **arguments}
    return classification_dataset(
        tokenizer, source=source, **{**vars(GLUE_TASKS[task]), **arguments}
    )
