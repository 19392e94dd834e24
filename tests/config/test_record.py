"""What a run writes of its config: no secret, nothing of the environment."""

import pytest
from omegaconf import OmegaConf

from qst_tune.config.record import recorded, secret_keys


def test_references_to_keys_are_followed_and_those_to_the_environment_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WHERE", "/private")
    monkeypatch.setenv("COUNT", "3")
    raw = OmegaConf.create(
        {
            "cache": "${oc.env:WHERE}/cache",
            "output_dir": "${cache}/run",
            "rows": [{"path": "${output_dir}/x", "number": "${number}"}],
            "number": 3,
            "nested": {"copy": "${rows}", "first": "${rows.0.number}"},
            "default": "${oc.decode:${oc.env:WHERE,null}}",
            "count": "${oc.decode:${oc.env:COUNT}}",
        }
    )
    rows = [{"path": "${oc.env:WHERE}/cache/run/x", "number": 3}]
    assert recorded(raw) == {
        "cache": "${oc.env:WHERE}/cache",
        "output_dir": "${oc.env:WHERE}/cache/run",
        "rows": rows,
        "number": 3,
        "nested": {"copy": rows, "first": 3},
        "default": "${oc.decode:${oc.env:WHERE,null}}",
        "count": 3,  # a number tells nothing, and a resumed run compares it
    }


@pytest.mark.parametrize(
    "key",
    [
        "token", "hf_token", "use_auth_token", "access_token", "api_key", "API_KEY", "key", "keys",
        "password", "db_password", "secret", "client_secret", "credentials",
        "aws_secret_access_key",
    ],
)  # fmt: skip
def test_a_secret_is_left_out_wherever_it_stands(key: str) -> None:
    copies = {"url": f"https://x?${{mine.{key}}}", "also": f"${{mine.{key}}}"}
    raw = OmegaConf.create(
        {
            "mine": {key: "abc"},
            "dataset": [{key: "abc", **copies}],
            "indirect": {key: f"${{mine.{key}}}"},
        }
    )
    assert "abc" not in str(recorded(raw))
    assert secret_keys(raw) == [f"mine.{key}", f"dataset[0].{key}"]
    assert recorded(raw)["dataset"] == [copies]


def test_a_secret_of_the_environment_stays_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "abc")
    raw = OmegaConf.create({"dataset": {"token": "${oc.env:TOKEN}"}})
    assert recorded(raw) == {"dataset": {"token": "${oc.env:TOKEN}"}}
    assert secret_keys(raw) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token": "<pad>", "eos_token": "</s>", "max_new_tokens": 3, "stop_tokens": ["x"]},
        {"token": None, "key": 3, "keyword": "x", "tokenizer": "y", "monkey": "z"},
    ],
)
def test_what_is_no_secret_stays(settings: dict[str, object]) -> None:
    assert recorded(OmegaConf.create(settings)) == settings
