"""A side network over a loaded model starts as the model, trains alone, and is saved as ours."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import snapshot_download
from torchao.dtypes.nf4tensor import NF4Tensor
from transformers import AutoModelForCausalLM

import qst_tune
from qst_tune import QSTForCausalLM, SideConfig, get_qst_model
from qst_tune.errors import UserError
from qst_tune.results.loading import load_directory
from tests.support.fake_hub import COMMIT, serving, use
from tests.support.model_types import saved_models, tiny_model
from tests.support.numbers import random_tokens, randomize_

TYPES = ("llama", "qwen3", "gemma2", "opt", "qwen3_moe")
CLOSE = {"rtol": 0.0, "atol": 1e-5}
SMALL = SideConfig(reduction_factor=4, rank=8)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_models(tmp_path_factory.mktemp("models"), TYPES)


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def tokens() -> torch.Tensor:
    return random_tokens(batch=2, length=11, vocab_size=250)


def saved(directory: Path, to: Path, **quantize: Any) -> Any:
    """A side network with random weights over a model, written to a directory."""
    tuned = get_qst_model(load(directory), SMALL, **quantize)
    randomize_(tuned.model.side)
    tuned.save_pretrained(to)
    return tuned


@pytest.mark.parametrize("name", TYPES)
@torch.no_grad()
def test_at_the_start_logits_and_loss_are_the_models(name, directories, tokens):
    model = load(directories[name])
    labels = tokens.clone()
    labels[:, :4] = -100  # the last token of padding predicts nothing
    padded = torch.ones_like(tokens)
    padded[1, :3] = 0
    want = model(tokens, labels=labels, attention_mask=padded)
    got = get_qst_model(model, SMALL)(tokens, labels=labels, attention_mask=padded)
    real = padded.bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], **CLOSE)
    torch.testing.assert_close(got.loss, want.loss, **CLOSE)


def dense(weight: Any) -> torch.Tensor:
    return (
        weight.get_original_weight() if isinstance(weight, NF4Tensor) else weight.detach().clone()
    )


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_steps_lower_the_loss_and_change_the_side_network_alone(quantize, directories, tokens):
    tuned = get_qst_model(load(directories["llama"]), SMALL, quantize=quantize).train()
    frozen = {n: dense(p) for n, p in tuned.named_parameters() if not p.requires_grad}
    trainable = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    assert trainable.keys() == tuned.state_dict().keys()
    optimizer = torch.optim.Adam((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        output = tuned(tokens, labels=tokens)
        assert output.logits is None  # never whole in training
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses == sorted(losses, reverse=True)
    now = dict(tuned.named_parameters())
    assert any(not torch.equal(now[name], before) for name, before in trainable.items())
    for name, before in frozen.items():
        assert torch.equal(dense(now[name]), before)


def test_gradients_are_those_of_transformers_own_loss(directories, tokens):
    tuned = get_qst_model(load(directories["gemma2"]), SMALL).train()
    own = tuned(tokens, labels=tokens).loss
    grads = torch.autograd.grad(own, list(tuned.model.side.parameters()), allow_unused=True)
    logits = tuned(tokens, skip_logits=False).logits
    loss = tuned.loss_function(logits, tokens, vocab_size=logits.shape[-1])
    want = torch.autograd.grad(loss, list(tuned.model.side.parameters()), allow_unused=True)
    torch.testing.assert_close(own, loss)
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@torch.no_grad()
def test_a_saved_side_network_opens_everywhere_with_the_same_logits(
    name, quantize, directories, tokens, tmp_path
):
    tuned = saved(directories[name], tmp_path / "side", quantize=quantize)
    want = tuned(tokens).logits
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "side", dtype=torch.float32)
    over_model = QSTForCausalLM.from_pretrained(tmp_path / "side", backbone=load(directories[name]))
    in_recipes = load_directory(
        tmp_path / "side", directories[name], dtype=torch.float32, device=torch.device("cpu")
    ).model
    assert torch.equal(opened(tokens).logits, want)
    assert torch.equal(over_model(tokens).logits, want)
    assert torch.equal(in_recipes(tokens), want)
    opened.save_pretrained(tmp_path / "again")
    for file in ("side_network.safetensors", "qst_config.json", "recipe_config.yaml"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "side" / file).read_bytes()


def test_other_files_of_a_directory_stay(directories, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "notes").write_text("mine")
    saved(directories["llama"], tmp_path)
    assert (tmp_path / "checkpoint-1").is_dir()
    assert (tmp_path / "notes").read_text() == "mine"


@torch.no_grad()
def test_a_changed_model_is_known_by_its_own_weights(directories, tokens, tmp_path):
    def changed(by: float) -> Any:
        model = load(directories["llama"])
        model.model.layers[1].mlp.up_proj.weight.add_(by)
        return model

    tuned = get_qst_model(changed(0.5), SMALL)
    randomize_(tuned.model.side)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained on another backbone"):
        QSTForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="was trained on another backbone"):
        QSTForCausalLM.from_pretrained(tmp_path, backbone=changed(0.25))
    again = QSTForCausalLM.from_pretrained(tmp_path, backbone=changed(0.5))
    assert torch.equal(again(tokens).logits, tuned(tokens).logits)


@torch.no_grad()
def test_a_model_without_a_directory_is_named_at_loading(tokens, tmp_path):
    tuned = get_qst_model(tiny_model("qwen3"), SMALL)
    randomize_(tuned.model.side)
    tuned.save_pretrained(tmp_path)
    again = QSTForCausalLM.from_pretrained(tmp_path, backbone=tiny_model("qwen3"))
    assert torch.equal(again(tokens).logits, tuned(tokens).logits)
    with pytest.raises(UserError, match=r"'qwen3' is no directory here .* give the model itself"):
        QSTForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_samples_in_one_row_are_reported_apart_by_their_positions(directories, tokens):
    tuned = get_qst_model(load(directories["llama"]), SMALL)
    randomize_(tuned.model.side)
    positions = torch.arange(11).repeat(2)[None]
    packed = tuned(tokens.reshape(1, -1), position_ids=positions).logits
    torch.testing.assert_close(packed.view(2, 11, -1), tuned(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_model_that_bitsandbytes_has_quantised(directories, tokens, tmp_path, caplog):
    pytest.importorskip("bitsandbytes", reason="only its own users have it")
    from transformers import BitsAndBytesConfig

    method = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        directories["llama"], quantization_config=method, dtype=torch.float32
    )
    with torch.no_grad():
        want = model(tokens).logits
    tuned = get_qst_model(model, SMALL)
    assert "over qst_tune's own nf4" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(tuned(tokens).logits, want, **CLOSE)
    randomize_(tuned.model.side)
    tuned.train()(tokens, labels=tokens).loss.backward()
    tuned.eval().save_pretrained(tmp_path)
    ours = QSTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        error = (ours(tokens).logits - tuned(tokens).logits).norm() / tuned(tokens).logits.norm()
        assert error < 0.02  # absmax in 8 bits in the place of fp32; NF4 itself is at 0.1
        again = QSTForCausalLM.from_pretrained(tmp_path, backbone=model)
        assert torch.equal(again(tokens).logits, tuned(tokens).logits)
    with pytest.raises(UserError, match=r"quantised already \(bitsandbytes\)"):
        get_qst_model(model, SMALL, quantize="nf4")


@torch.no_grad()
def test_a_directory_in_4_bits_is_taken_over_with_its_codes(directories, tokens, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="only its own users have it")
    from transformers import BitsAndBytesConfig

    method = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        directories["llama"], quantization_config=method, dtype=torch.float32
    ).save_pretrained(tmp_path / "in_4_bits")
    tuned = saved(tmp_path / "in_4_bits", tmp_path / "side")
    opened = QSTForCausalLM.from_pretrained(tmp_path / "side", dtype=torch.float32)
    # Its first product on a CPU puts the codes in another order, and is not one in fp32.
    stored = load(tmp_path / "in_4_bits").model.layers[1].mlp.up_proj.weight
    ours = opened.get_submodule("model.frozen.model.model.layers.1.mlp.up_proj")
    exact = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
    assert torch.equal(ours.dense_weight(torch.float32), exact)
    torch.testing.assert_close(opened(tokens).logits, tuned(tokens).logits, rtol=0, atol=0.02)


@torch.no_grad()
def test_a_model_of_the_hub_keeps_its_name_and_commit(directories, tokens, tmp_path, monkeypatch):
    shutil.copytree(directories["llama"], tmp_path / "served/org/tiny")
    with serving(tmp_path / "served") as hub:
        use(monkeypatch, hub.url, tmp_path / "home")
        source = snapshot_download("org/tiny")
        model = load(Path(source))
        model.config._name_or_path, model.config._commit_hash = "org/tiny", COMMIT
        model.name_or_path = "org/tiny"
        tuned = get_qst_model(model, SMALL)
        randomize_(tuned.model.side)
        tuned.save_pretrained(tmp_path / "side")
        backbone = tuned.provenance.backbone
        assert (backbone.name, backbone.revision) == ("org/tiny", COMMIT)
        opened = QSTForCausalLM.from_pretrained(tmp_path / "side", dtype=torch.float32)
    assert torch.equal(opened(tokens).logits, tuned(tokens).logits)
    assert str(tmp_path) not in (tmp_path / "side/recipe_config.yaml").read_text()


def test_what_is_no_model_of_transformers_is_refused(directories):
    with pytest.raises(UserError, match="not Linear"):
        get_qst_model(torch.nn.Linear(2, 2))
    tuned = get_qst_model(load(directories["llama"]), SMALL)
    with pytest.raises(UserError, match="not QSTForCausalLM"):
        get_qst_model(tuned)
    without_weights = tiny_model("llama").to("meta")
    with pytest.raises(UserError, match="has no weights"):
        get_qst_model(without_weights)
    with pytest.raises(UserError, match="variant=x is not supported"):
        tuned.save_pretrained("unused", variant="x")


def test_one_process_for_several_gpus_is_refused():
    """Where nn.DataParallel copies a model to each of them."""
    tuned = get_qst_model(tiny_model("llama"), SMALL)
    with pytest.raises(UserError, match="start one process a GPU with torchrun"):
        tuned._replicate_for_data_parallel()


def test_trainable_parameters_are_printed_as_peft_prints_them(directories, capsys):
    tuned = get_qst_model(load(directories["llama"]), SMALL, quantize="int8")
    dense = sum(p.numel() for p in load(directories["llama"]).parameters())
    side = sum(p.numel() for p in tuned.model.side.parameters())
    tuned.print_trainable_parameters()
    share = f"{100 * side / (dense + side):.4f}"
    assert capsys.readouterr().out == (
        f"trainable params: {side:,} || all params: {dense + side:,} || trainable%: {share}\n"
    )


def test_pushing_writes_a_public_directory(directories, tmp_path, monkeypatch):
    pushed = {}

    def push(directory: Path, name: str, *, private: bool) -> str:
        pushed.update({path.name: path.read_bytes() for path in directory.iterdir()})
        return f"https://hub/{name}"

    monkeypatch.setattr("qst_tune.transformers.pretrained.push_directory", push)
    tuned = saved(directories["llama"], tmp_path / "side")
    with pytest.raises(UserError, match="from a local directory"):
        tuned.push_to_hub("me/mine")
    assert tuned.push_to_hub("me/mine", base_model="org/base") == "https://hub/me/mine"
    assert str(directories["llama"]).encode() not in b"".join(pushed.values())
    assert b"org/base" in pushed["README.md"]


def test_importing_the_package_stays_cheap():
    program = (
        "import sys, qst_tune; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert {"get_qst_model", "SideConfig"} <= set(dir(qst_tune))
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        qst_tune.absent  # noqa: B018


def dial(name: str, blocks: int | None) -> Any:
    """LoRA in the last layers over a tiny model, with a side network or alone."""
    config = SideConfig(
        reduction_factor=4, rank=8, lora_layers=2, lora_rank=2, num_side_blocks=blocks
    )
    tuned = get_qst_model(tiny_model(name), config)
    randomize_(tuned.model.side)
    with torch.no_grad():
        for parameter in tuned.model.side.lora.parameters():
            parameter *= 0.3  # B A of the size of the weights
    return tuned


@pytest.mark.parametrize("blocks", [None, 0], ids=["beside a side network", "alone"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "lfm2"])
def test_with_lora_a_cache_changes_no_token_nor_does_padding(name, blocks, tokens):
    tuned = dial(name, blocks)
    how: Any = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    without = tuned.generate(tokens, use_cache=False, **how)
    assert torch.equal(tuned.generate(tokens, **how), without)
    if name == "lfm2":  # a convolution sees padding
        return
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    for beams in (1, 2):
        padded = tuned.generate(tokens, attention_mask=mask, num_beams=beams, **how)
        alone = tuned.generate(tokens[:1, 3:], num_beams=beams, **how)
        assert torch.equal(padded[:1, 11:], alone[:, 8:])


@pytest.mark.parametrize("blocks", [None, 0], ids=["beside a side network", "alone"])
def test_with_lora_recomputation_changes_no_gradient_and_saving_no_logit(blocks, tokens, tmp_path):
    tuned = dial("llama", blocks).train()

    def gradients() -> dict[str, torch.Tensor]:
        tuned.zero_grad()
        tuned(tokens, labels=tokens).loss.backward()
        return {n: p.grad.clone() for n, p in tuned.named_parameters() if p.requires_grad}

    kept = gradients()
    tuned.gradient_checkpointing_enable()
    recomputed = gradients()
    assert kept.keys() == recomputed.keys() == tuned.state_dict().keys()
    for name, gradient in kept.items():
        assert torch.equal(recomputed[name], gradient), name
        assert gradient.abs().max() > 0, name
    tuned.eval().save_pretrained(tmp_path / "side")
    again = QSTForCausalLM.from_pretrained(tmp_path / "side", backbone=tiny_model("llama"))
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, tuned(tokens).logits)
    assert (tmp_path / "side/peft/adapter_config.json").exists() == (blocks == 0)


def test_a_classifier_with_lora_trains_its_head_and_has_no_adapter(tokens, tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_config(tiny_model("llama").config)
    config = SideConfig(lora_layers=2, num_side_blocks=0)
    tuned = get_qst_model(base, config).train()
    tuned(tokens, labels=torch.tensor([0, 1])).loss.backward()
    assert tuned.model.side.score.weight.grad.abs().max() > 0
    tuned.save_pretrained(tmp_path)
    assert "no adapter for PEFT: a classifier's head" in (tmp_path / "README.md").read_text()
