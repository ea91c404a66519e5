"""What each rank holds of the training state, and what ranks send to each other in an optimizer step.

Arithmetic on shapes, as DeepSpeed 0.19 and torch's DDP partition and bucket them, once they have seen a few steps.
`tests/test_any_rank.py` compares it with what they do, for ranks of 8 to 512.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from clippy_train.config import TrainConfig

BYTES = {"fp32": 4, "bf16": 2}
DDP_BUCKETS = (1 << 20, 25 << 20)  # bytes: of the first, and of the others
FLAT_BUCKET = 500_000_000  # elements: flat gradients that DeepSpeed's BF16_Optimizer reduces at once
PERSISTENT = 100_000  # elements: ZeRO-3 keeps tensors up to this size on every rank
PREFETCHED = 50_000_000  # elements that ZeRO-3 gathers ahead, whenever a module runs
LIVE = REUSED = 1_000_000_000  # elements that it may hold; within which a tensor used again is not released


class Weight(NamedTuple):
    name: str
    numel: int
    decays: bool  # DeepSpeed keeps those that decay and the others in two flat tensors


Module = tuple[Weight, ...]


@dataclass(frozen=True)
class Collective:
    """A kind of collective in an optimizer step.

    Attributes:
        num_bytes: of all calls together: of the whole tensor, where a rank holds a part of it before or after.
    """

    name: str
    dtype: str
    calls: int
    num_bytes: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends (and receives), by the ring algorithms' count."""
        passes = 2 if self.name == "all_reduce" else 1
        return passes * self.num_bytes * (ranks - 1) / ranks


def modules(config: TrainConfig, vocab_size: int) -> list[Module]:
    """The modules of a GPT-Neo with their tensors, in the order of the forward pass; some (dropout) have none.

    The head is tied. A module's tensors are in the order in which the backward pass completes their gradients.
    """
    width = config.model.hidden_size
    embedding = Weight("wte.weight", vocab_size * width, True)
    positions = Weight("wpe.weight", config.model.max_position_embeddings * width, True)
    found: list[Module] = [(), (embedding,), (positions,), ()]
    for layer in range(config.model.num_layers):
        block = f"h.{layer}."
        found.append(_norm(block + "ln_1", width))
        found += [(Weight(f"{block}attn.{name}_proj.weight", width**2, True),) for name in "qkv"]
        found += [_linear(block + "attn.out_proj", width, width), ()]
        found.append(_norm(block + "ln_2", width))
        found.append(_linear(block + "mlp.c_fc", width, 4 * width))
        found += [_linear(block + "mlp.c_proj", 4 * width, width), ()]
    return [*found, _norm("ln_f", width), (embedding,)]


def _linear(name: str, inputs: int, outputs: int) -> Module:
    return Weight(name + ".bias", outputs, False), Weight(name + ".weight", inputs * outputs, True)


def _norm(name: str, width: int) -> Module:
    return Weight(name + ".weight", width, False), Weight(name + ".bias", width, False)


def weights(config: TrainConfig, vocab_size: int) -> list[Weight]:
    """Every tensor once."""
    return list(dict.fromkeys(weight for module in modules(config, vocab_size) for weight in module))


def gradients(config: TrainConfig, vocab_size: int) -> list[Weight]:
    """Tensors in the order in which the backward pass completes their gradients: the embeddings last."""
    every = reversed(modules(config, vocab_size)[:-1])  # without the head, whose tensor is the embedding
    if config.strategy.stage == 3:  # DeepSpeed's own linear layer: the weight first, there too
        every = (tuple(sorted(module, reverse=True)) for module in every)
    return [weight for module in every for weight in module]


def flat_sizes(config: TrainConfig, vocab_size: int) -> list[int]:
    """Elements of DeepSpeed's two flat tensors: padded, so that every rank has as many, in pairs."""
    every = weights(config, vocab_size)
    sizes = [sum(each.numel for each in every if each.decays == decays) for decays in (True, False)]
    return [padded(size, 2 * config.world_size) for size in sizes]


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def shard_elements(config: TrainConfig, vocab_size: int, rank: int) -> int:
    """Elements, without padding, that `rank` keeps the optimizer's state for. Over all ranks: the model's parameters,
    or as many times those as there are ranks where nothing is partitioned."""
    ranks, every = config.world_size, weights(config, vocab_size)
    if config.strategy.stage == 0:
        return sum(each.numel for each in every)
    if not config.deepspeed:
        return _whole_tensors([each.numel for each in every], ranks)[rank]
    if config.strategy.stage == 3:
        return sum(_own(each.numel, -(-each.numel // ranks), rank) for each in every)
    sizes = [sum(each.numel for each in every if each.decays == decays) for decays in (True, False)]
    return sum(
        _own(size, flat // ranks, rank) for size, flat in zip(sizes, flat_sizes(config, vocab_size), strict=True)
    )


def _own(size: int, part: int, rank: int) -> int:
    return min(max(size - rank * part, 0), part)


def _whole_tensors(sizes: Iterable[int], ranks: int) -> list[int]:
    """Elements on each rank under torch's ZeroRedundancyOptimizer: the largest tensor next, to the emptiest rank."""
    held = [0] * ranks
    for size in sorted(sizes, reverse=True):
        held[held.index(min(held))] += size
    return held


def step_collectives(config: TrainConfig, vocab_size: int) -> list[Collective]:
    """What a rank sends and receives in one optimizer step, all micro-batches together."""
    if config.strategy.name == "single":
        return []
    if not config.deepspeed:
        return _ddp(config, vocab_size)
    if config.strategy.stage == 3:
        return _zero3(config, vocab_size)
    return _zero12(config, vocab_size)


def _ddp(config: TrainConfig, vocab_size: int) -> list[Collective]:
    """Whole gradients, in buckets, once per step. ZeRO-1 of whole tensors: then each tensor, from its rank."""
    every, dtype = gradients(config, vocab_size), config.strategy.reduce_dtype
    buckets = list(ddp_buckets(4 * each.numel for each in every))
    found = [Collective("all_reduce", dtype, len(buckets), sum(buckets) * BYTES[dtype] // 4)]
    if config.strategy.stage:
        found.append(Collective("broadcast", "fp32", len(every), sum(buckets)))
    return found


def ddp_buckets(sizes: Iterable[int]) -> Iterator[int]:
    """Bytes of DDP's buckets: each is closed by the tensor that fills it."""
    filled, limit = 0, DDP_BUCKETS[0]
    for size in sizes:
        filled += size
        if filled >= limit:
            yield filled
            filled, limit = 0, DDP_BUCKETS[1]
    if filled:
        yield filled


def _zero12(config: TrainConfig, vocab_size: int) -> list[Collective]:
    """Gradients once per step (stage 1) or after each micro-batch (stage 2); then the ranks' parts of the weights."""
    dtype, low = config.strategy.reduce_dtype, config.trainer.precision
    flat = flat_sizes(config, vocab_size)
    gather = Collective("all_gather", low, len(flat), sum(flat) * BYTES[low])
    if low == "bf16" and config.strategy.stage == 1:  # DeepSpeed's BF16_Optimizer
        calls = len(list(buckets_over(flat, FLAT_BUCKET)))
        return [Collective("all_reduce", dtype, calls, sum(flat) * BYTES[dtype]), gather]
    times = config.micro_steps if config.strategy.stage == 2 else 1
    buckets = list(zero_buckets(gradients(config, vocab_size), config.strategy.reduce_bucket_size))
    return [
        Collective("all_reduce", dtype, times * len(buckets), times * sum(buckets) * BYTES[dtype]),
        Collective("all_reduce", "fp32", len(flat), 4 * len(flat)),  # the norm of each flat tensor
        *([Collective("all_reduce", "uint8", 1, 1)] if low == "bf16" else []),
        gather,
    ]


def buckets_over(sizes: Iterable[int], limit: int) -> Iterator[int]:
    """Elements of the buckets of DeepSpeed's engine: each is closed by the tensor that exceeds the limit."""
    filled = 0
    for size in sizes:
        filled += size
        if filled > limit:
            yield filled
            filled = 0
    if filled:
        yield filled


def zero_buckets(every: Iterable[Weight], limit: int, multiple: int = 1) -> Iterator[int]:
    """Elements of ZeRO's buckets, each tensor padded to `multiple`: a tensor that does not fit begins the next one."""
    filled = elements = 0
    for weight in every:
        if filled and filled + weight.numel > limit:
            yield elements
            filled = elements = 0
        filled += weight.numel
        elements += padded(weight.numel, multiple)
    yield elements


def _zero3(config: TrainConfig, vocab_size: int) -> list[Collective]:
    """In each micro-batch: weights where they are needed, gradients scattered. After it: the small tensors again."""
    ranks, steps, low = config.world_size, config.micro_steps, config.trainer.precision
    dtype, every = config.strategy.reduce_dtype, gradients(config, vocab_size)
    scattered = list(zero_buckets(every, config.strategy.reduce_bucket_size, ranks))
    gathers = list(zero3_gathers(modules(config, vocab_size), ranks))
    small = [padded(each.numel, ranks) for each in every if each.numel <= PERSISTENT]
    calls, elements = steps * len(gathers) + len(small), steps * sum(gathers) + sum(small)
    return [
        Collective("all_gather", low, calls, elements * BYTES[low]),
        Collective("reduce_scatter", dtype, steps * len(scattered), steps * sum(scattered) * BYTES[dtype]),
        Collective("all_reduce", "fp64", 2, 16),
    ]


def zero3_gathers(forward: list[Module], ranks: int) -> Iterator[int]:
    """Elements of each all-gather of weights in a micro-batch under ZeRO-3, in order."""
    coordinator = Zero3(forward)
    while not coordinator.ended:
        for gathered in coordinator.advance():
            yield sum(padded(each.numel, ranks) for each in gathered)


def gathered_elements(config: TrainConfig, vocab_size: int) -> list[int]:
    """Elements of the weights that are on a rank while each module of ZeRO-3's forward pass runs."""
    coordinator, found = Zero3(modules(config, vocab_size)), []
    for module in coordinator.order[: coordinator.forward]:
        coordinator.advance()
        found.append(sum(each.numel for each in coordinator.present | set(module)))
    return found


class Zero3:
    """DeepSpeed's `PartitionedParameterCoordinator`: which tensors are on a rank while a micro-batch passes."""

    def __init__(self, forward: list[Module]) -> None:
        self.order = [*forward, *reversed(forward)]
        self.forward = len(forward)
        self.step = 0
        self.present = {each for module in forward for each in module if each.numel <= PERSISTENT}
        self.counted = 0  # elements: DeepSpeed's own count of what is present starts with 0 in each micro-batch
        self.queue = deque((each, index) for index, module in enumerate(self.order) for each in reversed(module))
        self.fetched_for: dict[Weight, int] = {}  # until which step the prefetcher has looked ahead

    @property
    def ended(self) -> bool:
        return self.step == len(self.order)

    def advance(self) -> list[set[Weight]]:
        """Run the next module; what is gathered for it and for those after it."""
        module = self.order[self.step]
        gathers = [{each for each in module if each not in self.present}]
        self._add(gathers[0])
        for _ in {each for each in module if self.fetched_for.get(each, -1) < self.step}:
            each, index = self.queue.popleft()
            self.fetched_for[each] = index
        gathers.append(self._prefetched())
        self._add(gathers[1])
        self.step += 1
        for each in self._released(module):
            self.present.discard(each)
            self.counted -= each.numel
        return [each for each in gathers if each]

    def _add(self, gathered: set[Weight]) -> None:
        self.present |= gathered
        self.counted += sum(each.numel for each in gathered)

    def _prefetched(self) -> set[Weight]:
        limit, found, numel = min(LIVE - self.counted, PREFETCHED), set[Weight](), 0
        while self.queue and numel < limit:
            each, index = self.queue.popleft()
            self.fetched_for[each] = max(index, self.fetched_for.get(each, index))
            if each not in self.present and each not in found:
                found.add(each)
                numel += each.numel
        return found

    def _released(self, module: Module) -> set[Weight]:
        found = {each for each in module if each.numel > PERSISTENT}
        if self.step <= self.forward:  # as in the validation before, whose order DeepSpeed goes on with
            later = self.order[self.step : self.forward]
        else:
            found = {each for each in found if self.fetched_for.get(each, -1) <= self.step}
            later = self.order[self.step :]
        passed = 0
        for other in later:
            if passed >= REUSED:
                break
            found -= set(other)
            passed += sum(each.numel for each in other)
        return found
