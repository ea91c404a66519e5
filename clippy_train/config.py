"""The typed settings of every verb: one home for each key's meaning, unit, default and limits.

Recipe values (learning rate, steps, batch sizes, ...) have no default here: an experiment in `conf/` sets them. All
other keys have their default here and do not appear in `conf/`. `training_problems` and `evaluation_problems` are pure:
they report everything wrong with a configuration at once, and read neither files nor devices (`launch.start` does).
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clippy_train.errors import ConfigError, first_line
from clippy_train.files import atomic_write

T = TypeVar("T")
WHITESPACE_TOKENS = ["\t\t", "  ", "    ", "        "]  # the model card's, in its order
PROMPT = "def greet(name):\n  '''A function to greet user. Given a user name it should say hello'''\n"  # the card's
STOP_SEQUENCES = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # from the paper that introduced HumanEval
MAX_SEED = 2**31 - 1  # numpy's limit is 2**32 - 1, and each rank adds its number
# Keys of `model` that must match the base model, as the Hugging Face configuration names them.
SHAPE = ("num_layers", "hidden_size", "num_heads", "window_size", "max_position_embeddings")


def key(
    meaning: str,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    text: bool = False,
    maximum: float | None = None,
) -> Any:
    """Declare a key. Limits are inclusive; `text` marks free text, which needs no quoting on the command line."""
    metadata = {"meaning": meaning, "choices": choices, "minimum": minimum, "maximum": maximum, "text": text}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# The docstring of a section is its heading in the help and in docs/configuration.md.


@dataclass
class RunConfig:
    """The run and its folder."""

    name: str = key("Name of the run and of its folder in run.root; the same name resumes the same run.", text=True)
    root: str = key("Folder that holds all runs.", "runs", text=True)


@dataclass
class ModelConfig:
    """The model, and how it is computed."""

    base: str | None = key("Model to start from, a folder or a hub name; null starts from random weights.", text=True)
    base_optimizer: str = key(
        "Whether a new run continues at the base model's step with its Adam moments (optimizer.safetensors, written by "
        "clippy import). Data start at the beginning either way.",
        "ignore",
        choices=("ignore", "continue"),
    )
    num_layers: int = key("Transformer blocks, alternating global and local attention.", minimum=1)
    hidden_size: int = key("Width of the residual stream.", minimum=1)
    num_heads: int = key("Attention heads of a layer.", minimum=1)
    window_size: int = key("Tokens that a local layer attends to, including the current one.", minimum=1)
    max_position_embeddings: int = key("Longest sequence, in tokens.", minimum=2)
    vocab_size: int = key(
        "Vocabulary size before tokens are added; with model.base=null the tokenizer decides.", minimum=1
    )
    attention: str = key(
        "Attention kernel (docs/performance.md). auto is varlen on CUDA in bf16, else sdpa; eager is Hugging Face's "
        "forward pass.",
        "auto",
        choices=("auto", "eager", "sdpa", "flex", "varlen"),
    )
    compile: bool = key("Compile the forward and backward pass; takes a minute or two at the start.", False)
    checkpoint_activations: bool = key(
        "Recompute each layer's activations in the backward pass: less memory, about a third more time.", False
    )
    loss_dtype: str = key(
        "Precision of the log-softmax over the vocabulary. bf16, as in the original, rounds every token's loss.",
        "fp32",
        choices=("fp32", "bf16"),
    )


@dataclass
class TokenizerConfig:
    """The tokenizer, and the whitespace tokens added to it."""

    base: str | None = key("Folder or hub name of the tokenizer; null uses that of model.base.", None, text=True)
    whitespace_tokens: list[str] = key(
        "Tokens to add for runs of whitespace, unless the tokenizer has them.", WHITESPACE_TOKENS
    )
    matching: str = key(
        "Which whitespace token wins where several match: the longest, or first_listed as in the released checkpoints.",
        "longest",
        choices=("longest", "first_listed"),
    )
    new_row_init: str = key(
        "Initial embedding of a new token: a copy of the tab token's row, or the mean of the tokens that it replaces.",
        "tab",
        choices=("tab", "mean_of_pieces"),
    )


@dataclass
class FilterConfig:
    """Which documents to keep. A rule is off unless set; a document that lacks what a set rule checks is dropped."""

    extensions: list[str] = key("File extensions to keep, as in [.py,.c]; [] keeps all.", [])
    languages: list[str] = key(
        "Programming languages to keep, by linguist's names, as in [Python,C++]; [] keeps all.", []
    )
    licences: list[str] = key("Licences to keep, by their SPDX ids, as in [MIT,Apache-2.0]; [] keeps all.", [])
    min_stars: int | None = key("Fewest stars of a document's repository.", None, minimum=0)
    min_bytes: int | None = key("Smallest document, in bytes of UTF-8.", None, minimum=0)
    max_bytes: int | None = key("Largest document, in bytes of UTF-8.", None, minimum=1)
    max_line_length: int | None = key("Longest line, in characters (usual: 1000).", None, minimum=1)
    max_mean_line_length: float | None = key(
        "Largest mean line length of a document, in characters (usual: 100).", None, minimum=0
    )
    min_alphanumeric: float | None = key(
        "Smallest share of letters and digits (usual: 0.25).", None, minimum=0, maximum=1
    )


@dataclass
class SourceConfig:
    """Where documents come from."""

    path: str | None = key(
        "Corpus: a folder with train/ and validation/, or a pattern such as /data/{split}/*.parquet. Either a path or "
        "a URL that fsspec can open (https://, s3://, hf://datasets/...).",
        None,
        text=True,
    )
    hub: str | None = key("Hub dataset to read instead of data.path: NAME or NAME@REVISION.", None, text=True)
    hub_config: str | None = key("Configuration of the hub dataset; null uses its default.", None, text=True)
    filter: FilterConfig = field(default_factory=FilterConfig)
    text_column: str = key("Field of a document that holds its text.", "text", text=True)


@dataclass
class DataConfig(SourceConfig):
    """The documents that a run reads, and their order."""

    validation_split: str = key("Split to validate on.", "validation", text=True)
    seq_len: int = key("Tokens in a block.", minimum=2)
    streams: int = key(
        "Logical streams that the corpus is read in. They define the order of the data, so keep the number for the "
        "whole run. trainer.global_batch_size must be a multiple of it, and it a multiple of the number of ranks.",
        minimum=1,
    )
    window: int = key("Documents that a stream reads ahead and permutes.", 256, minimum=1)
    num_workers: int = key("Loader processes per rank; 0 tokenises in the training process.", 1, minimum=0)
    eos_between_documents: bool = key("End every document with the end-of-text token (the original did not).", True)
    document_mask: bool = key(
        "Attend only to tokens of the same document (the original did not). Positions still count from the start of "
        "the block.",
        False,
    )
    max_bad_fraction: float = key("Share of unreadable lines above which the run stops.", 0.01, minimum=0.0)
    skip_steps: list[str] = key(
        "Data to pass over, as in [12,40-42]: what these steps of a run without this key train on. Steps then train on "
        "the data after them (docs/data.md).",
        [],
    )

    @property
    def skipped(self) -> list[range]:
        """The batches of `skip_steps`, in order."""
        ends = [[int(end) for end in each.split("-")] for each in self.skip_steps]
        return sorted((range(pair[0], pair[-1] + 1) for pair in ends), key=lambda batches: batches.start)

    def batch_of(self, step: int) -> int:
        """The batch that a step trains on: the number of the step that would, without `skip_steps`."""
        for batches in self.skipped:
            if batches.start <= step:
                step += len(batches)
        return step


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = key("Optimizer.", choices=("adamw", "adafactor"))
    lr: float = key("Peak learning rate; Adafactor multiplies it by each tensor's root mean square.", minimum=0.0)
    betas: list[float] | None = key("AdamW's decay rates of the first and second moments.", None)
    eps: float | None = key("AdamW's epsilon, outside the square root.", None, minimum=0.0)
    weight_decay: float | None = key(
        "AdamW's decoupled weight decay of everything but biases and LayerNorm scales.", None, minimum=0.0
    )
    schedule: str = key(
        "How the learning rate falls after the warm-up: as a cosine, linearly, not at all, or (wsd: warm-up, stable, "
        "decay) as 1 - sqrt, after stable_steps at the peak.",
        "cosine",
        choices=("cosine", "linear", "wsd", "constant"),
    )
    warmup_steps: int = key("Steps of linear warm-up from 0.", minimum=0)
    stable_steps: int | None = key("wsd: steps at the peak, between the warm-up and the decay.", None, minimum=0)
    decay_steps: int = key("Steps of the decay.", minimum=0)
    min_lr_ratio: float = key("Learning rate after the decay, as a share of the peak.", minimum=0.0, maximum=1.0)
    grad_clip: float = key("Largest global gradient norm; 0 disables clipping.", minimum=0.0)


@dataclass
class StrategyConfig:
    """How ranks share the work."""

    name: str = key("Kind of data parallelism.", choices=("single", "ddp", "zero"))
    stage: int = key(
        "ZeRO stage, that is what is partitioned: 1 optimizer state, 2 also gradients, 3 also weights.", 0, minimum=0
    )
    reduce_dtype: str = key(
        "Precision in which ranks sum their gradients: fp32 as in the original. bf16 halves the gradients' bytes and "
        "rounds the sum (simulated: 0.4 % off at 8 ranks, 2.3 % at 512).",
        "fp32",
        choices=("fp32", "bf16"),
    )
    reduce_bucket_size: int = key(
        "Gradient elements reduced at once. Keep it well below the size of the model, so that reduction overlaps with "
        "the backward pass.",
        20_000_000,
        minimum=1,
    )


@dataclass
class TrainerConfig:
    """Steps, batches and devices."""

    max_steps: int = key("Optimizer steps of the whole run.", minimum=1)
    global_batch_size: int = key("Sequences in an optimizer step, over all ranks.", minimum=1)
    micro_batch_size: int = key("Sequences in one forward and backward pass of a rank.", minimum=1)
    eval_micro_batch_size: int = key("Sequences in one validation pass of a rank.", minimum=1)
    accelerator: str = key(
        "Device that ranks run on; auto is cuda if CUDA is visible.", "auto", choices=("auto", "cpu", "cuda")
    )
    devices: int | None = key(
        "Ranks per node. null: the CUDA devices of the node (in a Slurm job, those of the job); on CPU, the job's "
        "tasks per node, or 1.",
        None,
        minimum=1,
    )
    num_nodes: int | None = key("Nodes. null: those of the Slurm job, or 1.", None, minimum=1)
    precision: str = key("Precision of the forward and backward pass.", choices=("bf16", "fp32"))
    log_every_steps: int = key("Steps between two logged rows.", minimum=1)
    val_every_steps: int = key("Steps between two validations.", minimum=1)
    val_samples: int = key("Sequences of the validation split to validate on.", minimum=1)
    audit: bool = key(
        "Log every step, with a digest of its token ids (data/digest), and record the documents of each step in "
        "ledger.jsonl.",
        False,
    )
    watchdog_seconds: int = key(
        "Abort if a rank makes no progress for this many seconds (six times as many during start-up, validation and "
        "saves), and write the stacks of all ranks to the run folder; 0 disables it.",
        600,
        minimum=0,
    )
    profile_steps: int = key(
        "Steps to trace with torch's profiler, from the fourth step of an attempt on, into profile/ of the run folder; "
        "0 disables it.",
        0,
        minimum=0,
    )
    peak_tflops: float | None = key(
        "Dense peak of one device at trainer.precision, in TFLOP/s; throughput/mfu is a share of it. null: the bf16 "
        "peak of common GPUs; on other devices no MFU is logged.",
        None,
        minimum=1e-9,
    )
    deterministic: bool = key("Refuse operations whose result varies from run to run.", True)


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = key("Steps between two checkpoints.", minimum=1)
    every_minutes: float | None = key(
        "Also save when the last checkpoint is this many minutes old; null saves by steps only.", None, minimum=0
    )
    asynchronous: bool = key(
        "Write checkpoints beside training, which stops only while state is copied to host memory; takes that memory.",
        True,
    )
    keep_last: int = key("Newest checkpoints to keep; older ones are deleted once a newer one is complete.", minimum=1)
    keep_every: int | None = key(
        "Never delete the checkpoints at multiples of this many steps; null deletes them like the others.",
        None,
        minimum=1,
    )
    max_failed_saves: int = key("The run stops after this many failed saves in a row.", 3, minimum=1)


@dataclass
class LauncherConfig:
    """What starts ranks and trials."""

    name: str = key(
        "What starts the ranks: this command on this machine (local), srun in a Slurm job (slurm), or the torchrun "
        "that runs this command (torchrun). auto is the one that this command runs under.",
        "auto",
        choices=("auto", "local", "slurm", "torchrun"),
    )
    preflight: bool = key(
        "On Slurm, count the devices of every node and time an all-reduce before training; takes seconds.", True
    )
    parallel: int | None = key(
        "In a sweep, trials that run at the same time. null: one on this machine, all of them on Slurm.",
        None,
        minimum=1,
    )
    sbatch: str = key("In a sweep with launcher=slurm, options of sbatch for each trial's job.", "", text=True)
    max_requeues: int = key("On Slurm, how often an interrupted job is requeued.", 100, minimum=0)


@dataclass
class SweepConfig:
    """Sweeps (clippy train -m)."""

    trials: int | None = key(
        "Trials whose values Optuna chooses; null runs every combination of the values given.", None, minimum=1
    )
    pruner: str = key(
        "When Optuna ends a trial early: median if its best validation is worse than the median of earlier trials at "
        "that step, halving (asynchronous successive halving) if it is not among the best quarter.",
        "none",
        choices=("none", "median", "halving"),
    )


@dataclass
class LoggerConfig:
    """Where numbers and samples go."""

    tensorboard: bool = key("Write TensorBoard events to the run folder.", True)
    wandb: bool = key(
        "Also log to Weights & Biases; needs clippy_train[wandb], and WANDB_API_KEY or WANDB_MODE=offline.", False
    )
    sample_prompts: list[str] = key(
        "Prompts that the model completes, greedily, at every validation; [] disables it.", [PROMPT]
    )
    sample_tokens: int = key("Tokens of such a completion; each costs a forward pass of one row.", 64, minimum=1)
    hparams: list[str] = key("NAME=VALUE of what TensorBoard's HPARAMS tab compares; a sweep sets what it varies.", [])


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
        "auto continues from the last complete checkpoint if there is one, must requires one, never refuses a run that "
        "has one. A checkpoint folder: a run without a checkpoint starts from that one.",
        "auto",
        text=True,
    )
    seed: int = key("Seed of the data order, of new weights and of dropout.", 42, minimum=0, maximum=MAX_SEED)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root) / self.run.name

    @property
    def nodes_and_devices(self) -> tuple[int, int]:
        """The number of nodes, and of ranks on each."""
        nodes, devices = self.trainer.num_nodes, self.trainer.devices
        assert nodes is not None
        assert devices is not None, "launch.resources sets these when a configuration is composed"
        return nodes, devices

    @property
    def world_size(self) -> int:
        nodes, devices = self.nodes_and_devices
        return nodes * devices

    @property
    def deepspeed(self) -> bool:
        """Whether ranks run under DeepSpeed. Its ZeRO flattens parameters into one vector; Adafactor needs shapes."""
        return self.strategy.name == "zero" and self.optim.name != "adafactor"

    @property
    def attention(self) -> str:
        """The attention kernel: `model.attention`, with `auto` resolved."""
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
class PlanConfig(TrainConfig):
    """`clippy plan`."""

    out: str | None = key("File for every figure of the plan, as JSON.", None, text=True)
    memory_gb: float | None = key(
        "Memory of a GPU, in GB of 10^9 bytes: also find the largest trainer.micro_batch_size that fits.",
        None,
        minimum=1e-9,
    )


@dataclass
class DedupConfig:
    """Which documents are duplicates. The first one is kept."""

    exact: bool = key(
        "Drop a document with the same sequence of words as an earlier one, whatever separates the words, as the "
        "original did. Takes about 100 bytes of memory per document.",
        True,
    )
    near: bool = key(
        "Drop a document that is similar to an earlier one (MinHash LSH). Takes kilobytes of memory per document.",
        False,
    )
    threshold: float = key(
        "For dedup.near: Jaccard similarity of two documents' sequences of 5 words from which they count as similar.",
        0.7,
        minimum=0,
        maximum=1,
    )
    permutations: int = key(
        "For dedup.near: hash functions of a MinHash; more of them estimate similarity better.", 256, minimum=2
    )


@dataclass
class CorpusConfig:
    """`clippy corpus`."""

    src: list[str] = key(
        "Folders of git repositories or of packages (SRC... on the command line). With neither src nor hub: the source "
        "code of this Python.",
        [],
    )
    hub: str | None = key(
        "Dataset to read: NAME or NAME@REVISION on the hub, or a folder of jsonl, parquet, ...", None, text=True
    )
    hub_config: str | None = key("Configuration of the hub dataset; null uses its default.", None, text=True)
    hub_split: str = key("Split of the hub dataset to read.", "train", text=True)
    text_column: str = key("Column of the hub dataset that holds the text.", "text", text=True)
    out: str = key("New folder for the shards.", text=True)
    filter: FilterConfig = field(default_factory=lambda: FilterConfig(min_bytes=64, max_bytes=1_000_000))
    dedup: DedupConfig = field(default_factory=DedupConfig)
    validation_fraction: float = key(
        "Share of repositories (or packages) held out for validation, at least one of them.", 0.05, minimum=0.0
    )
    test_fraction: float = key(
        "Share of repositories (or packages) held out for testing, at least one of them.", 0.05, minimum=0.0
    )
    shard_bytes: int = key("Largest shard, in bytes before compression.", 8_000_000, minimum=1)
    seed: int = key("Seed of the split and of the order of documents.", 42, minimum=0, maximum=MAX_SEED)


@dataclass
class ExtendConfig:
    """`clippy extend`."""

    base: str = key("Folder or hub name of the model and tokenizer to extend.", text=True)
    out: str = key("New folder for the extended model and tokenizer.", text=True)
    whitespace_tokens: list[str] = key("Tokens to add.", WHITESPACE_TOKENS)
    matching: str = key("As tokenizer.matching of clippy train.", "longest", choices=("longest", "first_listed"))
    new_row_init: str = key("As tokenizer.new_row_init of clippy train.", "tab", choices=("tab", "mean_of_pieces"))


@dataclass
class ImportConfig:
    """`clippy import`."""

    flax: str = key("Checkpoint folder of the original Flax script: config.json, flax_model.msgpack, ...", text=True)
    out: str = key("New folder for the Hugging Face model.", text=True)


@dataclass
class CheckpointsConfig:
    """`clippy checkpoint`."""

    action: str = key("ls checks the size of every file; verify reads and hashes every byte.", choices=("ls", "verify"))
    run: str = key("Run folder.", text=True)


@dataclass
class ExportConfig:
    """`clippy export`."""

    run: str = key("Run folder.", text=True)
    out: str = key("New folder for the Hugging Face model.", text=True)
    step: str | None = key(
        "Step to export, or best (the lowest val/bits_per_byte); null exports the last complete checkpoint.",
        None,
        text=True,
    )
    dtype: str = key("Precision of the exported weights.", "fp32", choices=("fp32", "bf16"))
    evaluations: list[str] = key(
        "Results for the model card, written by clippy evaluate out=FILE for these weights.", []
    )
    push_to: str | None = key(
        "Hub repository (NAME/NAME) to publish the folder in; needs HF_TOKEN in the environment.", None, text=True
    )
    public: bool = key("Whether the repository in push_to is public.", False)


@dataclass
class GenerateConfig:
    """`clippy generate`."""

    model: str = key("Folder or hub name of a model with its tokenizer.", text=True)
    prompt: str | None = key("Text to complete; - reads standard input.", None, text=True)
    file: str | None = key("File with the text to complete, instead of prompt.", None, text=True)
    max_new_tokens: int = key("Longest completion, in tokens.", 128, minimum=1)
    temperature: float = key("Sampling temperature; 0 is greedy.", 0.0, minimum=0.0)
    top_p: float = key("Share of probability mass to sample from.", 0.95, minimum=0.0, maximum=1.0)
    num_samples: int = key("Completions; a single one is printed as it is generated.", 1, minimum=1)
    stop: str = key(
        "Where a completion ends before max_new_tokens: at the end of the function that it writes, or nowhere (none).",
        "function",
        choices=("function", "none"),
    )
    seed: int = key("Seed of the sampling.", 42, minimum=0, maximum=MAX_SEED)


@dataclass
class EvaluateConfig:
    """`clippy evaluate`."""

    task: str = key(
        "perplexity: loss and bits per byte on a split. humaneval: share of programming problems that samples solve.",
        choices=("perplexity", "humaneval"),
    )
    model: list[str] = key("Folders or hub names of models with their tokenizers; [A,B] compares them.", [])
    out: str | None = key("File for the results, as JSON.", None, text=True)
    batch_size: int = key("Sequences in one forward pass.", 8, minimum=1)
    data: SourceConfig = field(default_factory=lambda: SourceConfig())
    split: str = key("perplexity: split to score.", "validation", text=True)
    seq_len: int | None = key("perplexity: tokens in a row; null uses the most that all models take.", None, minimum=2)
    max_rows: int | None = key(
        "perplexity: rows to score, from the start of the split; null scores all.", None, minimum=1
    )
    stride: int | None = key(
        "perplexity: null scores blocks, as validation during training does. A number scores each document by itself, "
        "in windows of seq_len tokens that advance by this many tokens; each window scores its new tokens.",
        None,
        minimum=1,
    )
    eos_between_documents: bool = key("perplexity: end documents in blocks with the end-of-text token.", True)
    problems: str | None = key(
        "humaneval: file in HumanEval's format (.jsonl, .jsonl.gz), or a hub dataset.", None, text=True
    )
    samples: str | None = key(
        "humaneval: file of samples (JSON lines of task_id and completion). With a model, missing samples are "
        "generated and added to it.",
        None,
        text=True,
    )
    n: int = key("humaneval: samples per problem.", 1, minimum=1)
    ks: list[int] = key("humaneval: k of pass@k; those above the number of samples are skipped.", [1, 10, 100])
    temperature: float = key("humaneval: sampling temperature; 0 is greedy.", 0.0, minimum=0.0)
    top_p: float = key("humaneval: share of probability mass to sample from.", 0.95, minimum=0.0, maximum=1.0)
    max_new_tokens: int = key("humaneval: longest completion, in tokens.", 384, minimum=1)
    stop: list[str] = key("humaneval: strings that end a completion.", STOP_SEQUENCES)
    seed: int = key("humaneval: seed of the sampling.", 42, minimum=0, maximum=MAX_SEED)
    allow_code_execution: bool = key(
        "humaneval: run the samples, unreviewed programs, to score them (docs/evaluate.md says what the sandbox does "
        "not stop).",
        False,
    )
    allow_weak_sandbox: bool = key(
        "humaneval: run the samples even where the sandbox lacks protections; it names them first.", False
    )
    timeout: float = key(
        "humaneval: seconds for one sample and its checks; waiting for a core does not count.", 5.0, minimum=0.1
    )
    memory_mb: int = key("humaneval: memory of all processes of a sample together, in MB.", 1024, minimum=64)
    workers: int | None = key("humaneval: samples run at a time; null uses the number of cores.", None, minimum=1)


@dataclass
class DemoConfig:
    """`clippy demo`."""

    root: str = key("Folder for the demo's corpus and tokenizer; its name is also the run's.", "demo", text=True)
    vocab_size: int = key("Size of the byte-level BPE before the whitespace tokens.", 4096, minimum=300)
    prompt: str = key("Prompt for the trained model (the model card's).", PROMPT, text=True)


def keys(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key of a schema as (dotted name, field), sections flattened."""
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield from keys(cast(type, item.type), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def values(config: object) -> dict[str, Any]:
    """The value of every key of a configuration."""
    return {name: reduce(getattr, name.split("."), config) for name, _ in keys(type(config))}


def from_values(of_key: dict[str, Any]) -> TrainConfig:
    """The configuration with these values, as `values` returned them."""
    config = TrainConfig()
    for name, value in of_key.items():
        *sections, last = name.split(".")
        setattr(reduce(getattr, sections, config), last, value)
    return config


def as_yaml(value: Any) -> str:
    """A value in YAML, on one line."""
    if isinstance(value, list) or "\n" in str(value):
        return json.dumps(value, ensure_ascii=False)  # which is YAML, and never breaks a line
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def to_schema(composed: DictConfig, schema: type[T]) -> T:
    """Convert a composed configuration to its schema, and check it.

    Raises:
        ConfigError: keys are not set, or values are wrong or contradict each other; names all of them.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        hint = ", or choose a recipe with experiment=NAME" if issubclass(schema, TrainConfig) else ""
        raise ConfigError(f"not set: {', '.join(missing)}. Add KEY=VALUE{hint} (--help explains every key)")
    config = cast(T, OmegaConf.to_object(composed))
    OmegaConf.structured(literal(config))  # checks types again: an interpolation may have put anything into a list
    found = limit_problems(config)
    if isinstance(config, TrainConfig):
        found += training_problems(config)
    if isinstance(config, EvaluateConfig):
        found += evaluation_problems(config)
    if isinstance(config, GenerateConfig) and config.num_samples > 1 and config.temperature == 0:
        found.append(f"num_samples={config.num_samples}: greedy completions are all the same; set temperature=0.8, say")
    if found:
        raise ConfigError("\n".join(found))
    return config


def literal(content: Any) -> Any:
    """Values that OmegaConf reads as they are: in a prompt, `${HOME}` is text."""
    if dataclasses.is_dataclass(content):
        fields = {item.name: literal(getattr(content, item.name)) for item in dataclasses.fields(content)}
        return cast(Any, type(content))(**fields)
    if isinstance(content, dict):
        return {name: literal(each) for name, each in content.items()}
    if isinstance(content, list):
        return [literal(each) for each in content]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", content) if isinstance(content, str) else content


def limit_problems(config: object) -> list[str]:
    """Empty texts, and values outside the `choices` or the limits that their key declares."""
    found = []
    of_key = values(config)
    for name, item in keys(type(config)):
        value: Any = of_key[name]
        if "" in (value if isinstance(value, list) else [value]) and item.default != "":
            found.append(f"{name}={value}: must not be empty")
            continue
        choices, minimum, maximum = (item.metadata[part] for part in ("choices", "minimum", "maximum"))
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name}={value}: must be a finite number")
        if choices and value not in choices:
            found.append(f"{name}={value}: must be one of {', '.join(choices)}")
        if minimum is not None and value is not None and value < minimum:
            found.append(f"{name}={value}: must be at least {minimum}")
        if maximum is not None and value is not None and value > maximum:
            found.append(f"{name}={value}: must be at most {maximum}")
    return found


def training_problems(config: TrainConfig) -> list[str]:
    """Contradictions in a training configuration: one line each, naming the keys and the fix."""
    return [
        *_model_problems(config),
        *_kernel_problems(config),
        *_data_problems(config.data),
        *_skip_problems(config.data),
        *_batch_problems(config),
        *_optimizer_problems(config.optim),
        *_strategy_problems(config),
        *_checkpoint_problems(config.checkpoint),
    ]


def evaluation_problems(config: EvaluateConfig) -> list[str]:
    """Contradictions in an evaluation, as `training_problems`."""
    of_task = {"perplexity": _perplexity_problems, "humaneval": _humaneval_problems}
    return list(of_task[config.task](config)) if config.task in of_task else []


def _perplexity_problems(config: EvaluateConfig) -> Iterator[str]:
    if not config.model:
        yield "task=perplexity needs model=DIR, or model=[A,B]"
    yield from _data_problems(config.data)


def _humaneval_problems(config: EvaluateConfig) -> Iterator[str]:
    if not config.problems:
        yield "task=humaneval needs problems=FILE"
    if len(config.model) > 1:
        yield f"model=[{','.join(config.model)}]: task=humaneval takes one model"
    if not config.samples:
        yield "task=humaneval needs samples=FILE: samples to score, or a file to write them to"
    if min(config.ks, default=1) < 1:
        yield f"ks={config.ks}: each must be at least 1"
    if not config.model and not config.allow_code_execution:
        yield (
            "scoring samples runs them: read docs/evaluate.md, then add allow_code_execution=true; or add model=DIR to "
            "generate samples without scoring them"
        )


def _model_problems(config: TrainConfig) -> Iterator[str]:
    model, data, name = config.model, config.data, config.run.name
    if name in (".", "..") or name != Path(name).name:
        yield f"run.name={name!r}: must be the name of one folder, without slashes"
    if data.seq_len > model.max_position_embeddings:
        yield (
            f"data.seq_len={data.seq_len} is longer than model.max_position_embeddings="
            f"{model.max_position_embeddings}: lower data.seq_len"
        )
    if model.hidden_size % max(1, model.num_heads):
        yield f"model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}"
    if model.loss_dtype == "bf16" and config.trainer.precision != "bf16":
        yield (
            f"model.loss_dtype=bf16 rounds what trainer.precision={config.trainer.precision} keeps: set "
            "model.loss_dtype=fp32"
        )
    if model.base_optimizer == "continue" and (model.base is None or config.optim.name != "adamw"):
        yield (
            "model.base_optimizer=continue needs a model.base and optim=adamw, but "
            f"model.base={model.base or 'null'} and optim.name={config.optim.name}"
        )


def _kernel_problems(config: TrainConfig) -> Iterator[str]:
    model, trainer = config.model, config.trainer
    if model.attention in ("flex", "varlen") and trainer.accelerator != "cuda":
        yield (
            f"model.attention={model.attention} runs on CUDA only, but trainer.accelerator={trainer.accelerator}: set "
            "model.attention=auto"
        )
    if model.attention == "varlen" and trainer.precision != "bf16":
        yield (
            f"model.attention=varlen computes in bf16 only, but trainer.precision={trainer.precision}: set "
            "model.attention=auto"
        )
    if config.data.document_mask and model.attention in ("eager", "flex"):
        yield (
            f"data.document_mask=true: model.attention={model.attention} has no mask for documents; set "
            "model.attention=auto"
        )
    if config.data.document_mask and not config.data.eos_between_documents:
        yield "data.document_mask=true needs the token that ends a document: set data.eos_between_documents=true"
    if model.compile and config.strategy.stage == 3:
        yield (
            "model.compile=true: ZeRO-3 fetches weights between modules, which breaks every graph; choose "
            "strategy=zero2, zero1 or ddp, or set model.compile=false"
        )


def _data_problems(data: SourceConfig) -> Iterator[str]:
    if bool(data.path) == bool(data.hub):
        path, hub = data.path or "null", data.hub or "null"
        yield f"data.path={path} and data.hub={hub}: set exactly one of them; the other must be null"
    if data.hub_config is not None and not data.hub:
        yield f"data.hub_config={data.hub_config} needs data.hub, which is not set"


def _skip_problems(data: DataConfig) -> Iterator[str]:
    wrong = [each for each in data.skip_steps if not re.fullmatch("[1-9][0-9]*(-[1-9][0-9]*)?", each)]
    if wrong:
        yield f"data.skip_steps=[{','.join(data.skip_steps)}]: {wrong[0]!r} is neither a step nor a range such as 40-42"
    elif not all(data.skipped):
        yield f"data.skip_steps=[{','.join(data.skip_steps)}]: a range ends before it begins"
    elif any(first.stop > second.start for first, second in pairwise(data.skipped)):
        yield f"data.skip_steps=[{','.join(data.skip_steps)}]: a step is named twice"


def _batch_problems(config: TrainConfig) -> Iterator[str]:
    trainer, streams, ranks = config.trainer, config.data.streams, config.world_size
    per_pass = trainer.micro_batch_size * ranks
    if trainer.global_batch_size % max(1, per_pass):
        yield (
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of trainer.micro_batch_size x "
            f"ranks = {trainer.micro_batch_size} x {ranks} = {per_pass}: change one of them"
        )
    if trainer.global_batch_size % max(1, streams):
        yield (
            f"trainer.global_batch_size={trainer.global_batch_size} is not a multiple of data.streams={streams}: "
            "every step takes the same number of blocks from every stream"
        )
    if streams % max(1, ranks):
        yield (
            f"data.streams={streams} is not a multiple of the {ranks} ranks (trainer.num_nodes x trainer.devices): "
            "every rank owns the same number of streams. Change the number of ranks or, for a new run, set "
            f"data.streams={nearest_streams(config)}"
        )


def nearest_streams(config: TrainConfig) -> int:
    """`data.streams`, rounded up to a multiple of the number of ranks."""
    ranks = max(1, config.world_size)
    return -(-config.data.streams // ranks) * ranks


def _optimizer_problems(optim: OptimConfig) -> Iterator[str]:
    if optim.betas is not None and (len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas)):
        yield f"optim.betas={optim.betas}: must be two numbers in [0, 1)"
    values = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
    for name, value in values.items():
        if (value is not None) != (optim.name == "adamw"):
            yield (
                f"optim.{name} is {'not set' if value is None else 'set'}, but only AdamW has it, and optim.name="
                f"{optim.name}: choose optim=adamw or optim=adafactor, which set all keys of an optimizer"
            )

    if (optim.stable_steps is not None) != (optim.schedule == "wsd"):
        stable = "null" if optim.stable_steps is None else optim.stable_steps
        yield (
            f"optim.schedule={optim.schedule} and optim.stable_steps={stable}: wsd needs stable_steps, and no other "
            "schedule has it"
        )


def _strategy_problems(config: TrainConfig) -> Iterator[str]:
    strategy = config.strategy
    if (strategy.name == "zero") != (strategy.stage in (1, 2, 3)):
        yield (
            f"strategy.stage={strategy.stage} does not fit strategy.name={strategy.name}: choose strategy=zero1, "
            "zero2, zero3, ddp or single"
        )
    if config.optim.name == "adafactor" and strategy.stage > 1:
        yield (
            f"strategy=zero{strategy.stage} splits tensors between ranks, but optim=adafactor needs whole ones: choose "
            "strategy=zero1 or ddp"
        )
    if strategy.reduce_dtype == "bf16" and strategy.name == "ddp" and config.trainer.accelerator != "cuda":
        yield (
            "strategy.reduce_dtype=bf16 with strategy=ddp works on CUDA only: set strategy.reduce_dtype=fp32, or a "
            "ZeRO stage"
        )
    if strategy.name == "single" and config.world_size > 1:
        yield (
            f"strategy=single runs one rank, but trainer.num_nodes x trainer.devices is {config.world_size}: choose "
            "strategy=ddp or a ZeRO stage, or set trainer.devices=1"
        )


def _checkpoint_problems(checkpoint: CheckpointConfig) -> Iterator[str]:
    every, kept = checkpoint.every_steps, checkpoint.keep_every
    if kept is not None and kept % max(1, every):
        yield f"checkpoint.keep_every={kept} is not a multiple of checkpoint.every_steps={every}: some are never saved"


def as_document(config: TrainConfig) -> str:
    """A configuration in YAML."""
    document: str = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    return document


def save(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration that ranks read."""
    with atomic_write(path) as file:
        file.write(as_document(config))


def load(path: Path) -> TrainConfig:
    """Read what `save` wrote.

    Raises:
        ConfigError: it cannot be read, or another version wrote it.
    """
    try:
        content = literal(yaml.safe_load(path.read_text()) or {})
        return to_schema(cast(DictConfig, OmegaConf.merge(TrainConfig, content)), TrainConfig)
    except (ConfigError, OmegaConfBaseException, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not a configuration of this version: {first_line(error)}") from error
