"""What a training will take, from its configuration alone: arithmetic, no device, no network."""

from clippy_train.config import TrainConfig
from clippy_train.optim import lr_at


def parameters(config: TrainConfig, vocab_size: int) -> int:
    """Parameters of a GPT-Neo: embeddings (the head is tied), blocks of 12 d^2 + 10 d, final LayerNorm."""
    width, positions = config.model.hidden_size, config.model.max_position_embeddings
    block = 12 * width**2 + 10 * width
    return (vocab_size + positions) * width + config.model.num_layers * block + 2 * width


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


def plan(config: TrainConfig) -> list[tuple[str, str]]:
    """Rows of the plan: what will be trained, on how much, with what."""
    trainer, optim, model = config.trainer, config.optim, config.model
    vocab_size = model.vocab_size + len(config.tokenizer.whitespace_tokens)
    count = parameters(config, vocab_size)
    sizes = state_bytes(count, config)
    kept, size = checkpoints_kept(config), f"{sizes['checkpoint'] / 1e9:,.3g} GB"
    return [
        ("run folder", str(config.run_dir)),
        ("start from", model.base or "random weights"),
        ("tokenizer", f"{config.tokenizer.base or model.base}, {vocab_size:,} tokens"),
        ("recipe", rules(config)),
        ("model", f"GPT-Neo, {model.num_layers} layers of {model.hidden_size}, {count / 1e6:,.1f} M parameters"),
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
        ("run", f"{trainer.max_steps:,} steps = {trainer.max_steps * config.tokens_per_step / 1e9:,.4g} B tokens"),
        (
            "learning rate",
            f"0 -> {optim.lr:g} in {optim.warmup_steps} steps, cosine to "
            f"{lr_at(optim.warmup_steps + optim.decay_steps, optim):g} in {optim.decay_steps}, then constant",
        ),
        (
            "validation",
            f"{trainer.val_samples:,} sequences = {trainer.val_samples * config.data.seq_len / 1e6:,.4g} M tokens "
            f"(or the whole split) every {trainer.val_every_steps} steps",
        ),
        ("states on a device", f"{sizes['device'] / 1e9:,.3g} GB (activations come on top)"),
        (
            "checkpoints",
            f"{when_saved(config)}, {size} each; at most {kept} kept and one being written: "
            f"{sizes['checkpoint'] * (kept + 1) / 1e9:,.3g} GB",
        ),
    ]


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
    return f"{config.tokenizer.matching} white space, {end}, loss in {config.model.loss_dtype}"
