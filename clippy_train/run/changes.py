"""What becomes of a setting that changes between two attempts of a run: the one table that says so for every key.

A change is applied from the next update on, or refused. Refused is what would mix two models, two orders of the data or
two optimizers in one run, and what only the start of a run reads: there a new value would silently do nothing.
"""

from pathlib import Path

from clippy_train.config import DataConfig, TrainConfig, as_yaml, load, values
from clippy_train.errors import ConfigError
from clippy_train.run.folder import CONFIG

ORDER, MODEL = "it would be another order of the data", "it would be another model"
OPTIMIZER = "it would be another optimizer"
START = "only the start of a run reads it"

# A name covers the keys below it.
REFUSED = {
    "seed": ORDER,
    "data.filter": ORDER,
    "data.text_column": ORDER,
    "data.prompt_column": ORDER,
    "data.truncate": ORDER,
    "data.packing": ORDER,
    "data.seq_len": ORDER,
    "data.streams": ORDER,
    "data.window": ORDER,
    "data.eos_between_documents": ORDER,
    "data.fim_rate": ORDER,
    "data.fim_spm_rate": ORDER,
    "data.fim_characters": ORDER,
    "trainer.global_batch_size": ORDER,
    "tokenizer.whitespace_tokens": ORDER,
    "tokenizer.matching": ORDER,
    "tokenizer.fim_tokens": ORDER,
    "model.base": MODEL,
    "model.num_layers": MODEL,
    "model.hidden_size": MODEL,
    "model.num_heads": MODEL,
    "model.window_size": MODEL,
    "model.max_position_embeddings": MODEL,
    "model.vocab_size": MODEL,
    "optim.name": OPTIMIZER,
    "model.base_optimizer": START,
    "tokenizer.new_row_init": START,
}
# Applied if the same content is found there: `run.identity` and the fingerprint of the tokenizer decide.
MOVED = ("data.path", "data.hub", "data.hub_config", "data.sources", "data.source_temperature", "tokenizer.base")
# Applied, and not about the steps that an attempt makes.
STARTED = (
    "run.name", "run.root", "resume", "launcher.name", "launcher.preflight", "launcher.parallel", "launcher.sbatch",
    "launcher.max_requeues", "launcher.start_seconds", "sweep.trials", "sweep.pruner", "logger.hparams",
)  # fmt: skip
APPLIED = (
    "model.attention", "model.compile", "model.checkpoint_activations", "model.loss_dtype",
    "data.skip_steps", "data.validation_split", "data.val_problems",
    "data.num_workers", "data.document_mask", "data.max_bad_fraction",
    "optim.lr", "optim.betas", "optim.eps", "optim.weight_decay", "optim.schedule",
    "optim.warmup_steps", "optim.stable_steps", "optim.decay_steps",
    "optim.min_lr_ratio", "optim.grad_clip",
    "strategy.name", "strategy.stage", "strategy.reduce_dtype", "strategy.reduce_bucket_size",
    "trainer.max_steps", "trainer.max_epochs", "trainer.micro_batch_size", "trainer.eval_micro_batch_size",
    "trainer.accelerator", "trainer.devices",
    "trainer.num_nodes", "trainer.precision", "trainer.log_every_steps", "trainer.val_every_steps",
    "trainer.val_samples", "trainer.audit", "trainer.watchdog_seconds", "trainer.profile_steps",
    "trainer.peak_tflops", "trainer.deterministic",
    "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.asynchronous", "checkpoint.keep_last",
    "checkpoint.keep_every", "checkpoint.max_failed_saves",
    "logger.tensorboard", "logger.wandb", "logger.sample_prompts", "logger.sample_tokens",
)  # fmt: skip


def changes(run_dir: Path, config: TrainConfig, step: int) -> list[str]:
    """A line for each difference to the last attempt in a run's folder, or one that says that its record is missing.

    Args:
        step: the last one that was made.

    Raises:
        ConfigError: a difference is refused. Names each of those.
    """
    recorded = run_dir / CONFIG
    if not recorded.exists():
        return [f"{recorded} is missing: settings are not compared"]
    last = load(recorded)
    then, now = values(last), values(config)
    changed = {
        name: f"{name} was {as_yaml(then[name])}, is {as_yaml(now[name])}" for name in now if then[name] != now[name]
    }
    refused = [f"{line}: refused: {why}" for name, line in changed.items() if (why := refusal(name))]
    if passed_over(last.data, step) != passed_over(config.data, step):
        refused.append(
            f"{changed['data.skip_steps']}: refused for the data before step {step + 1}, which has been read"
        )
    if refused:
        hint = f"restore what {recorded} has, or start a new run with another run.name"
        raise ConfigError("\n".join([*refused, hint]))
    same = dict.fromkeys(MOVED, ", where the content is the same")
    return [f"{line}: applied from step {step + 1} on{same.get(name, '')}" for name, line in changed.items()]


def refusal(name: str) -> str | None:
    """Why another value of a key is refused; None if it is not."""
    return next((why for refused, why in REFUSED.items() if f"{name}.".startswith(f"{refused}.")), None)


def passed_over(data: DataConfig, step: int) -> list[int]:
    """What `data.skip_steps` has passed over before `step` was made."""
    last = data.batch_of(step)
    return [each for batches in data.skipped for each in range(batches.start, min(batches.stop, last))]
