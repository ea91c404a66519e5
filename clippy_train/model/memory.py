"""Bytes of a GPU's memory in training, by what they hold: a closed formula from the configuration.

`tests/test_memory.py` compares it with what the real engines hold on fake tensors. Left out: the CUDA context, NCCL's
buffers, workspaces inside kernels and fragmentation; `model.compile` needs less than this. Per token, layer
and unit of width, a fused kernel keeps 32 bytes in bf16 (as Korthikanti et al., 2022, section 4.1, less the scores),
the loss one chunk of logits.
"""

from dataclasses import dataclass

from clippy_train.config import TrainConfig
from clippy_train.model.flops import count_parameters
from clippy_train.model.loss import CHUNK, VOCAB_MULTIPLE
from clippy_train.model.traffic import BYTES, gathered_elements, padded


@dataclass(frozen=True)
class Memory:
    """What a rank holds.

    Attributes:
        weights: in the precision that they are computed with.
        gradients: of the micro-batches so far.
        master: DeepSpeed's fp32 weights.
        moments: of Adam; Adafactor's, a few thousandths of the weights, are left out.
        buffers: constant masks, and what ranks exchange.
        gathered: other ranks' weights under ZeRO-3, when the loss is computed.
        activations: that a micro-batch's forward pass keeps for its backward pass.
        loss, backward: what the loss and the backward pass of a layer need for a moment, besides the activations.
        update, validation: what these need for a moment, after the activations are freed. In its middle, a forward
            pass of ZeRO-3 has more weights than at its end; a training pass has few activations then.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    buffers: int
    gathered: int
    activations: int
    loss: int
    backward: int
    update: int
    validation: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.master + self.moments + self.buffers

    @property
    def peak(self) -> int:
        training = self.activations + max(self.loss, self.backward)
        return self.states + max(self.gathered + max(training, self.validation), self.update)


@dataclass(frozen=True)
class _Shape:
    """Sizes that the figures are made of.

    Attributes:
        parameters, width, layers, vocab: of the model; `vocab` rows of the head, padded as the loss pads them.
        value, weight: bytes of an activation; of a weight, which are those of the residual stream, too.
        autocast: weights are fp32, and copies of them are made for the products.
    """

    parameters: int
    width: int
    layers: int
    vocab: int
    value: int
    weight: int
    autocast: bool

    @property
    def logit(self) -> int:
        """Bytes of a logit in fp32 and, if that differs, in the model's precision too."""
        return self.value if self.value == BYTES["fp32"] else self.value + BYTES["fp32"]

    @property
    def copies(self) -> int:
        """Autocast's copies of the matrices of all layers, which the backward pass needs."""
        return self.value * 12 * self.width**2 * self.layers if self.autocast else 0


def _shape(config: TrainConfig, vocab_size: int) -> _Shape:
    value = BYTES[config.trainer.precision]
    low = value if config.deepspeed else BYTES["fp32"]  # otherwise weights stay in fp32
    model = config.model
    return _Shape(
        parameters=count_parameters(config, vocab_size),
        width=model.hidden_size,
        layers=model.num_layers,
        vocab=padded(vocab_size, VOCAB_MULTIPLE),
        value=value,
        weight=low,
        autocast=value < low,
    )


def memory(config: TrainConfig, vocab_size: int) -> Memory:
    shape = _shape(config, vocab_size)
    kept = _layer(config, shape)
    held = _zero(config, shape) if config.deepspeed else _whole(config, shape)
    weights = gathered_elements(config, vocab_size) if config.strategy.stage == 3 else [0]
    if config.model.checkpoint_activations:
        activations, again = shape.layers * _stream(config, shape), kept - _stream(config, shape)
    else:
        activations, again = shape.layers * kept, 0
    return Memory(
        **held,
        gathered=shape.weight * weights[-1],
        activations=activations + shape.copies,
        loss=_loss(config, shape),
        backward=again + _backward(config, shape),
        validation=_validation(config, shape) + shape.weight * (max(weights) - weights[-1]),
    )


def _whole(config: TrainConfig, shape: _Shape) -> dict[str, int]:
    """Without DeepSpeed: everything on every rank. The update has temporary copies of all weights."""
    whole = 4 * shape.parameters
    return {
        "weights": whole,
        "gradients": whole,
        "master": 0,
        "moments": 2 * whole if config.optim.name == "adamw" else 0,
        "buffers": _masks(config),
        "update": whole,
    }


def _zero(config: TrainConfig, shape: _Shape) -> dict[str, int]:
    """Under DeepSpeed. Gradients are fp32; until a step ends, ZeRO-1 also keeps those of the weights' type."""
    ranks, stage, whole = config.world_size, config.strategy.stage, 4 * shape.parameters
    part, low = whole // ranks, shape.weight * shape.parameters
    bucket = config.strategy.reduce_bucket_size * BYTES[config.strategy.reduce_dtype]
    return {
        "weights": low // ranks if stage == 3 else low,
        "gradients": part if stage > 1 else whole + low * (config.micro_steps > 1),
        "master": part,
        "moments": 2 * part,
        "buffers": _masks(config) + (bucket if stage == 3 else 0),
        "update": 2 * part + (low if stage == 1 and config.micro_steps == 1 else 0),
    }


def _masks(config: TrainConfig) -> int:
    """Hugging Face's GPT-Neo has a mask in each layer, a byte an element."""
    return int(config.model.num_layers * config.model.max_position_embeddings**2)


def _stream(config: TrainConfig, shape: _Shape) -> int:
    """The residual stream of a micro-batch."""
    return shape.weight * config.trainer.micro_batch_size * config.data.seq_len * shape.width


def _scores(config: TrainConfig, batch: int) -> int:
    """Elements of the attention scores of a layer."""
    return int(batch * config.model.num_heads * config.data.seq_len**2)


def _layer(config: TrainConfig, shape: _Shape) -> int:
    """What a layer keeps: the stream twice; inputs of the two products, queries, keys, values, the attention's result,
    and the MLP before and after its activation. The mean of a global and a local layer."""
    size, value = config.trainer.micro_batch_size * config.data.seq_len * shape.width, shape.value
    copies = 2 * value if shape.autocast else 0  # queries, keys and values have an input each
    kept = 2 * shape.weight + 14 * value + copies
    if config.attention == "eager":  # queries and keys in fp32, each step of GELU, scores in fp32 and rounded
        return size * (kept + 8 + 11 * value) + (4 + value % 4) * _scores(config, config.trainer.micro_batch_size)
    masks = 0
    if config.attention == "sdpa":  # a local layer: keys and values twice, and the result in another order
        kept += 3 * value // 2
        if config.data.document_mask:  # as numbers, without heads
            masks = 4 * config.trainer.micro_batch_size * config.data.seq_len**2
    return masks + size * kept + 4 * config.trainer.micro_batch_size * config.data.seq_len * config.model.num_heads


def _loss(config: TrainConfig, shape: _Shape) -> int:
    """A chunk of logits; the head, its gradient in fp32 and a part of it; inputs and gradients."""
    tokens = config.trainer.micro_batch_size * (config.data.seq_len - 1)
    if config.model.loss_dtype == "bf16":  # all logits: twice in the loss itself, twice as gradients
        return 4 * BYTES["bf16"] * tokens * shape.vocab
    logits = min(tokens, CHUNK["cuda"]) * shape.vocab * shape.logit
    head = shape.vocab * shape.width * (2 * shape.value + 4)
    return logits + head + tokens * shape.width * (3 * shape.weight + shape.value * (2 if shape.autocast else 1))


def _backward(config: TrainConfig, shape: _Shape) -> int:
    """The head's gradient, that of the stream, and the largest of one layer."""
    size = config.trainer.micro_batch_size * config.data.seq_len * shape.width
    found = shape.weight * shape.vocab * shape.width + size * (shape.weight + 4 * shape.value)
    if config.deepspeed and config.strategy.stage == 2:  # two buckets: one is sent while the other is filled
        found += 2 * config.strategy.reduce_bucket_size * BYTES[config.strategy.reduce_dtype]
    if config.attention == "eager":  # the gradient of the scores, twice; the MLP's activations are gone by then
        found += 6 * _scores(config, config.trainer.micro_batch_size) - size * 24 * shape.value
    return found


def _validation(config: TrainConfig, shape: _Shape) -> int:
    """A chunk of logits, or a layer."""
    batch = config.trainer.eval_micro_batch_size
    size = batch * config.data.seq_len * shape.width
    head = shape.copies + (shape.value * shape.vocab * shape.width if shape.autocast else 0)
    tokens = min(batch * (config.data.seq_len - 1), CHUNK["cuda"])
    logits = tokens * shape.vocab * shape.logit + 2 * shape.weight * size
    if config.model.loss_dtype == "bf16":
        logits = 3 * BYTES["bf16"] * batch * config.data.seq_len * shape.vocab
    layer = size * (2 * shape.weight + 10 * shape.value)
    if config.attention == "eager":
        layer += 10 * _scores(config, batch)
    return head + max(logits, layer)
