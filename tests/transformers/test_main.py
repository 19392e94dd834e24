"""transformers' own server answers a chat request with a side network, on loopback."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.directories import side_network_directory

openai = pytest.importorskip("openai", reason="needs transformers[serving] and openai")
pytest.importorskip("uvicorn", reason="needs transformers[serving] and openai")
pytest.importorskip("fastapi", reason="needs transformers[serving] and openai")

pytestmark = pytest.mark.slow
PATIENCE_S = 240


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return side_network_directory(tmp_path)[0]


@pytest.fixture
def address(directory: Path, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "qst_tune.transformers", "serve", str(directory), "--host",
             "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=file, stderr=file,
            env={**os.environ, "HF_HOME": str(tmp_path / "no_cache"), "OMP_NUM_THREADS": "1"},
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
    address: str, directory: Path, tmp_path: Path
) -> None:
    client = openai.OpenAI(base_url=address, api_key="none", timeout=PATIENCE_S, max_retries=0)
    assert not (tmp_path / "no_cache/hub").exists()
    assert [model.id for model in client.models.list()] == [str(directory)]
    answer = client.chat.completions.create(
        model=str(directory), messages=[{"role": "user", "content": "what is it"}], max_tokens=5
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
