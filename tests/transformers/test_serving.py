"""transformers' own server answers a chat request with a side network, on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.directories import side_network_directory

openai = pytest.importorskip("openai", reason="needs transformers[serving] and openai")
pytest.importorskip("uvicorn", reason="needs transformers[serving] and openai")
pytest.importorskip("fastapi", reason="needs transformers[serving] and openai")

httpx = pytest.importorskip("httpx", reason="needs transformers[serving] and openai")

pytestmark = pytest.mark.slow
PATIENCE_S = 240
CONTEXT = 128  # positions of the tiny model


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def directory(root: Path) -> Path:
    return side_network_directory(root)[0]


@pytest.fixture(scope="module")
def address(directory: Path, root: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "qst_tune.transformers", "serve", str(directory), "--host",
             "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=file, stderr=file,
            env={**os.environ, "HF_HOME": str(root / "no_cache"), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()


def test_a_chat_request_is_answered_by_the_model_that_is_listed(
    address: str, directory: Path, root: Path
) -> None:
    client = openai.OpenAI(base_url=address, api_key="none", timeout=PATIENCE_S, max_retries=0)
    assert not (root / "no_cache/hub").exists()
    assert [model.id for model in client.models.list()] == [str(directory)]
    answer = client.chat.completions.create(
        model=str(directory), messages=[{"role": "user", "content": "what is it"}], max_tokens=5
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content


def post(address: str, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = httpx.post(f"{address.removesuffix('/v1')}{path}", json=body, timeout=PATIENCE_S)
    return answer.status_code, answer.json()


def question(directory: Path, words: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "x " * words}]
    never = '{"eos_token_id": 319}'
    return {"model": str(directory), "messages": messages, "generation_config": never, **more}


@pytest.mark.parametrize("max_tokens", [60, None])
def test_an_answer_that_reaches_the_contexts_end_has_the_reason_length(
    address: str, directory: Path, max_tokens: int | None
) -> None:
    status, answer = post(
        address, "/v1/chat/completions", **question(directory, 50, max_tokens=max_tokens)
    )
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == CONTEXT
    assert answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_gets_both_numbers(
    address: str, directory: Path, stream: bool
) -> None:
    status, answer = post(
        address, "/v1/chat/completions", **question(directory, 200, stream=stream)
    )
    assert status == 400
    assert answer["detail"] == "the prompt has 410 tokens, and the model's context 128: shorten it"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"content": "no role"}]},
        {"messages": "text"},
        {"messages": [{"role": "user", "content": [{"no": "type"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"},
        {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0},
        {"messages": [{"role": "user", "content": "x"}], "generation_config": "{"},
        {},
    ],
)
def test_a_malformed_request_is_the_askers_mistake(
    address: str, directory: Path, body: dict[str, Any]
) -> None:
    status, answer = post(address, "/v1/chat/completions", model=str(directory), **body)
    assert status == 400, answer


def test_a_body_that_is_no_json_is_the_askers_mistake(address: str) -> None:
    json = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/chat/completions", content=b"{", headers=json)
    assert answer.status_code == 400


def test_another_model_is_not_loaded(address: str, directory: Path, root: Path) -> None:
    other = str(root / "model")
    assert post(address, "/load_model", model=other)[0] == 400
    assert post(address, "/v1/chat/completions", **question(Path(other), 5))[0] == 400


def test_a_foreign_host_is_refused_on_loopback(address: str) -> None:
    models = f"{address}/models"
    assert httpx.get(models, headers={"host": "evil.example"}).status_code == 400
    port = address.split(":")[-1].removesuffix("/v1")
    assert httpx.get(models, headers={"host": f"localhost:{port}"}).status_code == 200
