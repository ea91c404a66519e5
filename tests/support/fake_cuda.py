"""Steps on a CUDA device that is not there: fake tensors have a device, a shape and a dtype, but no values.

Operations that mix devices or dtypes fail as they would on a GPU, and those for which the host would wait are recorded.
Started by `support.cuda_guard`.
"""

import json
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoForCausalLM

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.data.batches import Batch
from clippy_train.model import attention
from clippy_train.model.build import gpt_neo_config, recompute_activations
from clippy_train.model.score import new_sums
from clippy_train.optim import build_optimizer, clip_grad_norm
from clippy_train.train.callbacks.health import NEVER, Health
from clippy_train.train.module import CodeLM

VOCAB_SIZE, EOS = 50261, 50256
PRECISIONS = ("fp32", "autocast", "bf16")
CASES: dict[str, tuple[str, str, list[str]]] = {
    **{
        f"{kernel}-{precision}": (kernel, precision, [])
        for kernel in ("sdpa", "varlen", "flex", "eager")
        for precision in PRECISIONS
    },
    "sdpa-documents": ("sdpa", "autocast", ["data.document_mask=true"]),
    "varlen-documents": ("varlen", "autocast", ["data.document_mask=true"]),
    "varlen-recomputed": ("varlen", "autocast", ["model.checkpoint_activations=true"]),
    "varlen-rounded": ("varlen", "autocast", ["model.loss_dtype=bf16"]),
    "sdpa-adafactor": ("sdpa", "autocast", ["optim=adafactor"]),
}
PRODUCTS = ("aten.mm", "aten.mm.out", "aten.addmm", "aten.bmm", "aten.baddbmm", "torch_attn._varlen_attn")
FAULTS: dict[str, Callable[[Tensor], object]] = {
    "reads a value": lambda x: x.sum().item(),
    "counts": lambda x: x.nonzero(),
    "copies to the host": lambda x: x.cpu(),
    "mixes devices": lambda x: x + torch.ones(3),
    "mixes dtypes": lambda x: x @ x.bfloat16(),
}
SHAPE = [
    "experiment=code_clippy_125m", "model.base=null", "tokenizer.base=unused", "model.num_layers=2",
    "trainer.accelerator=cuda", "trainer.precision=bf16", "trainer.num_nodes=1", "trainer.devices=1", "strategy=single",
]  # fmt: skip


@dataclass
class Outcome:
    """
    Attributes:
        error: a traceback; empty if there was none.
        waits: operations for which the host would wait for the GPU, with the project's line that runs them.
        wrong: results on another device or of another dtype than expected.
    """

    error: str = ""
    waits: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def expect(self, name: str, tensor: Tensor | None, dtype: torch.dtype) -> None:
        found = tensor if tensor is None else (tensor.device.type, tensor.dtype)
        if found != ("cuda", dtype):
            self.wrong.append(f"{name} is {found}, not {dtype} on cuda")


class Recording(TorchDispatchMode):
    """Records what reads a value of a tensor on the GPU, and products of several dtypes, which fake tensors allow."""

    supports_higher_order_operators = True

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.outcome = outcome

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # FlexAttention is compiled also where nothing else is

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        on_gpu = any(isinstance(each, Tensor) and each.is_cuda for each in args)
        to_host = "device" in kwargs and torch.device(kwargs["device"] or "cuda").type == "cpu"
        if on_gpu and ("local_scalar" in str(func) or "nonzero" in str(func) or to_host):
            ours = [each for each in traceback.extract_stack() if "clippy_train/" in each.filename]
            self.outcome.waits.append(
                f"{func} at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else str(func)
            )
        dtypes = {each.dtype for each in args if isinstance(each, Tensor) and each.is_floating_point()}
        if str(func).removesuffix(".default") in PRODUCTS and len(dtypes) > 1:
            self.outcome.wrong.append(f"{func} of {sorted(map(str, dtypes))}")
        return func(*args, **kwargs)


def move_to_cuda(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace all parameters and buffers; `Module.to` cannot change the device of a fake tensor."""
    moved: dict[int, nn.Parameter] = {}  # a tied parameter stays tied
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                new = nn.Parameter(torch.empty(parameter.shape, device="cuda", dtype=dtype))
                each._parameters[name] = moved.setdefault(id(parameter), new)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty(buffer.shape, device="cuda", dtype=buffer.dtype)


def steps(module: CodeLM, batch: Batch, autocast: AbstractContextManager[Any], outcome: Outcome) -> None:
    """What a rank does with the batch between two logged steps and before a checkpoint, once it is on the GPU."""
    parameters = dict(module.model.named_parameters())
    optimizer, health = build_optimizer(module.model, module.config.optim), Health(1, [[""]], module.config.data)
    health._first_bad = {name: torch.full((), NEVER) for name in health._first_bad}  # a fake `torch.tensor` has a value
    for _ in range(2):
        with autocast:
            loss = module.training_step(batch, 0)
        outcome.expect("loss", loss, torch.float32)
        loss.backward()
        for name, parameter in parameters.items():
            outcome.expect(f"gradient of {name}", parameter.grad, parameter.dtype)
        norm = clip_grad_norm(parameters.values(), module.config.optim.grad_clip)
        outcome.expect("norm", norm, torch.float64)
        optimizer.step()
        health._look_at("loss", loss.detach(), norm.device)
        health._look_at("norm", norm, norm.device)
    with autocast, torch.no_grad():
        module.validation_step(batch, 0)
    outcome.expect("validation sums", module.val_sums, torch.float64)
    extremes = [extreme for each in parameters.values() for extreme in torch.aminmax(each.detach())]
    outcome.expect("finiteness", torch.stack(extremes).isfinite().all(), torch.bool)
    outcome.expect("hashes", torch.stack([torch.hash_tensor(each) for each in parameters.values()]), torch.uint64)


def run_case(kernel: str, precision: str, overrides: list[str]) -> Outcome:
    outcome, fake = Outcome(), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        config = compose(TrainConfig, [*SHAPE, *overrides])
        config.model.attention = kernel  # also where the configuration would refuse the precision
        with fake:
            model = GPTNeoForCausalLM(gpt_neo_config(config.model, vocab_size=VOCAB_SIZE, eos_token_id=EOS))
            if config.model.checkpoint_activations:
                recompute_activations(model)
            module = CodeLM(config, model, np.ones(VOCAB_SIZE, dtype=np.int32))
            move_to_cuda(module, torch.bfloat16 if precision == "bf16" else torch.float32)
            module.val_sums = new_sums(1, "cuda")
        ids = torch.randint(EOS, (2, config.data.seq_len))
        ids[0, 5::300] = EOS
        batch = module.on_before_batch_transfer({"input_ids": ids, "group": torch.ones_like(ids)}, 0)
        with fake, Recording(outcome):
            on_gpu = {name: fake.from_tensor(each).to("cuda", non_blocking=True) for name, each in batch.items()}
            steps(module, on_gpu, torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"), outcome)
    except Exception:
        outcome.error = traceback.format_exc()
    return outcome


def run_fault(name: str) -> Outcome:
    """What the recording makes of a step that is wrong on a GPU."""
    outcome, fake = Outcome(), FakeTensorMode()
    try:
        with fake, Recording(outcome):
            FAULTS[name](torch.ones(3, 3, device="cuda"))
    except Exception:
        outcome.error = traceback.format_exc()
    return outcome


def main(out: Path) -> None:
    """Write what was found, by case."""
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda._lazy_init = lambda: None
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda new_state, device="cuda": None
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    make = torch.tensor

    def fake_tensor(data: Any, **kwargs: Any) -> Tensor:  # Hugging Face's attention makes a constant so
        on_gpu = isinstance(data, float) and torch.device(kwargs.get("device") or "cpu").type == "cuda"
        return torch.full((), data, **kwargs) if on_gpu else make(data, **kwargs)

    torch.tensor = fake_tensor  # type: ignore[assignment]
    amp: Any = torch.cuda.amp.common
    amp.amp_definitely_not_available = lambda: False
    ours: Any = attention
    ours.compiled_flex = lambda: flex.flex_attention  # its compiled form needs a GPU
    found = {name: run_case(*case) for name, case in CASES.items()} | {name: run_fault(name) for name in FAULTS}
    out.write_text(json.dumps({name: asdict(outcome) for name, outcome in found.items()}))
