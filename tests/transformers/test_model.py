"""The transformers model gives what the torchtune model gives, however it is asked."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
    pipeline,
)

from qst_tune.errors import UserError
from qst_tune.generation.caches import without_head
from qst_tune.generation.sequence import CachedSequence
from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.qst_decoder import QSTDecoder
from qst_tune.transformers import QSTConfig, QSTForCausalLM
from tests.support.checkpoints import random_weights, write_model_directory
from tests.support.directories import side_network_directory
from tests.support.numbers import random_tokens

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qst_tune"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QSTDecoder]:
    return side_network_directory(tmp_path_factory.mktemp("transformers"))


@pytest.fixture(scope="module")
def directory(made: tuple[Path, QSTDecoder]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def torchtune_model(made: tuple[Path, QSTDecoder]) -> QSTDecoder:
    return made[1]


@pytest.fixture(scope="module")
def model(directory: Path) -> QSTForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(batch=2, length=11, vocab_size=300)


def left_padded(tokens: torch.Tensor, num_pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    pads = torch.zeros(len(tokens), num_pads, dtype=torch.long)
    mask = torch.cat([pads, torch.ones_like(tokens)], dim=1)
    return torch.cat([pads, tokens], dim=1), mask


@torch.no_grad()
def test_logits_are_those_of_the_torchtune_model_bit_for_bit(model, torchtune_model, tokens):
    assert isinstance(model, QSTForCausalLM)
    assert not model.training
    expected = torchtune_model(tokens)
    assert torch.equal(model(tokens).logits, expected)
    assert torch.equal(model(tokens, attention_mask=torch.ones_like(tokens)).logits, expected)
    torchtune_model.side.disabled = True
    assert not torch.allclose(torchtune_model(tokens), expected)
    torchtune_model.side.disabled = False


def test_the_training_path_gives_the_same_logits_and_the_same_loss(model, torchtune_model, tokens):
    """As recipes train: in training mode, side network recomputed, loss from the head's input."""
    loss = LinearCrossEntropyLoss(chunk_tokens=7)
    labels = F.pad(tokens[:, 1:], (0, 1), value=loss.ignore_index)
    torchtune_model.train().side.recompute = True
    try:
        with without_head(torchtune_model):
            loss.set_model_output(torchtune_model)
            head_input = torchtune_model(tokens)
    finally:
        torchtune_model.eval().side.recompute = False
    assert head_input.requires_grad
    expected = model(tokens, labels=tokens)
    assert torch.equal(torchtune_model.output(head_input), expected.logits)
    torch.testing.assert_close(loss(head_input, labels), expected.loss)


@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(model, tokens):
    expected = model(tokens).logits
    padded, mask = left_padded(tokens, 4)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], expected, **CLOSE)
    padded, mask = padded.roll(-4, 1), mask.roll(-4, 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :11], expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
def test_pieces_through_a_cache_equal_the_whole(make, model, tokens):
    padded, mask = left_padded(tokens, 3)
    expected = model(padded, attention_mask=mask).logits
    size = {"max_cache_len": 20} if make is StaticCache else {}
    cache, pieces = make(config=model.config, **size), []
    for start, stop in ((0, 6), (6, 7), (7, 14)):
        output = model(padded[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        pieces.append(output.logits)
    actual = torch.cat(pieces, dim=1)
    torch.testing.assert_close(actual[:, 3:], expected[:, 3:], **CLOSE)
    assert int(cache.get_seq_length()) == 14
    assert not model.model.caches_are_setup()


@torch.no_grad()
def test_a_mask_of_four_dimensions_says_who_attends_to_whom(model, tokens):
    length = tokens.shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril().expand(2, -1, -1, -1)
    expected = model(tokens).logits
    torch.testing.assert_close(model(tokens, attention_mask=causal).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 5\)"):
        model(tokens, attention_mask=torch.zeros(2, 5))


@torch.no_grad()
def test_only_asked_for_logits_are_computed(model, tokens):
    expected = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, expected[:, -2:], **CLOSE)
    places = torch.tensor([1, 5])
    kept = model(tokens, logits_to_keep=places).logits
    torch.testing.assert_close(kept, expected[:, places], **CLOSE)


@torch.no_grad()
def test_the_head_never_gets_a_view_of_a_longer_row(model, tokens, monkeypatch):
    """torch copies the head's whole weight for each row of one."""
    given, head = [], model.model.output
    monkeypatch.setattr(model.model, "output", lambda x: given.append(x) or head(x))
    model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, pad_token_id=0)
    CachedSequence(model.model).next_logits(tokens[0].tolist())
    width = model.config.hidden_size
    assert [x.shape for x in given] == [(2, 1, width), (2, 1, width), (1, width)]
    assert all(x.stride()[:-1] == (width,) * (x.ndim - 1) for x in given[:2])


def test_the_loss_is_that_of_the_next_token_and_trains_the_side_network_alone(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = random_tokens(batch=2, length=9, vocab_size=300)
    labels = tokens.clone()
    labels[0, :4] = -100
    output = model(tokens, labels=labels)
    kept = labels[:, 1:] != -100
    log_probs = output.logits[:, :-1].log_softmax(-1)
    expected = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0][kept].mean()
    torch.testing.assert_close(output.loss, expected)
    of_a_trainer = model(tokens, labels=labels, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(of_a_trainer, expected * kept.sum() / 50)
    output.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"model.side.{name}" for name in model.model.side.adapter_params()}


@torch.no_grad()
def greedy(torchtune_model, row, count):
    out = row.tolist()
    for _ in range(count):
        out.append(torchtune_model(torch.tensor([out]))[0, -1].argmax().item())
    return out[len(row) :]


@pytest.mark.parametrize("cache", [None, "static", "off"])
def test_generate_continues_a_left_padded_batch_as_torchtune_does(
    cache, model, torchtune_model, tokens
):
    rows = [tokens[0, 4:], tokens[1]]
    padded = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), rows[0]]), rows[1]])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    how = {"use_cache": False} if cache == "off" else {"cache_implementation": cache}
    output = model.generate(
        padded, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None,
        pad_token_id=0, **how,
    )  # fmt: skip
    expected = [greedy(torchtune_model, row, 9) for row in rows]
    assert output[:, 11:].tolist() == expected


def test_beams_reorder_the_caches_of_both_networks(model, tokens):
    settings = {
        "max_new_tokens": 8, "num_beams": 4, "do_sample": False, "eos_token_id": None,
        "pad_token_id": 0, "attention_mask": torch.ones_like(tokens),
    }  # fmt: skip
    cached = model.generate(tokens, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **settings))
    beamless = model.generate(tokens, **{**settings, "num_beams": 1})
    assert not torch.equal(cached, beamless)  # so that beams were indeed exchanged


def test_a_pipeline_chats_with_the_backbones_tokenizer(directory, model):
    chat = pipeline("text-generation", model=str(directory), dtype=torch.float32)
    conversation = [{"role": "user", "content": "what is it"}]
    (answer,) = chat(conversation, max_new_tokens=5, do_sample=False)
    ids = chat.tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = model.generate(**ids, max_new_tokens=5, do_sample=False)
    text = chat.tokenizer.decode(expected[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["generated_text"][-1]["content"] == text


def test_the_tokenizer_is_the_backbones(directory):
    ours = AutoTokenizer.from_pretrained(directory)
    theirs = AutoTokenizer.from_pretrained(directory.parent / "model")
    assert ours("what is the colour")["input_ids"] == theirs("what is the colour")["input_ids"]
    assert ours.eos_token == "<|im_end|>"


def test_the_config_says_what_it_is_and_loading_fills_in_sizes(directory, model):
    config = AutoConfig.from_pretrained(directory)
    assert isinstance(config, QSTConfig)
    assert config.backbone == str(directory.parent / "model")
    assert model.config.num_hidden_layers == 3 + len(model.model.side.blocks)
    assert model.config.vocab_size == 320
    assert model.dtype == torch.float32
    bf16 = AutoModelForCausalLM.from_pretrained(directory)
    assert bf16.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in bf16.model.side.parameters())


def test_a_moved_backbone_can_be_named(directory, tokens, model, tmp_path):
    moved, alone = tmp_path / "elsewhere", tmp_path / "side"
    shutil.copytree(directory.parent / "model", moved)
    shutil.copytree(directory, alone)
    config = (alone / "config.json").read_text()
    (alone / "config.json").write_text(config.replace(str(directory.parent / "model"), "elsewhere"))
    # A directory beside the side network's, or named by the caller.
    shutil.copytree(directory.parent / "model", alone / "elsewhere")
    found = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32)
    shutil.rmtree(alone / "elsewhere")
    named = AutoModelForCausalLM.from_pretrained(alone, backbone=str(moved), dtype=torch.float32)
    for other in (found, named):
        assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert AutoTokenizer.from_pretrained(alone, backbone=str(moved)).eos_token == "<|im_end|>"


def test_what_cannot_be_loaded_is_reported(directory, tmp_path, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained
    other = write_model_directory(tmp_path / "other", weights=random_weights(seed=1))
    with pytest.raises(UserError, match="was trained on another backbone"):
        load(directory, backbone=str(other))
    with pytest.raises(UserError, match=r"'/not/there' is no directory here .* backbone=<DIR>"):
        load(directory, backbone="/not/there")
    with pytest.raises(UserError, match="load_in_4bit=True has no meaning"):
        load(directory, load_in_4bit=True)
    with pytest.raises(UserError, match=r"dtype=torch.float64 is not supported"):
        load(directory, dtype=torch.float64)
    with pytest.raises(UserError, match="must be on one device"):
        load(directory, device_map={"a": "cpu", "b": "meta"})


def test_a_directory_cannot_have_foreign_code_called(directory, tmp_path):
    for file, ours, foreign in [
        ("qst_config.json", "qst_tune.models.qst_llama3_2", "os.system"),
        ("qst_config.json", "qst_tune.models.qst_llama3_2", "qst_tune.models.builder.inspect"),
        ("recipe_config.yaml", "torchtune.training.FullModelHFCheckpointer", "os.system"),
    ]:
        copy = tmp_path / foreign / file
        shutil.copytree(directory, copy)
        text = (copy / file).read_text()
        assert ours in text
        (copy / file).write_text(text.replace(ours, foreign))
        with pytest.raises(UserError, match=foreign):
            AutoModelForCausalLM.from_pretrained(copy)


@torch.no_grad()
def test_a_loaded_model_is_saved_as_it_was(directory, model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    for name in ("side_network.safetensors", "recipe_config.yaml", "config.json"):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()


def test_what_is_not_supported_is_refused(model, tokens):
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="129 tokens are more than the model's max_seq_len 128"):
        model(torch.ones(1, 129, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.pretrained
@pytest.mark.skipif(
    not (CACHE / "runs/135M_qst/side_network").is_dir(), reason="make quickstart makes it"
)
@torch.no_grad()
def test_smollm2_with_a_trained_side_network(tmp_path):
    side = tmp_path / "side"
    shutil.copytree(CACHE / "runs/135M_qst/side_network", side)
    if not (side / "config.json").is_file():  # of a run before there was one
        (side / "config.json").write_text('{"model_type": "qst", "backbone": ""}')
    backbone = str(CACHE / "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(side, backbone=backbone)
    model = AutoModelForCausalLM.from_pretrained(side, backbone=backbone, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does a with statement do?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    logits = model(ids).logits
    assert torch.equal(logits, model.model(ids))
    output = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert output[0, ids.shape[1] :].tolist() == greedy(model.model, ids[0], 12)
