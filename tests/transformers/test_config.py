"""Where the backbone of a side network is: here, or on the hub if the user asks for that."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import qst_tune.transformers
from qst_tune.errors import UserError
from qst_tune.transformers.config import backbone_directory
from tests.support.fake_hub import FakeHub, serving, use

REPO = "some-org/Tiny-1.5B"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(tmp_path / "served") as fake:
        (fake.root / REPO).mkdir(parents=True)
        (fake.root / REPO / "config.json").write_text("{}")
        use(monkeypatch, fake.url, tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        yield fake


def test_what_a_directory_names_is_downloaded_only_if_that_is_allowed(
    hub: FakeHub, tmp_path: Path
) -> None:
    message = rf"names the backbone {REPO}, .* allow_download=True .* or run hf download {REPO}"
    with pytest.raises(UserError, match=message):
        backbone_directory(REPO, tmp_path, "config", allow_download=False)
    assert not (tmp_path / "home").exists() or not any((tmp_path / "home").rglob("config.json"))
    fetched = backbone_directory(REPO, tmp_path, "config", allow_download=True)
    assert (fetched / "config.json").is_file()
    assert backbone_directory(REPO, tmp_path, "config", allow_download=False) == fetched


def test_the_command_has_the_revision(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"hf download {REPO} --revision v1$"):
        backbone_directory(f"{REPO}@v1", tmp_path, "config", allow_download=False)


def test_a_directory_here_goes_first_also_one_beside_the_side_network(tmp_path: Path) -> None:
    side, base = tmp_path / "side", tmp_path / "side" / "some-org" / "base"
    base.mkdir(parents=True)
    assert backbone_directory(str(base), side, allow_download=False) == base
    assert backbone_directory("some-org/base", side, allow_download=False) == base
    with pytest.raises(UserError, match="is no directory here and no name on the Hugging Face Hub"):
        backbone_directory("/nowhere", side, allow_download=True)


@pytest.mark.parametrize("given", [{}, {"allow_download": True}, {"backbone": REPO}])
def test_tokenizer_and_model_hand_the_permission_on(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "qst", "backbone": REPO}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked: list[bool] = []

    def asks(*args: Any, allow_download: bool, **settings: Any) -> Path:
        asked.append(allow_download)
        raise UserError("asked")

    for module in ("tokenizer", "pretrained"):
        monkeypatch.setattr(f"qst_tune.transformers.{module}.backbone_directory", asks)
    for auto in (AutoTokenizer, qst_tune.transformers.QSTForCausalLM):
        with pytest.raises(UserError, match="asked"):
            auto.from_pretrained(str(tmp_path), **given)
    assert asked == [bool(given)] * 2
