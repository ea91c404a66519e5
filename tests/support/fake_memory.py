"""Memory of a rank on a GPU without one: an optimizer step on fake tensors, which have sizes but no values.

The project's module and configuration run under the real DeepSpeed engine, or torch's DDP, as a rank among fake ones.
Counted are the bytes of all storages that are alive at once. What only a GPU has is missing: the CUDA context, NCCL's
buffers, workspaces inside of kernels, fragmentation. Activations are those of uncompiled code.
"""

import io
import logging
import traceback
import warnings
import weakref
from collections import Counter
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as flex
from torch.nn.parallel import DistributedDataParallel, distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoForCausalLM

from clippy_train.config import TrainConfig
from clippy_train.model import loss
from clippy_train.model.build import gpt_neo_config, recompute_activations
from clippy_train.optim import build_optimizer, clip_grad_norm
from clippy_train.train.module import CodeLM
from clippy_train.train.strategy import deepspeed_config
from support.fake_ranks import run_as

EOS = 50256
TIMEOUT = 500  # seconds
PHASES = ("forward", "backward", "update", "validation")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made under it, and answers what would be read from them.

    Attributes:
        now: bytes alive.
        peaks: the most that was alive, by `phase`.
        reads: how often a value was read, for which the host would wait, by `phase`.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.now, self.phase = 0, ""
        self.peaks: dict[str, int] = {}
        self.reads = Counter[str]()
        self._sizes: dict[int, int] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # FlexAttention is compiled also where nothing else is

    def enter(self, phase: str) -> None:
        self.phase = phase
        self._note(0)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads[self.phase] += not _in_adam()
            return 1.0 if args[0].is_floating_point() else 0  # a finite norm, no overflow
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device.type != "meta":
                self._see(each.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        self._note(size - self._sizes.get(key, 0))  # some grow in place
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        self._note(-self._sizes.pop(key))

    def _note(self, change: int) -> None:
        self.now += change
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)


def _in_adam() -> bool:
    """Whether AdamW reads its counter of steps, which is in host memory on every device."""
    return any("/torch/optim/" in frame.filename for frame in traceback.extract_stack(limit=8))


class Torch:
    """The part of a DeepSpeed engine's interface that `_phases` uses, for strategies without DeepSpeed."""

    def __init__(self, module: CodeLM) -> None:
        self.config = module.config
        self.optimizer = build_optimizer(module.model, self.config.optim)
        for group in self.optimizer.param_groups:
            group["foreach"] = True  # the default on CUDA
        self.module: Any = module
        if self.config.strategy.name == "ddp":
            self.module = DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)
            self.module.reducer = NoRebuild(self.module.reducer)
        self.micro_step = 0

    @property
    def ends_step(self) -> bool:
        return (self.micro_step + 1) % self.config.micro_steps == 0

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        with _autocast(self.config):
            result: Tensor = self.module(batch)
        return result

    def backward(self, result: Tensor) -> None:
        if self.micro_step % self.config.micro_steps == 0:
            self.optimizer.zero_grad()  # where Lightning does it: after the forward pass
        sends = self.ends_step or self.config.strategy.name == "single"
        with nullcontext() if sends else self.module.no_sync():
            result.backward()

    def step(self) -> None:
        if self.ends_step:
            clip_grad_norm(self.module.parameters(), 1.0)
            self.optimizer.step()
        self.micro_step += 1


class NoRebuild:
    """DDP's reducer, except that it never changes its buckets, for which it reads the memory of fake tensors."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)


class FakeCodeLM(CodeLM):
    """A module whose `forward` is its loss, as the strategies' wrappers call it."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(self._mean_loss if torch.is_grad_enabled() else self._token_losses, batch)

    def _apply(self, fn: Any, recurse: bool = True) -> "FakeCodeLM":
        return self  # it has its device and types already, and fake tensors cannot be exchanged


class Tracked(NamedTuple):
    """What a rank holds and reads in a forward and a backward pass, in an update and in a validation.

    Attributes:
        peaks: the most bytes at once.
        reads: values, for which the host would wait for the GPU, in one step.
    """

    peaks: dict[str, int]
    reads: dict[str, int]


def track(config: TrainConfig, vocab_size: int) -> Tracked:
    return run_as(lambda group: _phases(config, vocab_size), 0, config.world_size, TIMEOUT)


def _phases(config: TrainConfig, vocab_size: int) -> Tracked:
    _imitate_cuda()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        engine, module = _build(config, vocab_size)
        _validate(engine, module.config, live)  # as a new run does: ZeRO-3's order of modules follows from it
        batch = _batch(config, config.trainer.micro_batch_size)
        for number in range(2 * config.micro_steps):  # from the second step on, all states exist
            if number == config.micro_steps:
                live.reads.clear()
            live.enter("forward")
            result = engine(batch)
            live.enter("backward")
            engine.backward(result)
            del result
            live.enter("update")
            engine.step()
        reads = dict(live.reads)
        _validate(engine, module.config, live)
    return Tracked({phase: live.peaks[phase] for phase in PHASES}, reads)


def _validate(engine: Any, config: TrainConfig, live: LiveBytes) -> None:
    live.enter("validation")
    with torch.no_grad(), _autocast(config):
        engine(_batch(config, config.trainer.eval_micro_batch_size))
    live.enter("")


def _imitate_cuda() -> None:
    """What differs from a CPU, and what asks fake tensors for their memory."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    deepspeed.ops.__compatible_ops__ = {}  # as for ranks without a GPU: one would compile for half a minute
    loss.CHUNK["cpu"] = loss.CHUNK["cuda"]
    flex._validate_device = lambda *args: None  # no backward pass on a CPU
    distributed._verify_param_shape_across_processes = lambda *args: None  # type: ignore[attr-defined]
    distributed._sync_module_states = lambda *args, **kwargs: None  # type: ignore[attr-defined]


def _build(config: TrainConfig, vocab_size: int) -> tuple[Any, FakeCodeLM]:
    low = config.deepspeed and config.trainer.precision == "bf16"
    torch.set_default_dtype(torch.bfloat16 if low else torch.float32)
    model = GPTNeoForCausalLM(gpt_neo_config(config.model, vocab_size=vocab_size, eos_token_id=EOS))
    torch.set_default_dtype(torch.float32)
    if config.model.checkpoint_activations:
        recompute_activations(model)
    module = FakeCodeLM(config, model, np.ones(vocab_size, dtype=np.int32))
    if not config.deepspeed:
        return Torch(module), module
    settings = deepspeed_config(config) | {"gradient_accumulation_steps": config.micro_steps}
    optimizer = build_optimizer(model, config.optim)
    with redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine, module


def _batch(config: TrainConfig, size: int) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(size, config.data.seq_len, dtype=torch.int64)}


def _autocast(config: TrainConfig) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=not config.deepspeed and config.trainer.precision == "bf16")
