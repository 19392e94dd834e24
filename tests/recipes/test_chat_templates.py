"""Chat templates in whole runs: from a file, with a date, and with tools in generation."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from qst_tune.recipes import qst_generate

from qst_tune.data.chat import template as chat_template
from qst_tune.results.loading import load_tuned_model
from qst_tune.training.state_file import unpack_state
from tests.support.checkpoints import CHATML, finetune_config, generate_config
from tests.support.configs import typed_config
from tests.support.recipe_runs import finetune, merged, one_thread

DATED = "{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML


class NextDay:
    """In the place of the class datetime."""

    @staticmethod
    def now() -> datetime:
        return datetime(2000, 1, 2)


def test_a_template_file_with_a_date_resumes_on_another_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**finetune_config(tmp_path), "dataset_val": None, "max_steps_per_epoch": 1}
    (tmp_path / "dated.jinja").write_text(DATED)
    template = f"tokenizer.chat_template={tmp_path / 'dated.jinja'}"
    whole = finetune(config, tmp_path / "whole", template, "epochs=2")
    part = tmp_path / "part"
    finetune(config, part, template, "epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "datetime", NextDay)
        resumed = finetune(config, part, template, "epochs=2", "resume_from_checkpoint=True")
        assert resumed.weights_file.read_bytes() == whole.weights_file.read_bytes()
    state = unpack_state(part / "checkpoints" / "step_00000002")
    assert datetime.fromisoformat(state["date"]).date() != NextDay.now().date()


def test_tools_are_given_to_the_template_and_calls_keep_their_special_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune_config(tmp_path)
    config = generate_config(tmp_path) | {"side_network": None}
    (tmp_path / "t.jinja").write_text(WITH_TOOLS)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    cfg = merged(
        config, f"tokenizer.chat_template={tmp_path / 't.jinja'}", "prompt=it is",
        f"tools={tmp_path / 'tools.json'}", "max_new_tokens=2",
    )  # fmt: skip
    typed = typed_config(cfg, qst_generate.GenerateConfig)
    with one_thread():
        tuned = load_tuned_model(typed)
        (tokens,) = qst_generate.encode(typed, tuned, ["it is"])
        qst_generate.main(cfg)
    prompt = tuned.tokenizer.decode(tokens, skip_special_tokens=False)
    assert prompt.startswith(json.dumps([tool]))
    start = tuned.tokenizer.special_tokens["<|im_start|>"]
    assert qst_generate.decode(typed, tuned, [start]) == "<|im_start|>"
    assert "quantised base model" in capsys.readouterr().out
