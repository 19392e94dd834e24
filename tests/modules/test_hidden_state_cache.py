"""States that were kept are those that would be computed, bit for bit, and no others are taken."""

import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from torchtune.generation import generate

from qst_tune.file_lock import locked
from qst_tune.models import qst_decoder
from qst_tune.modules import hidden_state_cache as module
from qst_tune.modules.hidden_state_cache import HiddenStateCache
from qst_tune.modules.qst_decoder import QSTDecoder
from tests.support.numbers import TINY_REDUCTION, random_tokens, randomize_, tiny_backbone

MODELS = {
    "default": {"num_side_blocks": 2},
    "a block for every layer": {"variant": "paper"},
    "authors": {"variant": "authors"},
    "one block": {"num_side_blocks": 1},
}


def tiny_model(kind: str = "default", dtype=torch.float32) -> QSTDecoder:
    torch.manual_seed(0)
    backbone = tiny_backbone(dtype=dtype)
    model = qst_decoder(backbone, reduction_factor=TINY_REDUCTION, **MODELS[kind])
    randomize_(model.side)
    return model


def pair(kind: str, directory: Path, dtype=torch.float32) -> tuple[QSTDecoder, QSTDecoder]:
    """The same model without a cache and with one."""
    plain, cached = tiny_model(kind, dtype), tiny_model(kind, dtype)
    cached.hidden_state_cache = HiddenStateCache(directory)
    return plain, cached


def outcome(model: QSTDecoder, tokens: torch.Tensor, **where) -> list[torch.Tensor]:
    """Logits, and the gradient of every trained parameter."""
    model.zero_grad()
    logits = model(tokens, **where)
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.side.parameters())]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def count_runs(model: QSTDecoder) -> list[nn.Module]:
    """Modules of the backbone in the order in which they run from now on."""
    ran: list[nn.Module] = []
    for layer in [*model.layers, model.norm]:
        layer.register_forward_hook(lambda this, args, out: ran.append(this))
    return ran


def block_diagonal(batch: int = 2, length: int = 11, first: int = 5) -> dict[str, torch.Tensor]:
    """Rows that are packs of two samples."""
    sample = (torch.arange(length) >= first).int()
    mask = (sample[:, None] == sample[None, :]) & torch.ones(length, length).tril().bool()
    positions = torch.cat([torch.arange(first), torch.arange(length - first)])
    return {
        "mask": mask.expand(batch, length, length).contiguous(),
        "input_pos": positions.expand(batch, length).contiguous(),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_kept_states_are_the_computed_ones_bit_for_bit(
    kind: str, dtype: torch.dtype, packed: bool, tmp_path: Path
) -> None:
    plain, cached = pair(kind, tmp_path / "cache", dtype)
    tokens, where = random_tokens(), block_diagonal() if packed else {}
    expected = outcome(plain, tokens, **where)
    ran = count_runs(cached)
    assert_equal(outcome(cached, tokens, **where), expected)
    assert len(ran) == len(cached.layers) + 1
    assert_equal(outcome(cached, tokens, **where), expected)
    assert len(ran) == len(cached.layers) + 1, "the backbone ran again"
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_states_belong_to_the_backbone_and_not_to_the_side_network(tmp_path: Path) -> None:
    plain, cached = pair("default", tmp_path)
    tokens = random_tokens()
    outcome(cached, tokens)
    randomize_(cached.side)
    plain.side.load_state_dict(cached.side.state_dict())
    assert_equal(outcome(cached, tokens), outcome(plain, tokens))


def test_preference_learning_reads_both_models_from_the_same_states(tmp_path: Path) -> None:
    plain, cached = pair("default", tmp_path)
    tokens = random_tokens()
    expected = [tensor.detach() for tensor in plain.with_reference(tokens)]
    for _ in range(2):
        assert_equal([tensor.detach() for tensor in cached.with_reference(tokens)], expected)


def changed(what: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A batch that differs in one thing."""
    torch.manual_seed(0)
    tokens, where = random_tokens(), block_diagonal()
    if what == "token":
        tokens[1, 3] = tokens[1, 3] % 60 + 1
    elif what == "mask":
        where["mask"][0, 7, 6] = False
    elif what == "position":
        where["input_pos"][1, 10] += 1
    elif what == "shape":
        tokens, where = tokens.flip(0), block_diagonal()
    elif what == "no mask":
        where.pop("mask")
    return tokens, where


@pytest.mark.parametrize("what", ["token", "mask", "position", "shape", "no mask"])
def test_another_batch_is_computed(what: str, tmp_path: Path) -> None:
    plain, cached = pair("default", tmp_path)
    tokens, where = changed("nothing")
    outcome(cached, tokens, **where)
    tokens, where = changed(what)
    assert_equal(outcome(cached, tokens, **where), outcome(plain, tokens, **where))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_packs_on_a_gpu_are_reported_apart_by_their_positions() -> None:
    """Their mask, a BlockMask, has no content to compare."""
    tokens = random_tokens()
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, 2, None, 11, 11, device="cpu")
    names = {
        module._digest_of_batch(
            tokens, mask=mask, input_pos=block_diagonal(first=first)["input_pos"]
        )
        for first in (4, 5, 5)
    }
    assert len(names) == 2


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_damaged_file_is_computed_and_written_anew(size: int, tmp_path: Path) -> None:
    plain, cached = pair("default", tmp_path)
    tokens = random_tokens()
    expected = outcome(plain, tokens)
    outcome(cached, tokens)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert_equal(outcome(cached, tokens), expected)
    assert path.read_bytes() == whole


def test_a_forward_that_was_cut_short_keeps_nothing(tmp_path: Path) -> None:
    _, cached = pair("default", tmp_path / "cache")

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    cached.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        cached(random_tokens())
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, cached = pair("default", tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(module.RESERVED_BYTES))
    monkeypatch.setattr(module.log, "propagate", True)
    for seed in range(3):
        torch.manual_seed(seed)
        tokens = random_tokens()
        assert_equal(outcome(cached, tokens), outcome(plain, tokens))
    assert not list(tmp_path.glob("*.safetensors"))
    assert caplog.text.count("no more hidden states are written") == 1
    assert "2 GiB" in caplog.text


def test_what_was_kept_before_the_disk_was_full_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, cached = pair("default", tmp_path)
    tokens = random_tokens()
    outcome(cached, tokens)
    ran = count_runs(cached)
    cached.hidden_state_cache.is_full = True
    outcome(cached, tokens)
    assert not ran


def test_generation_does_not_read_or_write_it(tmp_path: Path) -> None:
    plain, cached = pair("default", tmp_path / "cache")
    expected, _ = generate(plain.eval(), random_tokens(1, 4), max_generated_tokens=5, top_k=1)
    prompt = expected[:, :4]
    for model in (plain, cached):
        model.setup_caches(1, torch.float32, decoder_max_seq_len=12)
    results = [
        generate(model.eval(), prompt, max_generated_tokens=5, top_k=1)[0]
        for model in (plain, cached)
    ]
    assert torch.equal(*results)
    assert not (tmp_path / "cache").exists()


def test_no_memory_is_held_between_batches(tmp_path: Path) -> None:
    _, cached = pair("default", tmp_path)
    tokens = random_tokens()
    outcome(cached, tokens)
    assert set(vars(cached.hidden_state_cache)) == {"directory", "is_full", "is_tidy", "reported"}


def warned(caplog: pytest.LogCaptureFixture) -> int:
    """How often damage was logged; forgets it."""
    count = caplog.text.count("hidden states are computed anew: ")
    caplog.clear()
    return count


def test_every_byte_that_is_flipped_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All bytes of the header, and some of each state; one bit and all bits of a byte."""
    monkeypatch.setattr(module.log, "propagate", True)
    plain, cached = pair("one block", tmp_path)
    tokens = random_tokens(1, 3)
    expected = plain(tokens)
    cached(tokens)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) > header + 300
    for place in [*range(header), *range(header, len(whole), 13), len(whole) - 1]:
        for flip in (1 << place % 8, 255):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            assert torch.equal(cached(tokens), expected), place
            assert warned(caplog) == 1, place
            cached.hidden_state_cache.reported.clear()  # the same message would be logged once
            assert path.read_bytes() == whole


def test_states_that_were_shown_before_the_damage_are_not_shown_again(tmp_path: Path) -> None:
    plain, cached = pair("a block for every layer", tmp_path)
    tokens = random_tokens()
    expected = outcome(plain, tokens)
    outcome(cached, tokens)
    (path,) = tmp_path.glob("*.safetensors")
    whole = bytearray(path.read_bytes())
    for place in range(len(whole) - 1, len(whole) // 2, -len(whole) // 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_equal(outcome(cached, tokens), expected)


@pytest.mark.parametrize(
    "what", ["another version", "another batch", "another backbone", "fewer states", "no digests"]
)
def test_content_that_was_not_written_for_the_batch_is_found(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module.log, "propagate", True)
    plain, cached = pair("default", tmp_path / "mine")
    tokens = random_tokens()
    expected = outcome(plain, tokens)
    outcome(cached, tokens)
    (path,) = cached.hidden_state_cache.directory.glob("*.safetensors")
    if what == "another batch":
        outcome(cached, tokens.flip(1))
        (other,) = set(cached.hidden_state_cache.directory.glob("*.safetensors")) - {path}
        shutil.copy(other, path)
    elif what == "another backbone":
        other_model = tiny_model()
        randomize_(other_model.norm)
        other_model.hidden_state_cache = HiddenStateCache(tmp_path / "other")
        outcome(other_model, tokens)
        shutil.copy(tmp_path / "other" / path.name, path)
    elif what == "another version":
        path.unlink()
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.1")
            outcome(cached, tokens)
    else:
        with safe_open(path, "pt") as file:
            states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() if what == "fewer states" else None
        if what == "fewer states":
            states.pop("1")
        save_file(states, path, about)
    caplog.clear()
    assert_equal(outcome(cached, tokens), expected)
    assert warned(caplog) == 1
    assert_equal(outcome(cached, tokens), expected)
    assert warned(caplog) == 0


def test_the_lock_of_a_killed_writer_is_free_and_its_remains_are_cleared(tmp_path: Path) -> None:
    _, cached = pair("default", tmp_path)
    holds = (
        "import sys, time; from pathlib import Path; from qst_tune.file_lock import locked\n"
        "with locked(Path(sys.argv[1]), wait=True):\n"
        "    (Path(sys.argv[1]) / '.x.safetensors.1').write_bytes(b'half')\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "held\n"
        with locked(tmp_path, wait=False) as is_held:
            assert not is_held
        writer.kill()
    outcome(cached, random_tokens())
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".safetensors"}
    with locked(tmp_path, wait=False) as is_held:
        assert is_held


def test_two_writers_at_once_leave_whole_files(tmp_path: Path) -> None:
    plain, *writers = tiny_model(), *(pair("default", tmp_path)[1] for _ in range(2))
    batches = [random_tokens() for _ in range(4)]
    expected = [plain(tokens).detach() for tokens in batches]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            found = pool.map(lambda model: [model(tokens).detach() for tokens in batches], writers)
            for logits in found:
                assert_equal(logits, expected)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert len(list(tmp_path.iterdir())) == 5  # and the lock
    ran = count_runs(writers[0])
    assert_equal([writers[0](tokens).detach() for tokens in batches], expected)
    assert not ran


# Runs batches of another length each, all of them again and again, until it is killed.
_WRITER = """
import sys
from pathlib import Path
import torch
from tests.modules.test_hidden_state_cache import pair, random_tokens
_, cached = pair("default", Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for length in range(3, 40):
        torch.manual_seed(length)
        cached(random_tokens(2, length))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_only_whole_files(tmp_path: Path) -> None:
    plain, cached = pair("default", tmp_path)
    chance = random.Random(0)
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(chance.uniform(0.0, 0.5))
            writer.kill()
        ran = count_runs(cached)
        for length in range(3, 40):
            torch.manual_seed(length)
            tokens = random_tokens(2, length)
            assert torch.equal(cached(tokens), plain(tokens))
        assert not cached.hidden_state_cache.reported
        assert len(ran) < 37 * (len(cached.layers) + 1), "nothing was read"
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
