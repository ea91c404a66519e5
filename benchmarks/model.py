"""Measure the training step: attention, full steps, memory, and the overhead of the framework.

    python benchmarks/model.py cpu      part of `make bench`: minutes, 12 GB of memory
    python benchmarks/model.py cuda     `make bench-gpu`: on one GPU; also tokens/s and MFU by micro-batch and strategy

Prints one JSON object per row and writes the table, with date and versions, to `benchmarks/model-speed.md` (`-gpu.md`).
Every variant trains in a separate process, one step at a time in turn with the others; figures are medians of the steps
after the first, so ratios hold on a machine that is not quite idle. `cpu` counts CPU seconds of all threads.
"""

import json
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, cast
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from transformers import GPTNeoForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock, GPTNeoSelfAttention

from clippy_train.compose import compose
from clippy_train.config import TrainConfig
from clippy_train.data.stream import COUNTS
from clippy_train.model import attention
from clippy_train.model.build import gpt_neo_config
from clippy_train.model.flops import flops_per_token, peak_flops
from clippy_train.model.loss import loss_head, mean_loss
from clippy_train.optim import build_optimizer, clip_grad_norm
from clippy_train.report import quiet_transformers
from clippy_train.train.callbacks.health import Health
from clippy_train.train.callbacks.monitor import Monitor
from clippy_train.train.callbacks.progress import Progress, fresh_cursors
from clippy_train.train.module import CodeLM
from clippy_train.train.strategy import build_trainer

VOCAB_SIZE = 50261
# A small shape, with which the original script can be timed as well: 4 x 512 tokens.
SMALL = ("model.hidden_size=256", "model.num_layers=6", "model.num_heads=8")
NO_LIMIT = 10**6
# glibc returns large buffers to the system at once. Allocating them again takes up to half of a short step on CPU,
# varies between runs, and hides a difference of 3 %.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 34), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}

Row = dict[str, Any]
Turn = Callable[[], None]  # waits for this variant's turn to make a step


@dataclass(frozen=True)
class Variant:
    """One way to train: `how` names a function below; `low` is bf16 by `weights` or `autocast`, or empty for fp32."""

    how: str
    low: str = ""
    seq: int = 2048
    batch: int = 1
    device: str = "cpu"
    overrides: tuple[str, ...] = ()

    @property
    def config(self) -> TrainConfig:
        return compose(
            TrainConfig,
            [
                "experiment=code_clippy_125m",
                "data.streams=1",
                "trainer.devices=1",
                "strategy=single",
                f"data.seq_len={self.seq}",
                f"trainer.accelerator={self.device}",
                f"trainer.precision={'bf16' if self.low else 'fp32'}",
                f"trainer.micro_batch_size={self.batch}",
                f"trainer.global_batch_size={self.batch}",
                f"trainer.max_steps={NO_LIMIT}",
                f"trainer.val_every_steps={NO_LIMIT}",
                "trainer.deterministic=false",
                *self.overrides,
            ],
        )

    def model(self) -> GPTNeoForCausalLM:
        torch.manual_seed(0)
        model = GPTNeoForCausalLM(gpt_neo_config(self.config.model, vocab_size=VOCAB_SIZE))
        nn.Module.to(model, self.device)
        return model.bfloat16() if self.low == "weights" else model

    def ids(self) -> Tensor:
        return torch.randint(VOCAB_SIZE, (self.batch, self.seq), generator=torch.Generator().manual_seed(1))


def loop(variant: Variant, turn: Turn, loss: Callable[[GPTNeoForCausalLM, Tensor], Tensor]) -> None:
    """A bare PyTorch loop; `loss` takes a model and ids."""
    settings, model, ids = variant.config.optim, variant.model(), variant.ids().to(variant.device)
    optimizer = build_optimizer(model, settings)
    while True:
        turn()
        with torch.autocast(variant.device, torch.bfloat16, enabled=variant.low == "autocast"):
            value = loss(model, ids)
        optimizer.zero_grad()  # at the same place as in Lightning: on CPU the time at which memory is freed matters
        value.backward()
        clip_grad_norm(model.parameters(), settings.grad_clip)
        optimizer.step()


def hugging_face(variant: Variant, turn: Turn) -> None:
    loop(variant, turn, lambda model, ids: model(ids, labels=ids, use_cache=False).loss)


def ours(variant: Variant, turn: Turn) -> None:
    kernel = variant.config.attention

    def loss(model: GPTNeoForCausalLM, ids: Tensor) -> Tensor:
        model.lm_head = loss_head(model)
        return mean_loss(model, ids, kernel)

    loop(variant, turn, loss)


def framework(variant: Variant, turn: Turn) -> None:
    """The code of a rank of `clippy train`, with ready-made batches."""

    class Start(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            turn()

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    config = variant.config
    progress, finite = Progress(config, fresh_cursors(1), np.zeros(len(COUNTS)), []), Health(1, [[""]], config.data)
    trainer = build_trainer(
        config, callbacks=[Start(), progress, finite, Monitor(config, progress, finite)], logger=False
    )
    trainer.limit_val_batches = 0
    trainer.fit(CodeLM(config, variant.model(), np.ones(VOCAB_SIZE, dtype=np.int32)), Batches(variant.ids()))


class Batches(pl.LightningDataModule):
    """The same batch forever, with all fields of a rank's batch."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        rows = len(ids)
        self.batch = {
            "input_ids": ids,
            "cursor": torch.zeros(rows, 6, dtype=torch.int64),
            "counts": torch.zeros(rows, len(COUNTS), dtype=torch.int64),
            "rejected": torch.zeros(0, 2, dtype=torch.int64),
            "spans": torch.zeros(rows, 6, dtype=torch.int64),
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return repeat(self.batch)

    def train_dataloader(self) -> "Batches":
        return self


def hugging_face_trainer(variant: Variant, turn: Turn) -> None:
    class Start(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn()

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=variant.batch,
            max_steps=NO_LIMIT,
            use_cpu=variant.device == "cpu",
            bf16=bool(variant.low),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        (ids,) = variant.ids()[:1]
        rows = [{"input_ids": ids, "labels": ids}] * variant.batch * 100
        Trainer(variant.model(), settings, train_dataset=rows, callbacks=[Start()]).train()


def work(variant: Variant, pipe: Connection) -> None:
    """Body of a process that makes a step on request and replies with the seconds that it took."""
    quiet_transformers()
    torch.set_num_threads(os.cpu_count() or 1)
    cuda, started = variant.device == "cuda", (0.0, 0.0)

    def turn() -> None:
        nonlocal started
        if cuda:
            torch.cuda.synchronize()
        pipe.send((time.perf_counter() - started[0], time.process_time() - started[1]))
        if not pipe.recv():
            pipe.send(torch.cuda.max_memory_allocated() if cuda else peak_memory())
            os._exit(0)
        started = time.perf_counter(), time.process_time()

    globals()[variant.how](variant, turn)


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def compare(variants: dict[str, Variant], rounds: int, warmup: int = 1) -> dict[str, Row]:
    """Run `warmup + rounds` steps of each variant in turn; return `wall` and `cpu` seconds a step and `peak` bytes."""
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    pipes = {}
    for name, variant in variants.items():
        pipes[name], other = context.Pipe()
        context.Process(target=work, args=(variant, other), daemon=True).start()
        other.close()
        pipes[name].recv()  # ready for the first step; the time until here is start-up
    for _ in range(warmup + rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    found = {}
    for name, pipe in pipes.items():
        pipe.send(False)
        wall, cpu = (median(each[i] for each in seconds[name][warmup:]) for i in (0, 1))
        found[name] = {"wall": wall, "cpu": cpu, "peak": pipe.recv()}
    return found


def cores(device: str, rounds: int) -> Iterator[Row]:
    """Attention alone, 12 heads of 64, 2048 tokens, forward and backward."""
    config = Variant("ours").config.model
    blocks = GPTNeoForCausalLM(gpt_neo_config(config, vocab_size=64)).transformer.h.to(device)
    layers = cast("Sequence[GPTNeoBlock]", blocks)
    kernels: dict[str, tuple[GPTNeoSelfAttention, Callable[..., Tensor]]] = {
        "global": (layers[0].attn.attention, attention.global_attention),
        "local": (layers[1].attn.attention, lambda q, k, v: attention.local_attention(q, k, v, config.window_size)),
    }
    for kind, (layer, kernel) in kernels.items():
        for dtype in (torch.float32, torch.bfloat16):
            qkv = [torch.randn(1, 12, 2048, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            seconds: dict[str, list[float]] = {"eager": [], "ours": []}
            for _ in range(rounds + 1):
                for name, call in (("eager", lambda *each, layer=layer: layer._attn(*each)[0]), ("ours", kernel)):
                    started = time.process_time() if device == "cpu" else time.perf_counter()
                    call(*qkv).sum().backward()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    seconds[name].append((time.process_time() if device == "cpu" else time.perf_counter()) - started)
            eager, fast = (median(seconds[name][1:]) for name in ("eager", "ours"))
            what = f"attention core, {kind}, {str(dtype).removeprefix('torch.')}: eager / ours"
            yield {"what": what, "ratio": round(eager / fast, 2), "bar": {"global": 3.0, "local": 6.0}[kind]}


def ratios(what: str, found: dict[str, Row], slow: str, fast: str, bar: float | None) -> Row:
    """A row with the time of `slow` over that of `fast`."""
    wall, cpu = (found[slow][clock] / found[fast][clock] for clock in ("wall", "cpu"))
    seconds = {f"{name}_s": round(found[each]["wall"], 3) for name, each in (("first", slow), ("second", fast))}
    return {"what": what, "ratio": round(wall, 3), "ratio_cpu": round(cpu, 3), "bar": bar, **seconds}


def steps(device: str, rounds: int) -> Iterator[Row]:
    """Full steps of GPT-Neo-125M, 1 x 2048 tokens, compared with Hugging Face."""
    for low, name, bar, memory_bar in (("", "fp32", 1.6, None), ("weights", "bf16", 1.9, 0.5)):
        found = compare({how: Variant(how, low, device=device) for how in ("hugging_face", "ours")}, rounds)
        yield ratios(f"step of 125M, {name}: eager / ours", found, "hugging_face", "ours", bar)
        memory = found["ours"]["peak"] / found["hugging_face"]["peak"]
        peaks = {
            f"{each}_gb": round(found[how]["peak"] / 1e9, 2)
            for each, how in (("first", "ours"), ("second", "hugging_face"))
        }
        yield {"what": f"peak memory, {name}: ours / eager", "ratio": round(memory, 3), "bar": memory_bar, **peaks}
    pair = {"trainer": Variant("hugging_face_trainer", device=device), "ours": Variant("framework", device=device)}
    yield ratios("HF Trainer / clippy train, fp32", compare(pair, rounds), "trainer", "ours", 1.5)


def overhead(device: str, rounds: int) -> Iterator[Row]:
    """Overhead of the framework, and gain of compiling, on sequences short enough to show them."""
    variants = {how: Variant(how, seq=512, device=device) for how in ("framework", "ours")}
    variants["compiled"] = Variant("framework", seq=512, device=device, overrides=("model.compile=true",))
    with mock.patch.dict(os.environ, KEEP_MEMORY):
        found = compare(variants, 3 * rounds, warmup=4)
    yield ratios("clippy train / bare loop, 125M, 1 x 512, fp32", found, "framework", "ours", 1.03)
    yield ratios("clippy train, 125M, 1 x 512, fp32: plain / compiled", found, "framework", "compiled", None)


def original(device: str, rounds: int) -> Iterator[Row]:
    """A small model: `clippy train` compared with a plain Hugging Face loop."""
    for low, name in (("", "fp32"), ("autocast", "bf16")):
        pair = {how: Variant(how, low, 512, 4, device, SMALL) for how in ("hugging_face", "framework")}
        found = compare(pair, rounds)
        yield ratios(f"plain HF loop / clippy train, 17.7M, {name}", found, "hugging_face", "framework", 1.15)


def throughput(rounds: int) -> Iterator[Row]:
    """One GPU: tokens/s and MFU by micro-batch and strategy, each measured alone on the device."""
    compiled = ("model.compile=true",)
    sweep: dict[str, tuple[int, tuple[str, ...]]] = {
        f"zero1, compiled, micro-batch {batch}": (batch, ("strategy=zero1", *compiled)) for batch in (4, 8, 16, 32, 64)
    }
    sweep |= {f"{name}, compiled, micro-batch 16": (16, (f"strategy={name}", *compiled)) for name in ("ddp", "zero2")}
    sweep |= {f"{name}, micro-batch 16": (16, (f"strategy={name}",)) for name in ("zero1", "zero3")}
    sweep |= {"zero1, eager attention, micro-batch 8": (8, ("strategy=zero1", "model.attention=eager"))}
    for what, (batch, overrides) in sweep.items():
        variant = Variant("framework", "weights", batch=batch, device="cuda", overrides=overrides)
        (found,) = compare({what: variant}, 5 * rounds, warmup=5).values()
        speed, peak = batch * variant.seq / found["wall"], peak_flops(torch.cuda.get_device_name())
        use = (
            {
                f"mfu_{name}": round(speed * flops / peak, 3)
                for name, flops in flops_per_token(variant.config, VOCAB_SIZE).items()
            }
            if peak
            else {}
        )
        yield {"what": what, "tokens_per_s": round(speed), **use, "first_gb": round(found["peak"] / 1e9, 2)}


def report(device: str, rows: Iterator[Row]) -> None:
    """Print each row as it is measured, and write them as a table with date, machine and versions."""
    done = []
    for row in rows:
        print(json.dumps({"bench": "model", **row}), flush=True)
        done.append(row)
    columns = list(dict.fromkeys(key for row in done for key in row))
    table = [columns, ["---"] * len(columns), *([str(row.get(key, "")) for key in columns] for row in done)]
    lines = [f"| {' | '.join(cells).replace('None', '')} |" for cells in table]
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "lightning", "deepspeed")
    )
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    where = (
        f"{os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()}), {gpu}; Python {platform.python_version()}"
    )
    text = [f"`python benchmarks/model.py {device}`, {date.today()}; {where}, {versions}.", "", *lines, ""]
    name = "model-speed.md" if device == "cpu" else "model-speed-gpu.md"
    (Path(__file__).parent / name).write_text("\n".join(["# The training step", "", *text]))


def rows(device: str, rounds: int) -> Iterator[Row]:
    yield from cores(device, 2 * rounds)
    yield from steps(device, rounds)
    yield from overhead(device, rounds)
    yield from original(device, rounds)
    if device == "cuda":
        yield from throughput(rounds)


if __name__ == "__main__":
    report(sys.argv[1], rows(sys.argv[1], rounds=3))
