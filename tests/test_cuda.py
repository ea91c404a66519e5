"""The step runs on CUDA as far as fake tensors show it: no mixed devices or dtypes, and the host never waits."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cuda_guard
from support.fake_cuda import CASES, FAULTS, Outcome

pytestmark = pytest.mark.processes

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.version.cuda:
        pytest.skip("this torch has a CUDA device guard of its own")
    try:
        return cuda_guard.build_guard(tmp_path_factory.mktemp("guard"))
    except FileNotFoundError as error:
        pytest.skip(f"fake CUDA tensors need a device guard, which is compiled: {error}")


@pytest.fixture(scope="module")
def outcomes(guard: Path) -> dict[str, Outcome]:
    return {case: Outcome(**found) for case, found in in_process(guard).items()}


def in_process(guard: Path, *arguments: str) -> dict[str, Any]:
    out = guard.with_name("found.json")
    command = [sys.executable, cuda_guard.__file__, str(guard), str(out), *arguments]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    caches = {name: str(guard.parent) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    subprocess.run(command, env={**os.environ, **caches, "PYTHONPATH": path}, check=True, timeout=200)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_mixes_no_devices_and_never_waits_for_the_gpu(outcomes: dict[str, Outcome], case: str) -> None:
    found = outcomes[case]
    assert not found.error, found.error
    assert found.wrong == []
    assert found.waits == []


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_wait_or_fail_is_noticed(outcomes: dict[str, Outcome], fault: str) -> None:
    found = outcomes[fault]
    assert bool(found.waits) == (not fault.startswith("mixes"))
    assert found.error or found.waits or found.wrong


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flex"])
def test_a_compiled_step_has_kernels_for_an_h100(guard: Path, kernel: str) -> None:
    """Built by Triton for sm_90 and never run."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("kernels for a GPU need triton, which a torch without CUDA does not install")
    found = in_process(guard, kernel)
    assert not found["error"], found["error"]
    assert len(found["kernels"]) > 20
    fused = [name for name in found["kernels"] if "flex_attention" in name]
    assert bool(fused) == (kernel == "flex")
    assert any("backward" in name for name in fused) == (kernel == "flex")
