"""The loop, its checkpoints and its tasks; configs name the checkpointers as torchtune's."""

from qst_tune.backbone.hf_checkpointer import HFCheckpointer
from qst_tune.results.tuned_checkpointer import TunedCheckpointer

__all__ = ["HFCheckpointer", "TunedCheckpointer"]
