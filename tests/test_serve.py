"""An exported folder behind `transformers serve` completes code for an editor's client."""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import processes
from support.models import base_folder, small_bpe
from support.runs import environment

from clippy_train.config import GenerateConfig
from clippy_train.generate import generate

WHY = "pip install 'transformers[serving]' runs this test"
PROMPT = "def greet(name):\n"


@pytest.fixture(scope="module")
def openai() -> ModuleType:
    for name in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(name, reason=WHY)
    found: ModuleType = pytest.importorskip("openai", reason=WHY)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("model"), small_bpe(), seed=12)  # writes ASCII


@pytest.fixture
def client(openai: ModuleType, model: Path, tmp_path: Path) -> Any:
    """A client of a server that has loaded the model."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        str(model),
        "--port",
        port,
        "--device",
        "cpu",
    ]
    log = tmp_path / "log"
    variables = environment(tmp_path)
    with log.open("w") as output:
        server = processes.start(command, cwd=tmp_path, env=variables, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://localhost:{port}"
    deadline = time.monotonic() + 120
    while not _answers(f"{url}/health"):
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=1).status == 200)
    except OSError:
        return False


@pytest.mark.processes
@pytest.mark.slow
def test_an_editors_client_gets_the_completion_of_clippy_generate(client: Any, model: Path) -> None:
    config = GenerateConfig(model=str(model), prompt=PROMPT, max_new_tokens=12, stop="none")
    (expected,) = generate(config, PROMPT)
    asked: dict[str, Any] = {"model": str(model), "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == expected
    assert whole.usage.completion_tokens == 12
    pieces = [each.choices[0].text for each in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1
    stop = expected[3:5]
    ended = client.completions.create(**asked, stop=[stop])
    assert ended.choices[0].text.startswith(expected[: expected.index(stop)])
    assert len(ended.choices[0].text) < len(expected)
    assert ended.choices[0].finish_reason == "stop"
