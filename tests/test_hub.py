"""A node fetches what its ranks share from a stand-in for the hub, and the ranks ask for nothing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import hub_server
from support.models import gpt_neo

from clippy_train.config import TrainConfig
from clippy_train.launch.hub import OFFLINE, fetch_bases
from clippy_train.tokenizer import END_OF_TEXT

BASE = ["model.base=me/base", "tokenizer.base=null"]
Make = Callable[..., TrainConfig]


@pytest.fixture
def hub(tiny_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        constants = {
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
        }
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        base = shutil.copytree(tiny_tokenizer, tmp_path / "base")
        gpt_neo().save_pretrained(base)
        files = {path.name: path.read_bytes() for path in base.iterdir()}
        files |= {"flax_model.msgpack": b"not needed", "pytorch_model.bin": b"the same"}
        hub.repositories["me/base"] = {"private": False, "files": files}
        yield hub


def downloads(hub: hub_server.Hub) -> list[str]:
    return sorted(each.rpartition("/")[2] for each in hub.requests if each.startswith("GET") and "/resolve/" in each)


@pytest.mark.processes
def test_a_base_is_fetched_once_and_then_read_without_the_hub(
    hub: hub_server.Hub, train_config: Make, tmp_path: Path
) -> None:
    config = train_config(*BASE, f"run.root={tmp_path}")
    assert fetch_bases(config) == OFFLINE
    files = hub.repositories["me/base"]["files"]
    expected = sorted(name for name in files if name.endswith((".json", ".safetensors")))
    assert downloads(hub) == expected
    assert fetch_bases(config) == OFFLINE
    assert downloads(hub) == expected
    asked = len(hub.requests)
    load = "from clippy_train.model.load import *; load_model('me/base'); print(load_tokenizer('me/base').eos_token)"
    variables = {**os.environ, **OFFLINE, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert subprocess.check_output([sys.executable, "-c", load], text=True, env=variables).split() == [END_OF_TEXT]
    assert len(hub.requests) == asked


def test_old_weights_are_fetched_where_there_are_no_others(
    hub: hub_server.Hub, train_config: Make, tmp_path: Path
) -> None:
    del hub.repositories["me/base"]["files"]["model.safetensors"]
    assert fetch_bases(train_config(*BASE, f"run.root={tmp_path}")) == OFFLINE
    assert "pytorch_model.bin" in downloads(hub)


def test_ranks_ask_for_what_a_tokenizer_alone_has_not(hub: hub_server.Hub, train_config: Make, tmp_path: Path) -> None:
    del hub.repositories["me/base"]["files"]["config.json"]
    assert fetch_bases(train_config("tokenizer.base=me/base", f"run.root={tmp_path}")) == {}


@pytest.mark.parametrize(
    "data",
    [
        ["data.path=hf://datasets/me/code/{split}.jsonl"],
        ["data.path=null", "data.sources=[{path:somewhere},{hub:me/code}]"],
    ],
    ids=["corpus", "mixture"],
)
def test_ranks_stay_online_where_the_data_are_on_the_hub(
    hub: hub_server.Hub, train_config: Make, tmp_path: Path, data: list[str]
) -> None:
    assert fetch_bases(train_config(*BASE, *data, f"run.root={tmp_path}")) == {}
    assert "model.safetensors" in downloads(hub)


def test_a_folder_and_a_run_that_resumes_need_no_hub(hub: hub_server.Hub, train_config: Make, tmp_path: Path) -> None:
    assert fetch_bases(train_config(f"run.root={tmp_path}")) == {}
    config = train_config(*BASE, f"run.root={tmp_path}", "run.name=resumed")
    (config.run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert fetch_bases(config) == {}
    assert hub.requests == []


def test_what_cannot_be_fetched_is_left_to_the_ranks(
    hub: hub_server.Hub, train_config: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.repositories.clear()
    assert fetch_bases(train_config(*BASE, f"run.root={tmp_path}")) == {}
    assert "me/base could not be fetched from the hub" in caplog.text
