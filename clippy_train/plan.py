"""What a training will take, from its configuration alone: arithmetic, no device, no network.

What depends on hardware is a range, from the assumptions that stand here as constants and are printed with it. None of
them was measured on a GPU by this project.
"""

from dataclasses import dataclass

from clippy_train.config import TrainConfig
from clippy_train.model.flops import count_parameters
from clippy_train.model.traffic import Collective, step_collectives
from clippy_train.optim import describe_schedule
from clippy_train.shards.format import READ_BYTES

Range = tuple[float, float]

PEAK_FLOPS = 989e12  # H100 and H200, dense bf16
# Of the peak, with attention counted in full. Published for models of 125 M: 10 to 17 % with HF's eager attention, 45
# to 51 % with flash attention and compilation.
UTILISATION: Range = (0.15, 0.40)
NETWORK: Range = (25e9, 50e9)  # bytes a second that a GPU sends to other nodes, and receives as many
# Of activations, by the token: of a layer, times its width (Korthikanti et al., 2022, section 4.1, less the attention
# scores, which SDPA does not keep); of the loss, times the vocabulary (logits in bf16 and fp32, log-softmax, gradient).
LAYER_BYTES, LOSS_BYTES = 34, 12
TOKENS_PER_CORE: Range = (0.5e6, 1e6)  # that a core tokenises in a second; the upper end: benchmarks/data-speed.md
TEXT_BYTES_PER_TOKEN = 3.0  # of code, with whitespace tokens
COMPRESSION = 4.0  # of code, by zstd
DISK: Range = (0.5e9, 2e9)  # bytes a second that a shared file system takes from a job
HASHING = 1e9  # bytes a second that a core reads back and hashes


def state_bytes(num_parameters: int, config: TrainConfig) -> dict[str, int]:
    """Bytes on each device and in a checkpoint for weights, gradients and optimizer state.

    Under ZeRO in bf16: bf16 weights, fp32 accumulated gradients, fp32 master weights and two Adam moments; each is
    divided by the ranks from its stage on. Otherwise all of them in fp32, on every rank. Adafactor's state, a row and a
    column for each matrix, is a few thousandths of the weights and left out.
    """
    ranks, stage = config.world_size, config.strategy.stage if config.deepspeed else 0
    low = 2 if config.trainer.precision == "bf16" and stage else 4
    moments = 8 if config.optim.name == "adamw" else 0
    master = moments + 4 if stage else moments  # ZeRO adds an fp32 copy of the weights
    weights = low * num_parameters // (ranks if stage >= 3 else 1)
    gradients = 4 * num_parameters // (ranks if stage >= 2 else 1)
    optimizer = master * num_parameters // (ranks if stage >= 1 else 1)
    return {"device": weights + gradients + optimizer, "checkpoint": (low + master) * num_parameters}


@dataclass(frozen=True)
class Estimate:
    """What depends on hardware; ranges from the assumptions above.

    Attributes:
        tokens_per_second: of all ranks together.
        memory_bytes_per_gpu: states and activations.
        save_seconds: until a checkpoint is complete; training goes on meanwhile.
        read_bytes_per_second: of zstd shards, all ranks together.
        tokenizing_cores_per_node: cores that keep up with that speed.
    """

    tokens_per_second: Range
    hours: Range
    memory_bytes_per_gpu: int
    save_seconds: Range
    read_bytes_per_second: Range
    tokenizing_cores_per_node: Range


@dataclass(frozen=True)
class Plan:
    """What a run takes, as numbers.

    Attributes:
        vocab_size: with the whitespace tokens.
        state_bytes_per_device: weights, gradients and optimizer state.
        checkpoints: the most that are kept at a time.
        disk_bytes: of those, and one that is being written.
        collectives: that each rank takes part in, in an optimizer step.
        estimate: None on CPU.
    """

    vocab_size: int
    parameters: int
    tokens: int
    state_bytes_per_device: int
    checkpoint_bytes: int
    checkpoints: int
    disk_bytes: int
    collectives: list[Collective]
    estimate: Estimate | None


def make_plan(config: TrainConfig) -> Plan:
    vocab_size = config.model.vocab_size + len(config.tokenizer.whitespace_tokens)
    num_parameters = count_parameters(config, vocab_size)
    sizes, kept = state_bytes(num_parameters, config), checkpoints_kept(config)
    collectives = step_collectives(config, vocab_size)
    on_gpu = config.trainer.accelerator != "cpu"
    return Plan(
        vocab_size=vocab_size,
        parameters=num_parameters,
        tokens=config.trainer.max_steps * config.tokens_per_step,
        state_bytes_per_device=sizes["device"],
        checkpoint_bytes=sizes["checkpoint"],
        checkpoints=kept,
        disk_bytes=sizes["checkpoint"] * (kept + 1),
        collectives=collectives,
        estimate=estimate(config, num_parameters, vocab_size, sent_bytes(config, collectives)) if on_gpu else None,
    )


def sent_bytes(config: TrainConfig, collectives: list[Collective]) -> float:
    """Bytes that each rank sends in an optimizer step, and as many that it receives."""
    return sum(each.sent(config.world_size) for each in collectives)


def estimate(config: TrainConfig, num_parameters: int, vocab_size: int, sent: float) -> Estimate:
    """What depends on hardware; `sent` is `sent_bytes`."""
    low, high = tokens_per_second(config, num_parameters, sent)
    nodes, _ = config.nodes_and_devices
    tokens, sizes = config.trainer.max_steps * config.tokens_per_step, state_bytes(num_parameters, config)
    slow, fast = (sizes["checkpoint"] * (1 / speed + 1 / HASHING) for speed in DISK)
    return Estimate(
        tokens_per_second=(low, high),
        hours=(tokens / high / 3600, tokens / low / 3600),
        memory_bytes_per_gpu=sizes["device"] + activation_bytes(config, vocab_size),
        save_seconds=(fast, slow),
        read_bytes_per_second=(low * TEXT_BYTES_PER_TOKEN / COMPRESSION, high * TEXT_BYTES_PER_TOKEN / COMPRESSION),
        tokenizing_cores_per_node=(low / nodes / TOKENS_PER_CORE[1], high / nodes / TOKENS_PER_CORE[0]),
    )


def plan_rows(config: TrainConfig, plan: Plan) -> list[tuple[str, str]]:
    """The plan as a table for people: what will be trained, on how much, with what."""
    trainer, optim, model = config.trainer, config.optim, config.model
    return [
        ("run folder", str(config.run_dir)),
        ("start from", model.base or "random weights"),
        ("tokenizer", f"{config.tokenizer.base or model.base}, {plan.vocab_size:,} tokens"),
        ("recipe", rules(config)),
        (
            "model",
            f"GPT-Neo, {model.num_layers} layers of {model.hidden_size}, {plan.parameters / 1e6:,.1f} M parameters",
        ),
        (
            "ranks",
            f"{trainer.num_nodes} nodes x {trainer.devices} {trainer.accelerator}, {trainer.precision}, "
            f"strategy {config.strategy.name}{config.strategy.stage or ''}",
        ),
        (
            "step",
            f"{trainer.global_batch_size} sequences of {config.data.seq_len} = {config.tokens_per_step:,} tokens: "
            f"{config.world_size} ranks x {trainer.micro_batch_size} x {config.micro_steps} accumulated",
        ),
        ("run", f"{trainer.max_steps:,} steps = {plan.tokens / 1e9:,.4g} B tokens"),
        ("learning rate", describe_schedule(optim)),
        (
            "validation",
            f"{trainer.val_samples:,} sequences = {trainer.val_samples * config.data.seq_len / 1e6:,.4g} M tokens "
            f"(or the whole split) every {trainer.val_every_steps} steps",
        ),
        ("states on a device", f"{plan.state_bytes_per_device / 1e9:,.3g} GB, without activations"),
        (
            "checkpoints",
            f"{when_saved(config)}, {plan.checkpoint_bytes / 1e9:,.3g} GB each; at most {plan.checkpoints} kept and "
            f"one being written: {plan.disk_bytes / 1e9:,.3g} GB",
        ),
        *([("communication", communication(config, plan.collectives))] if plan.collectives else []),
        *(estimate_rows(config, plan.estimate) if plan.estimate else []),
    ]


def communication(config: TrainConfig, collectives: list[Collective]) -> str:
    sent, calls = sent_bytes(config, collectives) / 1e9, sum(each.calls for each in collectives)
    dtype = config.strategy.reduce_dtype
    return f"each rank sends {sent:,.3g} GB in {calls:,} calls in a step, gradients in {dtype}"


def estimate_rows(config: TrainConfig, estimate: Estimate) -> list[tuple[str, str]]:
    """Rows for speed, time, memory, and what the file system and the cores must provide."""
    ranks, (nodes, devices) = config.world_size, config.nodes_and_devices
    (low, high), hours = estimate.tokens_per_second, estimate.hours
    read = estimate.read_bytes_per_second
    return [
        (
            "speed (estimate)",
            f"{span(low, high, 1e6)} M tokens/s, {span(low / ranks, high / ranks, 1e3)} k a GPU: "
            f"{span(*UTILISATION, 0.01)} % of {PEAK_FLOPS / 1e12:.0f} TFLOP/s (H100, H200)"
            + (f", {span(*NETWORK, 1e9)} GB/s a GPU between nodes" if nodes > 1 else ""),
        ),
        (
            "time (estimate)",
            f"{span(*hours)} hours, {span(hours[0] * ranks, hours[1] * ranks)} GPU-hours, without validation",
        ),
        (
            "memory of a GPU (estimate)",
            f"{estimate.memory_bytes_per_gpu / 1e9:,.3g} GB with micro-batches of {config.trainer.micro_batch_size}",
        ),
        (
            "seconds to save (estimate)",
            f"{span(*estimate.save_seconds)} s beside training: written at {span(*DISK, 1e9)} GB/s, hashed at "
            f"{HASHING / 1e9:g} GB/s",
        ),
        (
            "reading (estimate)",
            f"{span(read[0], read[1], 1e6)} MB/s of zstd, {span(read[0], read[1], READ_BYTES)} reads/s of "
            f"{READ_BYTES >> 20} MiB, all ranks together",
        ),
        (
            "tokenizing (estimate)",
            f"{span(*estimate.tokenizing_cores_per_node)} cores of each node at {span(*TOKENS_PER_CORE, 1e6)} M "
            f"tokens/s a core; data.num_workers={config.data.num_workers} gives {devices * config.data.num_workers}",
        ),
    ]


def tokens_per_second(config: TrainConfig, num_parameters: int, sent: float) -> Range:
    """Of all ranks. At best, what is sent between nodes overlaps with computation; at worst, it adds to it."""
    model, ranks, (nodes, _) = config.model, config.world_size, config.nodes_and_devices
    flops = 6 * num_parameters + 12 * model.num_layers * model.hidden_size * config.data.seq_len
    slow, fast = (config.tokens_per_step * flops / (ranks * share * PEAK_FLOPS) for share in UTILISATION)
    exchanged = sent if nodes > 1 else 0
    slow, fast = slow + exchanged / NETWORK[0], max(fast, exchanged / NETWORK[1])
    return config.tokens_per_step / slow, config.tokens_per_step / fast


def activation_bytes(config: TrainConfig, vocab_size: int) -> int:
    """What the forward pass of a micro-batch keeps for the backward pass."""
    wider = 1 if config.trainer.precision == "bf16" else 2
    model, tokens = config.model, config.trainer.micro_batch_size * config.data.seq_len
    return wider * tokens * (LAYER_BYTES * model.num_layers * model.hidden_size + LOSS_BYTES * vocab_size)


def span(low: float, high: float, unit: float = 1) -> str:
    return " to ".join(f"{value / unit:,.3g}" for value in (low, high))


def checkpoints_kept(config: TrainConfig) -> int:
    """The most that a run keeps: the newest, those kept for good, and the best, which may be none of them."""
    settings, steps = config.checkpoint, config.trainer.max_steps
    for_good = steps // settings.keep_every if settings.keep_every else 0
    written = steps if settings.every_minutes is not None else -(-steps // settings.every_steps)
    return min(settings.keep_last + for_good + 1, written)


def when_saved(config: TrainConfig) -> str:
    minutes = config.checkpoint.every_minutes
    return f"every {config.checkpoint.every_steps} steps" + (f" or {minutes:g} minutes" if minutes else "")


def rules(config: TrainConfig) -> str:
    """How text becomes tokens and tokens a loss, in words: what `recipe` chooses."""
    end = "end-of-text after each document" if config.data.eos_between_documents else "nothing between documents"
    return f"{config.tokenizer.matching} whitespace, {end}, loss in {config.model.loss_dtype}"
