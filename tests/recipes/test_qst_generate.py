"""Answers of the base model and of a side network, through the real `tune` and through main()."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from qst_tune.recipes import peqa_finetune, qst_generate
from torchtune.data import Message

from qst_tune.config.cli import run_recipe
from qst_tune.data import hf_chat_tokenizer
from qst_tune.errors import UserError
from qst_tune.results.loading import TunedModel, load_tuned_model
from tests.support.checkpoints import (
    COLOURS,
    SIZES,
    Config,
    finetune_config,
    generate_config,
    random_weights,
    write_config,
    write_model_directory,
)
from tests.support.configs import typed_config
from tests.support.recipe_runs import FinetuneResult, finetune, merged, one_thread, tune_here


def typed(cfg: DictConfig) -> qst_generate.GenerateConfig:
    return typed_config(cfg, qst_generate.GenerateConfig)


def answered(cfg: DictConfig, tuned: TunedModel, prompts: list[str]) -> list[list[int]]:
    """The ids of the recipe's answers."""
    encoded = qst_generate.encode(typed(cfg), tuned, prompts)
    return qst_generate.answer(typed(cfg), tuned, encoded)


PROMPT = "what is the colour of box 1"
BASE, TUNED = "quantised base model", "with the side network"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def trained(root: Path) -> FinetuneResult:
    """A side network that knows its eight answers by heart."""
    config = {**finetune_config(root), "dataset_val": None}
    return finetune(config, root / "run", "epochs=30")


@pytest.fixture(scope="module")
def config(root: Path, trained: FinetuneResult) -> Config:
    return generate_config(root) | {"side_network": str(trained.weights_file.parent)}


def generate(config: Config, *overrides: str) -> None:
    with one_thread():
        qst_generate.main(merged(config, *overrides))


def answers(output: str) -> dict[str, str]:
    return dict(re.findall(r"^--- (.*) ---\n(.*)\n", output, flags=re.MULTILINE))


def prompt_tokens(root: Path) -> list[int]:
    tokenizer = hf_chat_tokenizer(str(root / "model"))
    return tokenizer.tokenize_messages(
        [Message(role="user", content=PROMPT)], add_end_tokens=False
    )[0]


@torch.no_grad()
def greedy(model: torch.nn.Module, tokens: list[int], stop: list[int], budget: int) -> list[int]:
    """The likeliest tokens one by one, each time computed anew from all tokens before."""
    answer: list[int] = []
    while len(answer) < budget:
        token = model(torch.tensor([tokens + answer]))[0, -1].argmax().item()
        if token in stop:
            break
        answer.append(token)
    return answer


def test_tune_prints_both_answers_and_the_tuned_one_is_learnt(config: Config, root: Path) -> None:
    path = write_config(root / "generate.yaml", config)
    result = tune_here(
        "run", "qst_generate", "--config", path, f"prompt={PROMPT}", "compare_with_base=True",
        "max_new_tokens=20", cwd=root,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = answers(result.stdout)
    assert list(found) == [BASE, TUNED]
    assert found[TUNED] == f"it is {COLOURS[1]}!"
    assert found[BASE] != found[TUNED]


@pytest.mark.parametrize("side_network", [True, False])
def test_answer_is_that_of_greedy_decoding_without_caches(
    side_network: bool, config: Config, root: Path
) -> None:
    cfg = merged(config, "max_new_tokens=12")
    if not side_network:
        cfg.side_network = None
    with one_thread():
        tuned = load_tuned_model(typed(cfg))
        (actual,) = answered(cfg, tuned, [PROMPT])
        stop = tuned.tokenizer.stop_tokens
        assert actual == greedy(tuned.model, prompt_tokens(root), stop, budget=12)
    assert actual


def test_a_batch_of_prompts_gives_the_answers_that_each_gives_alone(config: Config) -> None:
    prompts = [PROMPT, "what is it", "what is the colour of box 7 and of box 2"]
    cfg = merged({**config, "prompt": "", "prompts": prompts})
    with one_thread():
        tuned = load_tuned_model(typed(cfg))
        together = answered(cfg, tuned, qst_generate.read_prompts(typed(cfg)))
        alone = [answered(cfg, tuned, [prompt])[0] for prompt in prompts]
    assert together == alone
    assert len({len(answer) for answer in alone}) > 1  # rows end at different places


def test_answers_are_the_same_after_each_other(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """The caches of one answer do not reach into the next."""
    generate(config, "compare_with_base=True")
    both = answers(capsys.readouterr().out)
    generate(config)
    assert answers(capsys.readouterr().out) == {TUNED: both[TUNED]}
    generate({**config, "side_network": None})
    assert answers(capsys.readouterr().out) == {BASE: both[BASE]}


def test_sampling_follows_the_seed(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (0, 0, 1):
        generate({**config, "side_network": None}, "temperature=3.0", "top_k=50", f"seed={seed}")
        texts.append(answers(capsys.readouterr().out)[BASE])
    assert texts[0] == texts[1] != texts[2]


def test_system_prompt_is_read(config: Config) -> None:
    cfg = typed(merged(config, "system_prompt=be kind"))
    with one_thread():
        tuned = load_tuned_model(cfg)
    (tokens,) = qst_generate.encode(cfg, tuned, [PROMPT])
    text = tuned.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )


def run_wrong(
    config: Config, root: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> int | str | None:
    path = write_config(root / "wrong.yaml", config)
    monkeypatch.setattr(sys, "argv", ["qst_generate", "--config", str(path), *overrides])
    with one_thread(), pytest.raises(SystemExit) as info:
        run_recipe(qst_generate.main)
    return info.value.code


def test_side_network_of_another_backbone_is_refused(
    config: Config,
    root: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = write_model_directory(root / "other", weights=random_weights(seed=1))
    override = f"checkpointer.checkpoint_dir={other}"
    assert run_wrong(config, root, monkeypatch, override) == 2
    errors = capfd.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "was trained on another backbone (model) than other: fingerprint" in line
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt= "], "prompt is empty"),
        (["prompt=null"], "prompt is empty"),
        (["prompts=[a,b]"], "prompt and prompts are both set: use one of them"),
        (["prompts=a"], "prompts=a is not a list"),
        (["scales=there"], "scales=there does not go with this model: it takes side_network"),
        (["side_network=absent"], "absent is not a QST side network: it has no qst_config.json"),
        (["model.rank=8"], "use the model block of its qst_config.json"),
        (["max_new_tokens=120"], "exceed the model's max_seq_len 128: shorten one"),
        (["max_new_tokens=0"], "max_new_tokens=0 must be a whole number of at least 1"),
        (["temperature=-1"], "temperature=-1 must be a number of at least 0"),
        (["top_p=0"], "top_p=0 must be a number above 0 and of at most 1"),
        (["top_p=1.5"], "top_p=1.5 must be a number above 0 and of at most 1"),
        (["temprature=1"], "did you mean 'temperature'?"),
    ],
)
def test_mistake_is_one_helpful_line(
    overrides: list[str],
    message: str,
    config: Config,
    root: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run_wrong(config, root, monkeypatch, *overrides) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line


def test_description_rebuilds_the_model(config: Config, trained: FinetuneResult) -> None:
    """Who gets a directory needs no other config: its model block is the run's."""
    block = json.loads((trained.weights_file.parent / "qst_config.json").read_text())["model"]
    assert block == config["model"]
    with one_thread():
        load_tuned_model(typed(merged({**config, "model": block})))
    with pytest.raises(UserError, match="does not fit the model"):
        load_tuned_model(typed(merged({**config, "model": {**block, "rank": 2}})))


# torchtune's own recipe.


def stock_config(config: Config) -> Config:
    """Of the recipe `generate`, for the model and side network of ``config``."""
    checkpointer = config["checkpointer"] | {
        "_component_": "qst_tune.training.TunedCheckpointer",
        "side_network": config["side_network"],
        "output_dir": str(Path(config["output_dir"]) / "unused"),
    }
    tokenizer = {**config["tokenizer"], "max_seq_len": None, "pad_token": "<|endoftext|>"}
    return {
        "model": config["model"],
        "tokenizer": tokenizer,
        "checkpointer": checkpointer,
        "prompt": {"system": None, "user": PROMPT},
        "max_new_tokens": 12,
        "temperature": 0.6,
        "top_k": 1,
        "enable_kv_cache": True,
        "quantizer": None,
        "device": "cpu",
        "dtype": "fp32",
        "seed": 0,
    }


def test_torchtunes_own_recipe_gives_the_tuned_answer(config: Config, root: Path) -> None:
    path = write_config(root / "stock.yaml", stock_config(config))
    result = tune_here("run", "generate", "--config", path, cwd=root)
    assert result.returncode == 0, result.stderr
    assert f"assistant\nit is {COLOURS[1]}!" in result.stdout + result.stderr


# PEQA.


@pytest.fixture(scope="module")
def peqa_config(root: Path, trained: FinetuneResult) -> Config:
    """Of a training run of peqa_finetune; the dependency only makes the model directory."""
    model = {"_component_": "qst_tune.models.peqa_llama3_2", **SIZES, "bits": 4}
    config = {**finetune_config(root), "model": model, "output_dir": str(root / "peqa")}
    with one_thread():
        peqa_finetune.main(merged(config, "epochs=4", "dataset_val=null"))
    return config


def test_a_peqa_model_answers_from_its_training_config(peqa_config: Config, root: Path) -> None:
    """Where no directory is named it is the run's; both answers are those without caches."""
    cfg = merged({**peqa_config, "prompt": PROMPT}, "max_new_tokens=12")
    with one_thread():
        tuned = load_tuned_model(typed(cfg))
        prompt, stop = prompt_tokens(root), tuned.tokenizer.stop_tokens
        (learnt,) = answered(cfg, tuned, [PROMPT])
        assert learnt == greedy(tuned.model, prompt, stop, budget=12)
        with tuned.untuned():
            (base,) = answered(cfg, tuned, [PROMPT])
            assert base == greedy(tuned.model, prompt, stop, budget=12)
        assert answered(cfg, tuned, [PROMPT]) == [learnt] != [base]
    assert tuned.title == "with the tuned scales"
