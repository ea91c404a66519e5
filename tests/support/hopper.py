"""Inductor's kernels for an H100, compiled by Triton without one: a driver that answers as an H100 and runs nothing.

Started by `support.cuda_guard`.
"""

import importlib
import json
import os
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}

import numpy as np
import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.fx_passes.joint_graph
import torch._inductor.fx_passes.post_grad
import torch.cuda.random
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GPTNeoForCausalLM

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.model.build import gpt_neo_config
from clippy_train.train.module import CodeLM
from support.fake_cuda import EOS, SHAPE, VOCAB_SIZE, move_to_cuda

# By name, because a torch without CUDA does not install it.
triton, compiler = map(importlib.import_module, ("triton", "triton.backends.compiler"))

H100 = {
    "name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30,
    "warp_size": 32, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536, "shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472, "L2_cache_size": 50 << 20, "gcnArchName": "", "clock_rate": 1980000,
    "memory_clock_rate": 2619000, "memory_bus_width": 5120, "uuid": "", "is_integrated": 0, "is_multi_gpu_board": 0,
}  # fmt: skip
NOTHING_TO_RUN_ON = "PyTorch compiled without support for the specified device"  # all is built when the first one runs
CAPABILITY = (H100["major"], H100["minor"])


class Driver:
    """Triton's view of the GPU."""

    binary_ext = "cubin"
    launcher_cls = staticmethod(lambda *args, **kwargs: None)
    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32,
            "sm_clock_rate": 1, "mem_clock_rate": 1, "mem_bus_width": 1,
        },
        load_binary=lambda *args: (0, 0, 0, 0, 1024),
    )  # fmt: skip

    def get_current_target(self) -> Any:
        return compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, *args: Any) -> Any:
        return CAPABILITY

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_benchmarker(self) -> Any:
        return lambda *args, **kwargs: [1.0]

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def pretend(kernels: list[str]) -> None:
    """Make torch, Inductor and Triton believe in the GPU; the name of each kernel that is compiled joins `kernels`."""
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "get_compute_capability": 90, "get_raw_stream": 0, "is_available": True,
        "device_count": 1, "current_device": 0, "get_device_properties": SimpleNamespace(**H100),
        "get_device_capability": CAPABILITY, "get_device_name": H100["name"], "_lazy_init": None, "set_device": None,
        "is_initialized": True, "synchronize": None, "set_rng_state": None, "get_rng_state_all": [],
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "is_bf16_supported": True, "_exchange_device": 0,
        "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        for holder in (cuda, CudaInterface, CudaInterface.Worker):  # the last two hold the functions themselves
            setattr(holder, name, staticmethod(lambda *args, answer=answer, **kwargs: answer))
    internal: Any = torch._C
    for name in ("GetDevice", "GetCurrentRawStream", "ExchangeDevice", "MaybeExchangeDevice", "SetDevice"):
        method = "_cuda_" + name[0].lower() + name[1:]
        setattr(internal, method, lambda *args: 0)
    internal._cuda_getDeviceCount, internal._cuda_isInBadFork = (lambda: 1), (lambda: False)
    cuda.random._lazy_init = lambda: None
    cuda.amp.common.amp_definitely_not_available = lambda: False
    version: Any = torch.version
    version.cuda = "13.0"
    triton.runtime.driver.set_active(Driver())

    def launchers(tuner: Any) -> None:
        kernels.append(tuner.fn.__name__)
        tuner.launchers = [lambda *args, **kwargs: None]

    autotuner: Any = triton_heuristics.CachingAutotuner
    autotuner._make_launchers = launchers
    triton_helpers.set_driver_to_gpu = lambda: None
    inductor: Any = torch._inductor.config
    inductor.pattern_matcher = inductor.joint_graph_constant_folding = inductor.fx_graph_cache = False
    inductor.autotune_local_cache, inductor.compile_threads = False, 1
    torch._inductor.fx_passes.joint_graph.lazy_init = lambda *args, **kwargs: None  # it runs patterns on real tensors
    torch._inductor.fx_passes.post_grad.lazy_init = lambda *args, **kwargs: None
    torch._functorch.config.force_non_lazy_backward_lowering = True


def compiled_kernels(kernel: str) -> dict[str, Any]:
    """Kernels of the forward and backward pass with `model.compile=true`, and the traceback of a failure to build."""
    kernels: list[str] = []
    error = ""
    pretend(kernels)
    config = compose(TrainConfig, [*SHAPE, "model.compile=true", f"model.attention={kernel}"])
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = GPTNeoForCausalLM(gpt_neo_config(config.model, vocab_size=VOCAB_SIZE, eos_token_id=EOS))
            module = CodeLM(config, model, np.ones(VOCAB_SIZE, dtype=np.int32))
            move_to_cuda(module, torch.float32)
            ids = torch.randint(EOS, (2, config.data.seq_len)).to("cuda")
            with torch.autocast("cuda", torch.bfloat16):
                loss = module.training_step({"input_ids": ids}, 0)
            loss.backward()
    except Exception as failure:
        if NOTHING_TO_RUN_ON not in str(failure):
            error = traceback.format_exc()
    return {"kernels": kernels, "error": error}


def main(out: Path, kernel: str) -> None:
    out.write_text(json.dumps(compiled_kernels(kernel)))
