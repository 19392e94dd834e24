"""EleutherAI's harness scores a side network as we do, through its own class for transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qst_tune.data import hf_chat_tokenizer
from qst_tune.evaluation.log_likelihood import Continuation, log_likelihoods
from qst_tune.transformers import QSTForCausalLM
from tests.folders import side_network_folder

pytest.importorskip("lm_eval", reason="needs the extra eval")


def test_log_likelihoods_are_ours(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder, torchtune_model = side_network_folder(tmp_path)
    texts = [("what is the colour of", " box"), ("it is", " what it is"), ("the colour", " of it")]
    harness = HFLM(
        pretrained=QSTForCausalLM.from_pretrained(str(folder), dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=2,
    )
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=text, idx=number)
        for number, text in enumerate(texts)
    ]
    found = [score for score, _ in harness.loglikelihood(asked)]
    tokenizer = hf_chat_tokenizer(str(tmp_path / "model"))
    ours = []
    for context, target in texts:
        start = len(tokenizer.encode(context, add_bos=False, add_eos=False))
        whole = tokenizer.encode(context + target, add_bos=False, add_eos=False)
        ours.append(Continuation(tuple(whole[:start]), tuple(whole[start:])))
    expected = log_likelihoods(torchtune_model, ours, batch_size=3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
