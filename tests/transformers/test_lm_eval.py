"""EleutherAI's harness scores a side network as we do, through its own class for transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qst_tune.data import hf_chat_tokenizer
from qst_tune.evaluation.log_likelihood import Continuation, log_likelihood_passes
from qst_tune.training.task import complete
from qst_tune.transformers import QSTForCausalLM
from qst_tune.transformers.__main__ import main
from tests.support.checkpoints import write_jsonl
from tests.support.directories import side_network_directory

pytest.importorskip("lm_eval", reason="needs the extra eval")

TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_the_command_scores_a_directory_by_its_path(tmp_path, monkeypatch, capsys) -> None:
    directory, torchtune_model = side_network_directory(tmp_path)
    rows = [
        {"question": f"{start} of it", "choices": ["red", "box"], "answer": 0}
        for start in ("the colour", "what is the name", "tell me", "blue is the colour", "a")
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "colours.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "sys.argv",
        ["qst_tune.transformers", "lm_eval", "--model", "hf", "--model_args",
         f"pretrained={directory},dtype=float32", "--tasks", "colours", "--device", "cpu",
         "--include_path", str(tmp_path)],
    )  # fmt: skip
    main()
    tokenizer = hf_chat_tokenizer(str(tmp_path / "model"))
    right = 0
    for row in rows:
        asked = tokenizer.encode(row["question"], add_bos=False, add_eos=False)
        both = [
            tokenizer.encode(f"{row['question']} {choice}", add_bos=False, add_eos=False)
            for choice in row["choices"]
        ]
        scores = complete(
            log_likelihood_passes(
                torchtune_model,
                [Continuation(tuple(asked), tuple(ids[len(asked) :])) for ids in both],
                batch_size=1,
            )
        )
        right += scores[0] > scores[1]
    line = next(line for line in capsys.readouterr().out.splitlines() if "|acc" in line)
    assert float(line.split("|")[7]) == pytest.approx(right / len(rows), abs=1e-4)


def test_log_likelihoods_are_ours(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    directory, torchtune_model = side_network_directory(tmp_path)
    texts = [("what is the colour of", " box"), ("it is", " what it is"), ("the colour", " of it")]
    harness = HFLM(
        pretrained=QSTForCausalLM.from_pretrained(str(directory), dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(directory),
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
    expected = complete(log_likelihood_passes(torchtune_model, ours, batch_size=3))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)
