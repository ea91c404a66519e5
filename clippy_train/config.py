"""The typed settings of every verb: one home for each key's meaning, unit, default and limits.

Recipe values (learning rate, steps, batch, ...) have no default here: an experiment under `conf/` pins them. Dull
knobs have their default here and are absent from `conf/`. `problems(config)` is pure: it reports everything that is
wrong with a configuration at once and looks at nothing outside it (files and devices are `launch.start`'s).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clippy_train.errors import ConfigError

T = TypeVar("T")
WHITESPACE_TOKENS = ["\t\t", "  ", "    ", "        "]  # the model card's, in its order
PROMPT = "def greet(name):\n  '''A function to greet user. Given a user name it should say hello'''\n"  # the card's
STOP_SEQUENCES = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # those of the paper that introduced HumanEval
Check = tuple[bool, str]  # whether it holds, and what to say where it does not


def key(
    meaning: str,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    text: bool = False,
    maximum: float | None = None,
) -> Any:
    """Declare a key. Limits are inclusive; `text` marks free text, which the command line takes as it is typed."""
    metadata = {"meaning": meaning, "choices": choices, "minimum": minimum, "maximum": maximum, "text": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    name: str = key("name of the run: its folder under run.root, so the same name resumes the same run", text=True)
    root: str = key("folder that holds all runs", "runs", text=True)


MAX_SEED = 2**31 - 1  # numpy's is 2**32 - 1, and ranks add their number
# Keys of `model` that must describe the base model, by their name in the Hugging Face configuration.
SHAPE = ("num_layers", "hidden_size", "num_heads", "window_size", "max_position_embeddings")


@dataclass
class ModelConfig:
    base: str | None = key("folder or hub name of the model to start from; null starts from random weights", text=True)
    base_optimizer: str = key(
        "whether a new run goes on with the base's step and Adam moments (optimizer.safetensors, from clippy import); "
        "data start at the beginning all the same",
        "ignore",
        choices=("ignore", "continue"),
    )
    num_layers: int = key("transformer blocks, alternating global and local attention", minimum=1)
    hidden_size: int = key("width of the residual stream", minimum=1)
    num_heads: int = key("attention heads", minimum=1)
    window_size: int = key("tokens that a local layer sees, itself included", minimum=1)
    max_position_embeddings: int = key("longest sequence in tokens", minimum=2)
    vocab_size: int = key("vocabulary before new tokens; with base=null the tokenizer decides", minimum=1)
    attention: str = key(
        "how attention is computed (docs/performance.md); auto is varlen on CUDA in bf16, else sdpa; eager is Hugging "
        "Face's forward pass",
        "auto",
        choices=("auto", "eager", "sdpa", "flex", "varlen"),
    )
    compile: bool = key("compile the forward and backward pass; takes a minute or two at the start", False)
    checkpoint_activations: bool = key(
        "recompute each layer's activations in the backward pass: less memory, about a third more time", False
    )
    loss_dtype: str = key(
        "precision of the log-softmax over the vocabulary; bf16, as in the original, rounds every token's loss",
        "fp32",
        choices=("fp32", "bf16"),
    )


@dataclass
class TokenizerConfig:
    base: str | None = key("folder or hub name of the tokenizer; null takes model.base", None, text=True)
    whitespace_tokens: list[str] = key("tokens added for runs of white space; none are added twice", WHITESPACE_TOKENS)
    matching: str = key(
        "which white-space token wins where several fit: longest, or first_listed as in the released checkpoints",
        "longest",
        choices=("longest", "first_listed"),
    )
    new_row_init: str = key(
        "initial embedding of a new token: a copy of the tab token's row, or the mean of the token's former pieces",
        "tab",
        choices=("tab", "mean_of_pieces"),
    )


@dataclass
class FilterConfig:
    """Which documents are kept. Every rule is off unless set; what a document does not say counts as not fitting."""

    extensions: list[str] = key("file endings to keep: [.py,.c]; none keeps all", [])
    languages: list[str] = key(
        "programming languages to keep, as Pygments names them: [Python,C++]; none keeps all", []
    )
    licences: list[str] = key("licences to keep, as SPDX ids: [MIT,Apache-2.0]; none keeps all", [])
    min_stars: int | None = key("fewest stars of a document's repository", None, minimum=0)
    min_bytes: int | None = key("smallest document, in bytes of UTF-8", None, minimum=0)
    max_bytes: int | None = key("largest document, in bytes of UTF-8", None, minimum=1)
    max_line_length: int | None = key("longest line, in characters (usual: 1000)", None, minimum=1)
    max_mean_line_length: float | None = key(
        "largest mean length of lines, in characters (usual: 100)", None, minimum=0
    )
    min_alphanumeric: float | None = key(
        "smallest share of letters and digits (usual: 0.25)", None, minimum=0, maximum=1
    )


@dataclass
class SourceConfig:
    """Where documents come from."""

    path: str | None = key(
        "where the corpus lies: a folder with train/ and validation/, or a pattern such as /data/{split}/*.parquet; a "
        "path, or a URL that fsspec knows (https://, s3://, hf://datasets/...)",
        None,
        text=True,
    )
    hub: str | None = key("dataset of the hub instead of data.path: NAME or NAME@REVISION", None, text=True)
    hub_config: str | None = key("configuration of the hub dataset; null takes its default", None, text=True)
    filter: FilterConfig = field(default_factory=FilterConfig)
    text_column: str = key("name of the text field of a document", "text", text=True)


@dataclass
class DataConfig(SourceConfig):
    """What a run reads, and in what order."""

    validation_split: str = key("name of the split that is validated on", "validation", text=True)
    seq_len: int = key("tokens in a block", minimum=2)
    streams: int = key(
        "logical streams that the corpus is read in: part of the order of the data, so keep it for the life of a run; "
        "global_batch_size must be a multiple of it, and it of the number of processes",
        minimum=1,
    )
    window: int = key("documents that a stream reads ahead and permutes", 256, minimum=1)
    num_workers: int = key("loader processes for each rank; 0 tokenises in the training process", 1, minimum=0)
    eos_between_documents: bool = key("end every document with the end-of-text token (the original did not)", True)
    document_mask: bool = key(
        "keep attention inside a document (the original did not); positions count from the start of the block all the "
        "same",
        False,
    )
    max_bad_fraction: float = key("share of unreadable lines beyond which the run stops", 0.01, minimum=0.0)


@dataclass
class OptimConfig:
    name: str = key("optimizer", choices=("adamw", "adafactor"))
    lr: float = key("peak learning rate; adafactor multiplies it by each tensor's root mean square", minimum=0.0)
    betas: list[float] | None = key("AdamW's decay rates of the first and second moment", None)
    eps: float | None = key("AdamW's epsilon, outside the square root", None, minimum=0.0)
    weight_decay: float | None = key(
        "AdamW's decoupled weight decay on everything but biases and LayerNorm scales", None, minimum=0.0
    )
    warmup_steps: int = key("steps of linear warm-up from 0", minimum=0)
    decay_steps: int = key("steps of cosine decay after the warm-up", minimum=0)
    min_lr_ratio: float = key("learning rate after the decay as a share of the peak", minimum=0.0)
    grad_clip: float = key("largest global gradient norm; 0 turns clipping off", minimum=0.0)


@dataclass
class StrategyConfig:
    name: str = key("how ranks share the work", choices=("single", "ddp", "zero"))
    stage: int = key("ZeRO stage: what is partitioned (1 optimizer, 2 + gradients, 3 + weights)", 0, minimum=0)
    reduce_dtype: str = key(
        "precision in which ranks sum their gradients: fp32 as in the original; bf16 halves the traffic and rounds the "
        "sum (simulated: 0.4 % off at 8 ranks, 2.3 % at 512)",
        "fp32",
        choices=("fp32", "bf16"),
    )
    reduce_bucket_size: int = key(
        "gradient elements reduced at once; well below the model's size, so that reducing overlaps with backward",
        20_000_000,
        minimum=1,
    )


@dataclass
class TrainerConfig:
    max_steps: int = key("optimizer steps of the whole run", minimum=1)
    global_batch_size: int = key("sequences in an optimizer step, over all ranks", minimum=1)
    micro_batch_size: int = key("sequences in one forward and backward pass of a rank", minimum=1)
    eval_micro_batch_size: int = key("sequences in one validation pass of a rank", minimum=1)
    accelerator: str = key(
        "device that ranks run on; auto is cuda where it is visible", "auto", choices=("auto", "cpu", "cuda")
    )
    devices: int | None = key(
        "ranks on each node; null: its CUDA devices (those of the Slurm job, in one), or on CPU the job's tasks on a "
        "node, or one",
        None,
        minimum=1,
    )
    num_nodes: int | None = key("nodes; null: those of the Slurm job, or one", None, minimum=1)
    precision: str = key("arithmetic of the forward and backward pass", choices=("bf16", "fp32"))
    log_every_steps: int = key("steps between two logged rows", minimum=1)
    val_every_steps: int = key("steps between two validations", minimum=1)
    val_samples: int = key("sequences of the validation split that a validation uses", minimum=1)
    audit: bool = key(
        "log every step, with a digest of its token ids (data/digest), and write to ledger.jsonl what it was cut from",
        False,
    )
    watchdog_seconds: int = key(
        "longest time without progress of a rank, six times that at the start, in validation and in a save; then the "
        "run ends and the stacks of all ranks lie in its folder; 0 never ends it",
        600,
        minimum=0,
    )
    profile_steps: int = key(
        "steps that torch's profiler traces, from the fourth of this life on, into profile/ of the run folder; 0: none",
        0,
        minimum=0,
    )
    peak_tflops: float | None = key(
        "dense peak of one device at trainer.precision in TFLOP/s, which throughput/mfu is a share of; null: that of "
        "the GPU in bf16 if it is a common one, else there is no MFU",
        None,
        minimum=1e-9,
    )
    deterministic: bool = key("refuse operations whose result varies from run to run", True)


@dataclass
class CheckpointConfig:
    every_steps: int = key("steps between two checkpoints", minimum=1)
    every_minutes: float | None = key(
        "minutes after which a checkpoint is due at the latest; null: steps decide", None, minimum=0
    )
    asynchronous: bool = key(
        "write checkpoints behind training, which stops only while state is copied to host memory; takes that memory",
        True,
    )
    keep_last: int = key("newest checkpoints kept; older ones are deleted after a newer one is complete", minimum=1)
    keep_every: int | None = key(
        "checkpoints of every so many steps are never deleted; null: none is kept", None, minimum=1
    )
    max_failed_saves: int = key("failed saves in a row after which a run stops; until then it goes on", 3, minimum=1)


@dataclass
class LauncherConfig:
    name: str = key(
        "what starts the ranks: this command on this machine, srun in a Slurm job, or the torchrun that runs this "
        "command; auto is whichever of them it runs under",
        "auto",
        choices=("auto", "local", "slurm", "torchrun"),
    )
    preflight: bool = key(
        "slurm: before training, count the devices of every node and time an all-reduce; takes seconds", True
    )
    parallel: int | None = key(
        "sweep: trials that run at the same time; null: one on this machine, all of them on Slurm", None, minimum=1
    )
    sbatch: str = key("sweep with launcher=slurm: options of sbatch for each trial's job", "", text=True)
    max_requeues: int = key("slurm: times that an interrupted job is put back into the queue", 100, minimum=0)


@dataclass
class SweepConfig:
    trials: int | None = key(
        "sweep: trials whose values Optuna chooses; null runs every combination of the values given", None, minimum=1
    )


@dataclass
class LoggerConfig:
    tensorboard: bool = key("write TensorBoard events to the run folder", True)
    wandb: bool = key(
        "log to Weights & Biases as well: needs clippy_train[wandb], and WANDB_API_KEY or WANDB_MODE=offline", False
    )
    sample_prompts: list[str] = key(
        "prompts that the model in training completes, greedily, at every validation; [] for none", [PROMPT]
    )
    sample_tokens: int = key("tokens of such a completion; each costs a forward pass of a row", 64, minimum=1)
    hparams: list[str] = key("NAME=VALUE of what TensorBoard's HPARAMS tab compares; a sweep sets what it varies", [])


@dataclass
class TrainConfig:
    """`clippy train`."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    resume: str = key(
        "auto continues from the last complete checkpoint if there is one, must needs one, never refuses one; "
        "or a folder: the checkpoint that a run starts from which has none of its own",
        "auto",
        text=True,
    )
    seed: int = key("seed of the data order, of new weights and of dropout", 42, minimum=0, maximum=MAX_SEED)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root) / self.run.name

    @property
    def nodes_and_devices(self) -> tuple[int, int]:
        """Nodes, and ranks on each of them."""
        nodes, devices = self.trainer.num_nodes, self.trainer.devices
        assert nodes is not None
        assert devices is not None, "launch.resources fills these in when a configuration is composed"
        return nodes, devices

    @property
    def world_size(self) -> int:
        nodes, devices = self.nodes_and_devices
        return nodes * devices

    @property
    def deepspeed(self) -> bool:
        """Whether ranks run under DeepSpeed. Its ZeRO flattens parameters into one vector: Adafactor needs shapes."""
        return self.strategy.name == "zero" and self.optim.name != "adafactor"

    @property
    def attention(self) -> str:
        """The kernel that `model.attention` stands for."""
        if self.model.attention != "auto":
            return self.model.attention
        return "varlen" if self.trainer.accelerator == "cuda" and self.trainer.precision == "bf16" else "sdpa"

    @property
    def micro_steps(self) -> int:
        """Gradient accumulation: forward and backward passes of a rank in one optimizer step."""
        return self.trainer.global_batch_size // (self.trainer.micro_batch_size * self.world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.trainer.global_batch_size * self.data.seq_len


@dataclass
class DedupConfig:
    """Which documents count as seen before. The first one is kept."""

    exact: bool = key(
        "leave out a document with the same sequence of words as an earlier one, whatever lies between them, as the "
        "original did; takes some 100 bytes of memory for each document",
        True,
    )
    near: bool = key(
        "leave out a document that is similar to an earlier one (MinHash LSH); takes kilobytes of memory for each",
        False,
    )
    threshold: float = key(
        "dedup.near: Jaccard similarity of two documents' runs of 5 words from which they count as similar",
        0.7,
        minimum=0,
        maximum=1,
    )
    permutations: int = key(
        "dedup.near: hash functions of a MinHash; more tell similarities more exactly", 256, minimum=2
    )


@dataclass
class CorpusConfig:
    """`clippy corpus`."""

    src: list[str] = key(
        "folders of git repositories or of packages (SRC... on the command line); without any, and without hub, "
        "the source code of this Python",
        [],
    )
    hub: str | None = key(
        "dataset to read: NAME or NAME@REVISION on the hub, or a folder of jsonl, parquet, ...", None, text=True
    )
    hub_config: str | None = key("configuration of the hub dataset; null takes its default", None, text=True)
    hub_split: str = key("split of the hub dataset to read", "train", text=True)
    text_column: str = key("column of the hub dataset that holds the text", "text", text=True)
    out: str = key("new folder for the shards", text=True)
    filter: FilterConfig = field(default_factory=lambda: FilterConfig(min_bytes=64, max_bytes=1_000_000))
    dedup: DedupConfig = field(default_factory=DedupConfig)
    validation_fraction: float = key(
        "share of repositories (or packages) held out for validation, at least one of them", 0.05, minimum=0.0
    )
    test_fraction: float = key(
        "share of repositories (or packages) held out for testing, at least one of them", 0.05, minimum=0.0
    )
    shard_bytes: int = key("largest shard, in bytes before compression", 8_000_000, minimum=1)
    seed: int = key("seed of the split and of the order of documents", 42, minimum=0, maximum=MAX_SEED)


@dataclass
class ExtendConfig:
    """`clippy extend`."""

    base: str = key("folder or hub name of the model and tokenizer to extend", text=True)
    out: str = key("new folder for the extended model and tokenizer", text=True)
    whitespace_tokens: list[str] = key("tokens to add", WHITESPACE_TOKENS)
    matching: str = key("see tokenizer.matching of train", "longest", choices=("longest", "first_listed"))
    new_row_init: str = key("see tokenizer.new_row_init of train", "tab", choices=("tab", "mean_of_pieces"))


@dataclass
class ImportConfig:
    """`clippy import`."""

    flax: str = key("checkpoint folder of the original Flax script: config.json, flax_model.msgpack, ...", text=True)
    out: str = key("new folder for the Hugging Face model", text=True)


@dataclass
class CheckpointsConfig:
    """`clippy checkpoint`."""

    action: str = key("ls lists them by their sizes, verify reads every byte", choices=("ls", "verify"))
    run: str = key("run folder", text=True)


@dataclass
class ExportConfig:
    """`clippy export`."""

    run: str = key("run folder", text=True)
    out: str = key("new folder for the Hugging Face model", text=True)
    step: str | None = key(
        "step to export, or best (the lowest val/bits_per_byte); null takes the last complete checkpoint",
        None,
        text=True,
    )
    dtype: str = key("precision of the exported weights", "fp32", choices=("fp32", "bf16"))
    evaluations: list[str] = key("results for the model card, from clippy evaluate out=FILE on these weights", [])
    push_to: str | None = key(
        "repository of the hub (NAME/NAME) to publish the folder in; takes the token from HF_TOKEN", None, text=True
    )
    public: bool = key("whether push_to may be seen by everybody", False)


@dataclass
class GenerateConfig:
    """`clippy generate`."""

    model: str = key("folder or hub name of a model with its tokenizer", text=True)
    prompt: str | None = key("text to continue; - reads standard input", None, text=True)
    file: str | None = key("file with the text to continue, instead of prompt", None, text=True)
    max_new_tokens: int = key("longest completion in tokens", 128, minimum=1)
    temperature: float = key("sampling temperature; 0 is greedy", 0.0, minimum=0.0)
    top_p: float = key("share of probability mass to sample from", 0.95, minimum=0.0, maximum=1.0)
    num_samples: int = key("completions; a single one is shown while it grows", 1, minimum=1)
    stop: str = key(
        "where a completion ends before max_new_tokens: at the end of the function that it writes, or none",
        "function",
        choices=("function", "none"),
    )
    seed: int = key("seed of the sampling", 42, minimum=0, maximum=MAX_SEED)


@dataclass
class EvaluateConfig:
    """`clippy evaluate`."""

    task: str = key(
        "perplexity: loss and bits per byte on a split; humaneval: share of programming problems that samples solve",
        choices=("perplexity", "humaneval"),
    )
    model: list[str] = key("folders or hub names of models with their tokenizers; [A,B] compares them", [])
    out: str | None = key("file for the results as JSON", None, text=True)
    batch_size: int = key("sequences in one forward pass", 8, minimum=1)
    data: SourceConfig = field(default_factory=lambda: SourceConfig())
    split: str = key("perplexity: split to score", "validation", text=True)
    seq_len: int | None = key("perplexity: tokens in a row; null takes what all models can", None, minimum=2)
    max_rows: int | None = key(
        "perplexity: rows to score, from the start of the split; null takes all", None, minimum=1
    )
    stride: int | None = key(
        "perplexity: null scores blocks, as validation during training does; a number scores each document by itself, "
        "in windows of seq_len tokens that move on by so many, of which a window scores the new ones",
        None,
        minimum=1,
    )
    eos_between_documents: bool = key("perplexity: end documents in blocks with the end-of-text token", True)
    problems: str | None = key(
        "humaneval: file in HumanEval's format (.jsonl, .jsonl.gz), or a dataset of the hub", None, text=True
    )
    samples: str | None = key(
        "humaneval: file of samples (JSON lines of task_id and completion); with a model, what it lacks is added to it",
        None,
        text=True,
    )
    n: int = key("humaneval: samples for each problem", 1, minimum=1)
    ks: list[int] = key("humaneval: k of pass@k; those above the number of samples are left out", [1, 10, 100])
    temperature: float = key("humaneval: sampling temperature; 0 is greedy", 0.0, minimum=0.0)
    top_p: float = key("humaneval: share of probability mass to sample from", 0.95, minimum=0.0, maximum=1.0)
    max_new_tokens: int = key("humaneval: longest completion in tokens", 384, minimum=1)
    stop: list[str] = key("humaneval: strings that end a completion", STOP_SEQUENCES)
    seed: int = key("humaneval: seed of the sampling", 42, minimum=0, maximum=MAX_SEED)
    allow_code_execution: bool = key(
        "humaneval: run the samples, which are programs that nobody has read, to score them (docs/evaluate.md tells "
        "what the sandbox does not stop)",
        False,
    )
    timeout: float = key("humaneval: seconds for one sample and its checks", 5.0, minimum=0.1)
    memory_mb: int = key("humaneval: memory of one process of a sample, in MB", 1024, minimum=64)
    workers: int | None = key("humaneval: samples run at a time; null takes the number of cores", None, minimum=1)


@dataclass
class DemoConfig:
    """`clippy demo`."""

    root: str = key("folder for the demo's corpus and tokenizer; its name is the run's as well", "demo", text=True)
    vocab_size: int = key("size of the byte-level BPE before the white-space tokens", 4096, minimum=300)
    prompt: str = key("prompt for the trained model (the model card's)", PROMPT, text=True)


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every key of a schema as (dotted name, field), sections flattened."""
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield from keys(cast(type, item.type), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def typed(composed: DictConfig, schema: type[T]) -> T:
    """A composed configuration as an instance of its schema.

    Raises:
        ConfigError: a key is not set, or has no valid value; all of them are named at once.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        hint = "; choose a recipe with experiment=NAME" if schema is TrainConfig else ""
        raise ConfigError(f"not set: {', '.join(missing)}. Add KEY=VALUE{hint} (--help explains every key)")
    config = cast(T, OmegaConf.to_object(composed))
    found = limits_broken(config)
    if isinstance(config, TrainConfig):
        found += problems(config)
    if isinstance(config, EvaluateConfig):
        found += evaluation_problems(config)
    if found:
        raise ConfigError("\n".join(found))
    return config


def limits_broken(config: Any) -> list[str]:
    """Values outside the `choices` or the limits that their key declares."""
    found = []
    for name, item in keys(type(config)):
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        choices, minimum, maximum = (item.metadata[part] for part in ("choices", "minimum", "maximum"))
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name}={value}: must be a finite number")
        if choices and value not in choices:
            found.append(f"{name}={value}: choose one of {', '.join(choices)}")
        if minimum is not None and value is not None and value < minimum:
            found.append(f"{name}={value}: must be at least {minimum}")
        if maximum is not None and value is not None and value > maximum:
            found.append(f"{name}={value}: must be at most {maximum}")
    return found


def problems(config: TrainConfig) -> list[str]:
    """What contradicts what in a training configuration: one line each, naming the keys and the fix."""
    groups = (
        _model_checks,
        _kernel_checks,
        _data_checks,
        _batch_checks,
        _optimizer_checks,
        _strategy_checks,
        _checkpoint_checks,
        _logger_checks,
    )
    checks = chain.from_iterable(group(config) for group in groups)
    return [message for holds, message in checks if not holds]


def evaluation_problems(config: EvaluateConfig) -> list[str]:
    """What contradicts what in an evaluation."""
    group = _perplexity_checks if config.task == "perplexity" else _humaneval_checks
    return [message for holds, message in group(config) if not holds]


def _perplexity_checks(config: EvaluateConfig) -> Iterator[Check]:
    yield bool(config.model), "task=perplexity needs model=DIR, or model=[A,B]"
    yield from _data_checks(config)


def _humaneval_checks(config: EvaluateConfig) -> Iterator[Check]:
    yield bool(config.problems), "task=humaneval needs problems=FILE"
    yield len(config.model) <= 1, f"model={config.model}: task=humaneval takes one model"
    yield bool(config.samples), "task=humaneval needs samples=FILE: where samples are, or are to be written"
    yield all(k >= 1 for k in config.ks), f"ks={config.ks}: each must be at least 1"
    yield (
        bool(config.model) or config.allow_code_execution,
        "scoring samples runs them: add allow_code_execution=true if you mean it, after reading docs/evaluate.md "
        "(or model=DIR to generate samples only)",
    )


def _model_checks(config: TrainConfig) -> Iterator[Check]:
    model, data, name = config.model, config.data, config.run.name
    yield (
        bool(name) and name == Path(name).name and name not in (".", ".."),
        f"run.name={name!r}: must be one folder name, without slashes",
    )
    yield (
        data.seq_len <= model.max_position_embeddings,
        f"data.seq_len={data.seq_len} is longer than model.max_position_embeddings={model.max_position_embeddings}: "
        "lower data.seq_len",
    )
    yield (
        model.hidden_size % max(1, model.num_heads) == 0,
        f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}",
    )
    yield (
        model.loss_dtype == "fp32" or config.trainer.precision == "bf16",
        f"model.loss_dtype={model.loss_dtype} rounds what trainer.precision={config.trainer.precision} keeps: set "
        "model.loss_dtype=fp32",
    )
    yield (
        model.base_optimizer == "ignore" or (model.base is not None and config.optim.name == "adamw"),
        f"model.base_optimizer={model.base_optimizer} needs a model.base and optim=adamw, but model.base={model.base} "
        f"and optim.name={config.optim.name}",
    )


def _kernel_checks(config: TrainConfig) -> Iterator[Check]:
    model, trainer = config.model, config.trainer
    yield (
        model.attention not in ("flex", "varlen") or trainer.accelerator == "cuda",
        f"model.attention={model.attention} runs on CUDA only, but trainer.accelerator={trainer.accelerator}: set "
        "model.attention=auto",
    )
    yield (
        model.attention != "varlen" or trainer.precision == "bf16",
        f"model.attention=varlen computes in bf16 only, but trainer.precision={trainer.precision}: set "
        "model.attention=auto",
    )
    yield (
        not config.data.document_mask or model.attention not in ("eager", "flex"),
        f"data.document_mask=true: model.attention={model.attention} has no mask for documents; set "
        "model.attention=auto",
    )
    yield (
        not config.data.document_mask or config.data.eos_between_documents,
        "data.document_mask=true finds documents by the token that ends them: set data.eos_between_documents=true",
    )
    yield (
        not model.compile or config.strategy.stage != 3,
        "model.compile=true: ZeRO-3 fetches weights between modules, which breaks every graph; choose strategy=zero2, "
        "zero1 or ddp, or set model.compile=false",
    )


def _data_checks(config: Any) -> Iterator[Check]:
    data: SourceConfig = config.data
    yield (
        bool(data.path) != bool(data.hub),
        f"data.path={data.path} and data.hub={data.hub}: set one of them, and the other to null",
    )
    yield (
        bool(data.hub) or data.hub_config is None,
        f"data.hub_config={data.hub_config} is a configuration of data.hub, which is not set",
    )


def _batch_checks(config: TrainConfig) -> Iterator[Check]:
    trainer, streams = config.trainer, config.data.streams
    per_pass = trainer.micro_batch_size * config.world_size
    yield (
        trainer.global_batch_size % max(1, per_pass) == 0,
        f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of trainer.micro_batch_size x ranks "
        f"= {trainer.micro_batch_size} x {config.world_size} = {per_pass}: change one of them",
    )
    yield (
        trainer.global_batch_size % max(1, streams) == 0,
        f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of data.streams={streams}: "
        "every step takes the same number of blocks from every stream",
    )
    yield (
        streams % max(1, config.world_size) == 0,
        f"data.streams={streams} is not a multiple of the {config.world_size} ranks "
        "(trainer.num_nodes x trainer.devices): every rank owns the same number of streams. Change the ranks, or, for "
        f"a run that has not started yet, set data.streams={nearest_streams(config)}",
    )


def nearest_streams(config: TrainConfig) -> int:
    """The fewest streams, no fewer than now, that every rank can own the same number of."""
    ranks = max(1, config.world_size)
    return -(-config.data.streams // ranks) * ranks


def _optimizer_checks(config: TrainConfig) -> Iterator[Check]:
    optim = config.optim
    yield (
        optim.betas is None or (len(optim.betas) == 2 and all(0 <= beta < 1 for beta in optim.betas)),
        f"optim.betas={optim.betas}: must be two numbers in [0, 1)",
    )
    for adamw_key in ("betas", "eps", "weight_decay"):
        is_set = getattr(optim, adamw_key) is not None
        yield (
            is_set == (optim.name == "adamw"),
            f"optim.{adamw_key} is {'set' if is_set else 'not set'}, but only AdamW has it and optim.name is "
            f"{optim.name}: choose optim=adamw or optim=adafactor, which sets all of an optimizer's keys",
        )
    yield optim.min_lr_ratio <= 1, f"optim.min_lr_ratio={optim.min_lr_ratio}: must be at most 1"


def _strategy_checks(config: TrainConfig) -> Iterator[Check]:
    strategy = config.strategy
    yield (
        (strategy.name == "zero") == (strategy.stage in (1, 2, 3)),
        f"strategy.stage={strategy.stage} does not fit strategy.name={strategy.name}: choose strategy=zero1, zero2, "
        "zero3, ddp or single",
    )
    yield (
        config.optim.name != "adafactor" or strategy.stage <= 1,
        f"strategy=zero{strategy.stage} cuts weights or gradients anywhere, but optim=adafactor needs whole tensors: "
        "choose strategy=zero1 or ddp",
    )
    yield (
        strategy.reduce_dtype == "fp32" or strategy.name != "ddp" or config.trainer.accelerator == "cuda",
        "strategy.reduce_dtype=bf16 with strategy=ddp works on CUDA only: set strategy.reduce_dtype=fp32, or choose a "
        "zero stage",
    )
    yield (
        strategy.name != "single" or config.world_size == 1,
        f"strategy=single runs one rank, but trainer.num_nodes x trainer.devices is {config.world_size}: "
        "choose strategy=ddp or a zero stage, or trainer.devices=1",
    )


def _checkpoint_checks(config: TrainConfig) -> Iterator[Check]:
    every, kept = config.checkpoint.every_steps, config.checkpoint.keep_every
    yield (
        kept is None or kept % max(1, every) == 0,
        f"checkpoint.keep_every={kept} is not a multiple of checkpoint.every_steps={every}: some would not be saved",
    )


def _logger_checks(config: TrainConfig) -> Iterator[Check]:
    yield all(config.logger.sample_prompts), "logger.sample_prompts: a prompt is empty; [] turns samples off"


def save(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration that ranks read."""
    OmegaConf.save(OmegaConf.structured(config), path)


def load(path: Path) -> TrainConfig:
    """Read what `save` wrote."""
    try:
        return typed(cast(DictConfig, OmegaConf.merge(TrainConfig, OmegaConf.load(path))), TrainConfig)
    except (OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path} is not a configuration of this version: {error}") from error
