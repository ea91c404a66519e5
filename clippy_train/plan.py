"""What a run will take, from its configuration alone: arithmetic, no device, no network.

What depends on hardware is a range, from the assumptions that are constants here and are printed with it. None of
them was measured on a GPU by this project.
"""

from dataclasses import dataclass, replace

from clippy_train.config import TrainConfig
from clippy_train.data.mixture import Source, shards_read, sources_found, text_bytes
from clippy_train.data.objectives import LEFT_TO_RIGHT, describe_objective
from clippy_train.model.flops import count_parameters, vocab_size
from clippy_train.model.memory import Memory, memory
from clippy_train.model.traffic import BYTES, Collective, step_collectives
from clippy_train.optim import describe_schedule
from clippy_train.shards.format import READ_BYTES

Range = tuple[float, float]

PEAK_FLOPS = 989e12  # H100 and H200, dense bf16
# Of the peak, with attention counted in full. Published for models of 125 M: 10 to 17 % with HF's eager attention, 45
# to 51 % with flash attention and compilation.
UTILISATION: Range = (0.15, 0.40)
EAGER_UTILISATION: Range = (0.10, 0.17)
RECOMPUTATION = 4 / 3  # a second forward pass, with `model.checkpoint_activations`
# Bytes a second that a GPU sends, and receives as many: NVLink 4 has 450e9, an InfiniBand NDR port 50e9
NVLINK: Range = (200e9, 400e9)
NETWORK: Range = (25e9, 50e9)
USABLE = 0.9  # of a GPU's memory; the rest: CUDA context, NCCL, workspaces, fragmentation
TOKENS_PER_CORE: Range = (0.5e6, 1e6)  # that a core tokenises in a second; the upper end: benchmarks/data-speed.md
TEXT_BYTES_PER_TOKEN = 3.0  # of code, with whitespace tokens
COMPRESSION = 4.0  # of code, by zstd
DISK: Range = (0.5e9, 2e9)  # bytes a second that a shared file system takes from a job
HASHING = 1e9  # bytes a second that a core reads back and hashes


@dataclass(frozen=True)
class Host:
    """Bytes of a node's memory, besides the processes themselves. A new run loads first; saves come later.

    Attributes:
        loading: each rank builds the model in fp32 and, for DeepSpeed in bf16, keeps a copy that is not rounded.
        snapshots: of asynchronous checkpoints, on the first node, which holds the most.
    """

    loading: int
    snapshots: int


@dataclass(frozen=True)
class Estimate:
    """What depends on hardware; ranges from the assumptions above.

    Attributes:
        tokens_per_second: of all ranks together.
        communication_seconds: of a step, if nothing overlaps with it.
        save_seconds: until a checkpoint is complete; training goes on meanwhile.
        read_bytes_per_second: of zstd shards, all ranks together.
        tokenizing_cores_per_node: cores that keep up with that speed.
    """

    tokens_per_second: Range
    communication_seconds: Range
    hours: Range
    save_seconds: Range
    read_bytes_per_second: Range
    tokenizing_cores_per_node: Range


@dataclass(frozen=True)
class SourcePlan:
    """What a run takes from a source of a mixture.

    Attributes:
        text_bytes: of its training split; None if its manifest does not say.
        epochs: how often that is read, at `TEXT_BYTES_PER_TOKEN`.
    """

    name: str
    streams: int
    tokens: int
    text_bytes: int | None
    epochs: float | None


@dataclass(frozen=True)
class Plan:
    """What a run takes, as numbers.

    Attributes:
        vocab_size: with the tokens that are added.
        sources: of a mixture that is found.
        memory_bytes_per_gpu: the peak of `memory`.
        memory_gb: of a GPU, if asked about.
        largest_micro_batch_size: that fits it; None if none does.
        checkpoints: the most that are kept at a time.
        disk_bytes: of those, and one that is being written.
        collectives: that each rank takes part in, in an optimizer step.
        sent_bytes: by each rank in those, and as many received.
        estimate: None on CPU.
    """

    vocab_size: int
    parameters: int
    tokens: int
    sources: list[SourcePlan]
    memory_bytes_per_gpu: int
    memory: Memory
    memory_gb: float | None
    largest_micro_batch_size: int | None
    host: Host
    checkpoint_bytes: int
    checkpoints: int
    disk_bytes: int
    collectives: list[Collective]
    sent_bytes: float
    estimate: Estimate | None


def make_plan(config: TrainConfig, memory_gb: float | None = None) -> Plan:
    """Plan a run; with `memory_gb`, also the largest micro-batch for GPUs of that size."""
    rows = vocab_size(config)
    num_parameters, needed = count_parameters(config, rows), memory(config, rows)
    saved, kept = checkpoint_bytes(num_parameters, config), checkpoints_kept(config)
    collectives = step_collectives(config, rows)
    sent = sum(each.sent(config.world_size) for each in collectives)
    on_gpu = config.trainer.accelerator != "cpu"
    return Plan(
        vocab_size=rows,
        parameters=num_parameters,
        tokens=config.trainer.max_steps * config.tokens_per_step,
        sources=[plan_source(config, each) for each in sources_found(config.data) if each.name],
        memory_bytes_per_gpu=needed.peak,
        memory=needed,
        memory_gb=memory_gb,
        largest_micro_batch_size=largest_micro_batch(config, memory_gb) if memory_gb else None,
        host=host_bytes(num_parameters, config),
        checkpoint_bytes=saved,
        checkpoints=kept,
        disk_bytes=saved * (kept + 1),
        collectives=collectives,
        sent_bytes=sent,
        estimate=estimate(config, num_parameters, sent) if on_gpu else None,
    )


def plan_source(config: TrainConfig, source: Source) -> SourcePlan:
    streams, size = len(source.streams), text_bytes(source.settings, source.corpus)
    tokens = config.trainer.max_steps * config.tokens_per_step // config.data.streams * streams
    return SourcePlan(source.name, streams, tokens, size, tokens * TEXT_BYTES_PER_TOKEN / size if size else None)


def epoch_steps(config: TrainConfig, source: Source) -> float | None:
    """Steps in which a source is read once, by its manifest; None if that does not say."""
    data, size = config.data, text_bytes(source.settings, source.corpus)
    if size is None:
        return None
    sequences = size / TEXT_BYTES_PER_TOKEN / data.seq_len
    if not data.packing:  # and documents are short
        sequences = source.corpus.about()["splits"]["train"]["documents"]
    return sequences / (config.trainer.global_batch_size * len(source.streams) / data.streams)


def shards_read_again(config: TrainConfig) -> float:
    """How often a shard is read in an epoch, on average over the tokens."""
    often = [(len(each.streams), *shards_read(each)) for each in sources_found(config.data)]
    return sum(streams * read / shards for streams, shards, read in often) / config.data.streams or 1.0


def largest_micro_batch(config: TrainConfig, memory_gb: float) -> int | None:
    """The largest `trainer.micro_batch_size` that divides the global batch and fits a GPU; None if none does."""
    of_rank = config.trainer.global_batch_size // config.world_size
    for size in (size for size in range(of_rank, 0, -1) if of_rank % size == 0):
        smaller = replace(config, trainer=replace(config.trainer, micro_batch_size=size))
        if memory(smaller, vocab_size(config)).peak <= USABLE * memory_gb * 1e9:
            return size
    return None


def saved_bytes(num_parameters: int, config: TrainConfig) -> tuple[int, int]:
    """Bytes of a checkpoint that the first rank alone writes, and that each rank writes.

    DeepSpeed writes its weights once, but none under ZeRO-3, and fp32 weights and moments rank by rank.
    """
    moments = 8 if config.optim.name == "adamw" else 0
    if not config.deepspeed:
        return (4 + moments) * num_parameters, 0
    weights = 0 if config.strategy.stage == 3 else BYTES[config.trainer.precision]
    return weights * num_parameters, (4 + moments) * num_parameters // config.world_size


def checkpoint_bytes(num_parameters: int, config: TrainConfig) -> int:
    first, each = saved_bytes(num_parameters, config)
    return first + config.world_size * each


def host_bytes(num_parameters: int, config: TrainConfig) -> Host:
    _, devices = config.nodes_and_devices
    copies = 2 if config.deepspeed and config.trainer.precision == "bf16" else 1
    first, each = saved_bytes(num_parameters, config)
    snapshots = first + devices * each if config.checkpoint.asynchronous else 0
    return Host(devices * copies * 4 * num_parameters, snapshots)


def link(config: TrainConfig) -> tuple[str, Range]:
    """The slowest link between ranks."""
    return ("the network", NETWORK) if config.nodes_and_devices[0] > 1 else ("NVLink", NVLINK)


def estimate(config: TrainConfig, num_parameters: int, sent: float) -> Estimate:
    """What depends on hardware; each rank sends `sent` bytes in a step."""
    _, (worst, best) = link(config)
    exchange = sent / best, sent / worst
    low, high = tokens_per_second(config, num_parameters, exchange)
    nodes, _ = config.nodes_and_devices
    compressed = TEXT_BYTES_PER_TOKEN / COMPRESSION * shards_read_again(config)
    tokens, saved = config.trainer.max_steps * config.tokens_per_step, checkpoint_bytes(num_parameters, config)
    slow, fast = (saved * (1 / speed + 1 / HASHING) for speed in DISK)
    return Estimate(
        tokens_per_second=(low, high),
        communication_seconds=exchange,
        hours=(tokens / high / 3600, tokens / low / 3600),
        save_seconds=(fast, slow),
        read_bytes_per_second=(low * compressed, high * compressed),
        tokenizing_cores_per_node=(low / nodes / TOKENS_PER_CORE[1], high / nodes / TOKENS_PER_CORE[0]),
    )


def utilisation(config: TrainConfig) -> Range:
    return EAGER_UTILISATION if config.attention == "eager" else UTILISATION


def tokens_per_second(config: TrainConfig, num_parameters: int, exchange: Range) -> Range:
    """Of all ranks. At best, the exchange overlaps with computation; at worst, it adds to it."""
    model, ranks = config.model, config.world_size
    of_a_token = 6 * num_parameters + 12 * model.num_layers * model.hidden_size * config.data.seq_len
    flops = of_a_token * (RECOMPUTATION if model.checkpoint_activations else 1)
    slow, fast = (config.tokens_per_step * flops / (ranks * share * PEAK_FLOPS) for share in utilisation(config))
    return config.tokens_per_step / (slow + exchange[1]), config.tokens_per_step / max(fast, exchange[0])


def plan_rows(config: TrainConfig, plan: Plan) -> list[tuple[str, str]]:
    """The plan as a table for people: what will be trained, on how much, with what."""
    trainer, optim, model, (nodes, devices) = config.trainer, config.optim, config.model, config.nodes_and_devices
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
            f"{nodes} node{'s' if nodes > 1 else ''} x {devices} {trainer.accelerator}, {trainer.precision}, "
            f"strategy {config.strategy.name}{config.strategy.stage or ''}",
        ),
        (
            "step",
            f"{trainer.global_batch_size} sequences of {config.data.seq_len} = {config.tokens_per_step:,} tokens: "
            f"{config.world_size} ranks x {trainer.micro_batch_size} x {config.micro_steps} accumulated",
        ),
        ("run", f"{trainer.max_steps:,} steps = {plan.tokens / 1e9:,.4g} B tokens"),
        *([("ends", ends(config))] if trainer.max_epochs else []),
        *((f"source {each.name}", source_text(config, each)) for each in plan.sources),
        ("learning rate", describe_schedule(optim)),
        (
            "validation",
            f"{trainer.val_samples:,} sequences = {trainer.val_samples * config.data.seq_len / 1e6:,.4g} M tokens "
            f"(or the whole split) every {trainer.val_every_steps} steps",
        ),
        ("states on a device", states(plan.memory)),
        (
            "checkpoints",
            f"{when_saved(config)}, {plan.checkpoint_bytes / 1e9:,.3g} GB each; at most {plan.checkpoints} kept and "
            f"one being written: {plan.disk_bytes / 1e9:,.3g} GB",
        ),
        ("host memory of a node", host(config, plan.host)),
        *([("communication", communication(config, plan))] if plan.collectives else []),
        *(gpu_rows(config, plan) if plan.estimate else []),
        *(estimate_rows(config, plan.estimate) if plan.estimate else []),
    ]


def source_text(config: TrainConfig, source: SourcePlan) -> str:
    share = f"{source.streams} of {config.data.streams} streams = {source.streams / config.data.streams:.2%}"
    epochs = "an unknown number of epochs"
    if source.epochs and source.text_bytes:
        size = f"{source.text_bytes / 1e6:,.4g} MB at {TEXT_BYTES_PER_TOKEN:g} bytes a token"
        epochs = f"about {source.epochs:,.3g} epochs of {size}"
    return f"{share}: {source.tokens / 1e9:,.4g} B tokens, {epochs}"


def states(held: Memory) -> str:
    parts = ("weights", "gradients", "master", "moments", "buffers")
    sizes = ", ".join(f"{name} {getattr(held, name) / 1e9:,.3g}" for name in parts if getattr(held, name))
    return f"{held.states / 1e9:,.3g} GB: {sizes}"


def host(config: TrainConfig, held: Host) -> str:
    _, devices = config.nodes_and_devices
    loading = f"{held.loading / 1e9:,.3g} GB while {devices} rank{'s load' if devices > 1 else ' loads'} in fp32"
    return f"{loading}; then {held.snapshots / 1e9:,.3g} GB for checkpoints in flight; and the processes themselves"


def communication(config: TrainConfig, plan: Plan) -> str:
    calls, dtype = sum(each.calls for each in plan.collectives), config.strategy.reduce_dtype
    return f"each rank sends {plan.sent_bytes / 1e9:,.3g} GB in {calls:,} calls in a step, gradients in {dtype}"


def gpu_rows(config: TrainConfig, plan: Plan) -> list[tuple[str, str]]:
    held, size = plan.memory, config.trainer.micro_batch_size
    text = (
        f"{held.peak / 1e9:,.3g} GB with {config.attention} attention and micro-batches of {size}: states "
        f"{held.states / 1e9:,.3g}, activations {held.activations / 1e9:,.3g}, the rest is temporary"
    )
    rows = [("memory of a GPU", text)]
    if plan.memory_gb:
        rows.append(("largest micro-batch", largest(plan)))
    return rows


def largest(plan: Plan) -> str:
    held, usable = plan.memory, f"{plan.memory_gb:g} GB, of which {USABLE:.0%} may be used"
    if plan.largest_micro_batch_size:
        return f"trainer.micro_batch_size={plan.largest_micro_batch_size} fits {usable}"
    if plan.memory_gb and held.states + held.gathered + held.validation > USABLE * plan.memory_gb * 1e9:
        return f"none fits {usable}: validation needs more; lower trainer.eval_micro_batch_size"
    return f"none fits {usable}: choose a higher ZeRO stage, or model.checkpoint_activations=true"


def estimate_rows(config: TrainConfig, estimate: Estimate) -> list[tuple[str, str]]:
    """Rows for speed, time, communication, and what the file system and the cores must provide."""
    ranks, (_, devices), (name, speeds) = config.world_size, config.nodes_and_devices, link(config)
    (low, high), hours = estimate.tokens_per_second, estimate.hours
    read = estimate.read_bytes_per_second
    return [
        (
            "speed (estimate)",
            f"{span(low, high, 1e6)} M tokens/s, {span(low / ranks, high / ranks, 1e3)} k a GPU: "
            f"{span(*utilisation(config), 0.01)} % of {PEAK_FLOPS / 1e12:.0f} TFLOP/s (H100, H200)",
        ),
        (
            "time (estimate)",
            f"{span(*hours)} hours, {span(hours[0] * ranks, hours[1] * ranks)} GPU-hours, without validation",
        ),
        (
            "communication (estimate)",
            f"{span(*estimate.communication_seconds, 1e-3)} ms a step over {name} at {span(*speeds, 1e9)} GB/s, "
            "if none of it overlaps",
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


def span(low: float, high: float, unit: float = 1) -> str:
    """Two numbers of three digits: `0.69 to 1,090`."""
    return " to ".join(f"{float(f'{value / unit:.3g}'):,.10g}" for value in (low, high))


def checkpoints_kept(config: TrainConfig) -> int:
    """The most that a run keeps: the newest, those kept for good, and the best, which may be none of them."""
    settings, steps = config.checkpoint, config.trainer.max_steps
    for_good = steps // settings.keep_every if settings.keep_every else 0
    written = steps if settings.every_minutes is not None else -(-steps // settings.every_steps)
    return min(settings.keep_last + for_good + 1, written)


def ends(config: TrainConfig) -> str:
    """When `trainer.max_epochs` ends a run."""
    epochs = int(config.trainer.max_epochs or 0)
    known = [steps for each in sources_found(config.data) if (steps := epoch_steps(config, each)) is not None]
    if not known:
        return f"after trainer.max_epochs={epochs}, of unknown length, or at trainer.max_steps"
    steps, optim = epochs * min(known), config.optim
    late = optim.schedule != "constant" and steps < optim.warmup_steps + (optim.stable_steps or 0) + optim.decay_steps
    why = "; THE SCHEDULE IS LONGER: set optim.warmup_steps and optim.decay_steps" if late else ""
    return f"after trainer.max_epochs={epochs}, some {steps:,.0f} steps by the manifest, or at trainer.max_steps{why}"


def when_saved(config: TrainConfig) -> str:
    minutes = config.checkpoint.every_minutes
    return f"every {config.checkpoint.every_steps} steps" + (f" or {minutes:g} minutes" if minutes else "")


def rules(config: TrainConfig) -> str:
    """How text becomes tokens and tokens a loss, in words: what `recipe` chooses."""
    end = "end-of-text after each document" if config.data.eos_between_documents else "nothing between documents"
    how = f"{config.tokenizer.matching} whitespace, {end}, loss in {config.model.loss_dtype}"
    found = describe_objective(config.data)
    return how if found == LEFT_TO_RIGHT else f"{how}, {found}"
