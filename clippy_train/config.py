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
from typing import Any, TypeVar, cast, get_args

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clippy_train.errors import ConfigError, first_line
from clippy_train.files import atomic_write

T = TypeVar("T")
WHITESPACE_TOKENS = ["\t\t", "  ", "    ", "        "]  # the model card's, in its order
FIM_TOKENS = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]  # StarCoder's
PROMPT = "def greet(name):\n  '''A function to greet user. Given a user name it should say hello'''\n"  # the card's
POSITIVE = 1e-9  # the minimum of a key whose value must be above 0
COLDEST = 1e-3  # the lowest temperature that samples: logits are divided by it, in fp32
MAX_SEED = 2**31 - 1  # numpy's limit is 2**32 - 1, and each rank adds its number
SOURCE_NAME = r"[\w.+#-]+"  # a part of the names of metrics
# Keys of `model` that must match the base model, as the Hugging Face configuration names them.
SHAPE = ("num_layers", "hidden_size", "num_heads", "window_size", "max_position_embeddings")


def key(
    meaning: str,
    default: Any = MISSING,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    text: bool = False,
    maximum: float | None = None,
    empty: bool = False,
) -> Any:
    """Declare a key. Limits are inclusive; `text` marks free text, which needs no quoting on the command line, and
    `empty` one that may be empty."""
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum}
    metadata = {"meaning": meaning, **limits, "text": text, "empty": empty or default == ""}
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
    fim_tokens: list[str] = key(
        "Special tokens that stand before prefix, middle and suffix; added, unless the tokenizer has them, if "
        "data.fim_rate is not 0.",
        FIM_TOKENS,
    )


REDACTED = ("emails", "ips", "keys")


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
    opt_out: str | None = key(
        "File of repositories whose documents to leave out, a name on each line.", None, text=True
    )
    decontaminate: list[str] = key(
        "Files of benchmark problems (HumanEval, MBPP, MultiPL-E, APPS): documents that hold one, as its description "
        "or its solution, are left out.",
        [],
    )
    redact: list[str] = key(
        "What to replace by placeholders in the documents that are kept. `keys` needs clippy_train[redact].",
        [],
        choices=REDACTED,
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
class MixtureSource(SourceConfig):
    """A corpus of a mixture. It also has the keys of `data` that say where documents come from."""

    name: str | None = key("Name in metrics and on the model card; null takes the one of path or hub.", None, text=True)
    weight: float | None = key(
        "Share of the tokens, relative to the weights of the other sources; null is 1, unless data.source_temperature "
        "decides.",
        None,
        minimum=POSITIVE,
    )


@dataclass
class DataConfig(SourceConfig):
    """The documents that a run reads, and their order."""

    sources: list[MixtureSource] = key(
        "A mixture (docs/mixtures.md) instead of data.path or data.hub, as in [{path:A,weight:3},{path:B}]: each "
        "source has path or hub, hub_config, filter, text_column, name and weight.",
        [],
    )
    source_temperature: float | None = key(
        "Weigh each source by its size to the power of 1 / temperature: 1 in proportion to the sizes, 2 by their "
        "square roots. null takes the weights.",
        None,
        minimum=POSITIVE,
    )
    validation_split: str = key("Split to validate on.", "validation", text=True)
    val_problems: str | None = key(
        "File (or hub dataset) of programming problems: each validation also scores their reference solutions, as "
        "val/solutions/...",
        None,
        text=True,
    )
    prompt_column: str | None = key(
        "Field of a document that holds the prompt which its text continues: the model reads it, and learns to predict "
        "the text only.",
        None,
        text=True,
    )
    truncate: str = key(
        "Where to cut a document with a prompt that is longer than a block: at the start of its prompt, or at the end "
        "(the original).",
        "start",
        choices=("start", "end"),
    )
    packing: bool = key(
        "Fill blocks with documents one after the other; false gives each document blocks of its own, padded.", True
    )
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
    fim_rate: float = key(
        "Share of documents that are trained as fill-in-the-middle (docs/objectives.md). 0: all from left to right.",
        0.0,
        minimum=0.0,
        maximum=1.0,
    )
    fim_spm_rate: float = key(
        "Share of those that begin with the suffix, not with the prefix.", 0.5, minimum=0.0, maximum=1.0
    )
    fim_characters: int | None = key(
        "Longest text that fill-in-the-middle rearranges: a longer document is several of them, each with a choice and "
        "cuts of its own. null: the whole document.",
        None,
        minimum=1,
    )
    max_bad_fraction: float = key("Share of unreadable lines above which the run stops.", 0.01, minimum=0.0)
    skip_steps: list[str] = key(
        "Data to pass over, as in [12,40-42]: what these steps of a run without this key train on. Steps then train on "
        "the data after them (docs/data.md).",
        [],
    )

    @property
    def masked(self) -> bool:
        """Whether a model only reads some tokens, and need not predict them."""
        return self.prompt_column is not None or not self.packing

    @property
    def corpora(self) -> dict[str, SourceConfig]:
        """The settings of each corpus that the run reads, by the key of their section."""
        if not self.sources:
            return {"data": self}
        return {f"data.sources[{index}]": source for index, source in enumerate(self.sources)}

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
    max_epochs: int | None = key(
        "End the run early: after the step in which all streams of the corpus, or of any source of a mixture, have "
        "read it this many times and started over. null: no limit.",
        None,
        minimum=1,
    )
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
        minimum=POSITIVE,
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
    start_seconds: int = key(
        "On Slurm, how long the first ranks wait for the slowest node to start theirs. Then the job is requeued.",
        600,
        minimum=1,
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
    def fim_tokens(self) -> list[str]:
        """The tokens of fill-in-the-middle, if the run trains on it."""
        return self.tokenizer.fim_tokens if self.data.fim_rate else []

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
        minimum=POSITIVE,
    )


@dataclass
class DedupConfig:
    """Which documents are duplicates. The first one is kept."""

    exact: bool = key(
        "Drop a document with the same sequence of words as an earlier one, whatever separates the words, as the "
        "original did.",
        True,
    )
    near: bool = key(
        "Drop a document that is similar to an earlier one that is kept (MinHash LSH, then compared directly).", False
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
class CorpusSlurmConfig:
    """Jobs that build a corpus on many nodes; the result does not depend on them."""

    partition: str | None = key(
        "Partition to submit the stages to, as job arrays; null builds on this machine.", None, text=True
    )
    tasks: int = key("Jobs in the array of a stage, each on one core.", 64, minimum=1)
    hours: int = key("Time limit of a job, in hours.", 24, minimum=1)
    memory_gb: int = key("Memory of a job, in GB.", 2, minimum=1)


@dataclass
class CorpusConfig:
    """`clippy corpus`."""

    src: list[str] = key(
        "Folders of git repositories or of packages (SRC... on the command line). Without src, hub and problems: the "
        "source code of this Python.",
        [],
    )
    hub: str | None = key(
        "Dataset to read: NAME or NAME@REVISION on the hub, or a folder of jsonl, parquet, ...", None, text=True
    )
    hub_config: str | None = key("Configuration of the hub dataset; null uses its default.", None, text=True)
    hub_split: str = key("Split of the hub dataset to read.", "train", text=True)
    text_column: str = key("Column of the hub dataset that holds the text.", "text", text=True)
    problems: list[str] = key(
        "Files (or hub datasets) of programming problems, to train with data.prompt_column=prompt: a document is a "
        "reference solution with its prompt.",
        [],
    )
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
    workers: int = key("Processes that share the work; the result does not depend on their number.", 1, minimum=1)
    slurm: CorpusSlurmConfig = field(default_factory=CorpusSlurmConfig)


@dataclass
class ExtendConfig:
    """`clippy extend`."""

    base: str = key("Folder or hub name of the model and tokenizer to extend.", text=True)
    out: str = key("New folder for the extended model and tokenizer.", text=True)
    whitespace_tokens: list[str] = key("Tokens to add.", WHITESPACE_TOKENS)
    matching: str = key("As tokenizer.matching of clippy train.", "longest", choices=("longest", "first_listed"))
    new_row_init: str = key("As tokenizer.new_row_init of clippy train.", "tab", choices=("tab", "mean_of_pieces"))
    fim_tokens: list[str] = key("Tokens of fill-in-the-middle to add, as tokenizer.fim_tokens of clippy train.", [])


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
    license: str | None = key(
        "Licence of the weights, for the model card, as the hub names it: apache-2.0, bigcode-openrail-m, other, ...",
        None,
        text=True,
    )


@dataclass
class GenerateConfig:
    """`clippy generate`."""

    model: str = key("Folder or hub name of a model with its tokenizer.", text=True)
    prompt: str | None = key("Text to complete; - reads standard input.", None, text=True, empty=True)
    file: str | None = key("File with the text to complete, instead of prompt.", None, text=True)
    suffix: str | None = key(
        "Text that follows: the model writes what stands between prompt and suffix, if it was trained with "
        "data.fim_rate. Either may be empty.",
        None,
        text=True,
        empty=True,
    )
    max_new_tokens: int = key("Longest completion, in tokens.", 128, minimum=1)
    temperature: float = key("Sampling temperature; 0 is greedy.", 0.0, minimum=0.0)
    top_p: float = key("Share of probability mass to sample from.", 0.95, minimum=0.0, maximum=1.0)
    num_samples: int = key("Completions; a single one is printed as it is generated.", 1, minimum=1)
    stop: str = key(
        "Where a completion ends before max_new_tokens: at the end of the function that it writes, or nowhere (none). "
        "With suffix, where the model ends it.",
        "function",
        choices=("function", "none"),
    )
    seed: int = key("Seed of the sampling.", 42, minimum=0, maximum=MAX_SEED)


@dataclass
class EvaluateConfig:
    """`clippy evaluate`."""

    task: str = key(
        "perplexity: loss and bits per byte on a split or of solutions. completion: share of lines of a split that are "
        "written as they were. humaneval: share of programming problems that samples solve.",
        choices=("perplexity", "completion", "humaneval"),
    )
    model: list[str] = key("Folders or hub names of models with their tokenizers; [A,B] compares them.", [])
    out: str | None = key("File for the results, as JSON.", None, text=True)
    batch_size: int = key("Sequences in one forward pass.", 8, minimum=1)
    data: SourceConfig = field(default_factory=lambda: SourceConfig())
    split: str = key("perplexity, completion: split to score.", "validation", text=True)
    seq_len: int | None = key("perplexity: tokens in a row; null uses the most that all models take.", None, minimum=2)
    max_rows: int | None = key(
        "perplexity: rows to score, from the start of the split. completion: documents to cut. null: all.",
        None,
        minimum=1,
    )
    stride: int | None = key(
        "perplexity: null scores blocks, as validation during training does. A number scores each document by itself, "
        "in windows of seq_len tokens that advance by this many tokens; each window scores its new tokens.",
        None,
        minimum=1,
    )
    eos_between_documents: bool = key("perplexity: end documents in blocks with the end-of-text token.", True)
    problems: str | None = key(
        "humaneval: problems in the format of HumanEval, MBPP or MultiPL-E (.jsonl, .jsonl.gz), or a hub dataset. "
        "perplexity: score their reference solutions, given their prompts, instead of a split.",
        None,
        text=True,
    )
    samples: str | None = key(
        "humaneval: file of samples (JSON lines of task_id and completion). With a model, missing samples are "
        "generated and added to it.",
        None,
        text=True,
    )
    n: int = key("humaneval: samples per problem. completion: lines to complete in each document.", 1, minimum=1)
    infill: str = key(
        "completion: what a model writes given the text before and after it, if it was trained with data.fim_rate: the "
        "same lines as without (line), or from inside a line to inside one of the next (span).",
        "none",
        choices=("none", "line", "span"),
    )
    ks: list[int] = key("humaneval: k of pass@k; those above the number of samples are skipped.", [1, 10, 100])
    temperature: list[float] = key(
        "humaneval: sampling temperature; 0 is greedy. With several, as in [0.2,0.6,0.8], each k takes its best one.",
        [0.0],
    )
    share: str | None = key(
        "humaneval: I/N generates part I of N, from 1 on; the last process to finish joins the parts in samples.",
        None,
        text=True,
    )
    top_p: float = key("humaneval: share of probability mass to sample from.", 0.95, minimum=0.0, maximum=1.0)
    max_new_tokens: int = key("humaneval: longest completion, in tokens.", 384, minimum=1)
    stop: list[str] | None = key(
        "humaneval: strings that end a completion; null takes those that are usual for the problems' format.", None
    )
    seed: int = key(
        "humaneval: seed of the sampling. completion: seed of the choice of lines.", 42, minimum=0, maximum=MAX_SEED
    )
    allow_code_execution: bool = key(
        "humaneval: run the samples, unreviewed programs, to score them (docs/evaluate.md says what the sandbox does "
        "not stop).",
        False,
    )
    allow_weak_sandbox: bool = key(
        "humaneval: run the samples even where the sandbox lacks protections; it names them first.", False
    )
    timeout: float = key(
        "humaneval: seconds for one sample and its checks; waiting for a core does not count.",
        5.0,
        minimum=0.1,
        maximum=3600,
    )
    memory_mb: int = key(
        "humaneval: memory of all processes of a sample together, in MB.", 1024, minimum=64, maximum=1 << 24
    )
    workers: int | None = key("humaneval: samples run at a time; null uses the number of cores.", None, minimum=1)

    @property
    def part(self) -> tuple[int, int]:
        """The index of this process's part of the samples, and the number of parts."""
        number, _, parts = (self.share or "1/1").partition("/")
        return int(number) - 1, int(parts)


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


def listed_section(item: dataclasses.Field[Any]) -> type | None:
    """The schema of the items of a key that is a list of sections, or None."""
    found = next(iter(get_args(item.type)), None)
    return cast(type, found) if dataclasses.is_dataclass(found) else None


def values(config: object) -> dict[str, Any]:
    """The value of every key of a configuration, as plain Python: a list of sections is one of dictionaries."""
    found = {name: reduce(getattr, name.split("."), cast(Any, config)) for name, _ in keys(type(config))}
    for name in (name for name, item in keys(type(config)) if listed_section(item)):
        found[name] = [dataclasses.asdict(each) for each in found[name]]
    return found


def from_values(of_key: dict[str, Any]) -> TrainConfig:
    """The configuration with these values, as `values` returned them."""
    config = TrainConfig()
    listed = {name: found for name, item in keys(TrainConfig) if (found := listed_section(item))}
    for name, value in of_key.items():
        *sections, last = name.split(".")
        if name in listed:
            value = [OmegaConf.to_object(OmegaConf.merge(listed[name], literal(each))) for each in value]
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
    if isinstance(config, ExtendConfig) and config.fim_tokens:
        found += _fim_token_problems("fim_tokens", config.fim_tokens)
    if isinstance(config, GenerateConfig):
        found += _generation_problems(config)
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


def limit_problems(config: object, section: str = "") -> list[str]:
    """Empty texts, and values outside the `choices` or the limits that their key declares; `section` precedes keys."""
    found = []
    for key_name, item in keys(type(config)):
        name, value = section + key_name, reduce(getattr, key_name.split("."), cast(Any, config))
        if listed_section(item):
            found += [line for index, each in enumerate(value) for line in limit_problems(each, f"{name}[{index}].")]
            continue
        if "" in (value if isinstance(value, list) else [value]) and not item.metadata["empty"]:
            found.append(f"{name}={value}: must not be empty")
            continue
        choices, minimum, maximum = (item.metadata[part] for part in ("choices", "minimum", "maximum"))
        if isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name}={value}: must be a finite number")
        if choices and not {*(value if isinstance(value, list) else [value])}.issubset(choices):
            found.append(
                f"{name}={value}: must be {'any' if isinstance(value, list) else 'one'} of {', '.join(choices)}"
            )
        if minimum is not None and value is not None and value < minimum:
            found.append(f"{name}={value}: must be {'above 0' if minimum == POSITIVE else f'at least {minimum}'}")
        if maximum is not None and value is not None and value > maximum:
            found.append(f"{name}={value}: must be at most {maximum}")
    return found


def training_problems(config: TrainConfig) -> list[str]:
    """Contradictions in a training configuration: one line each, naming the keys and the fix."""
    return [
        *_model_problems(config),
        *_kernel_problems(config),
        *_corpora_problems(config.data),
        *_skip_problems(config.data),
        *_fim_problems(config),
        *_batch_problems(config),
        *_optimizer_problems(config.optim),
        *_strategy_problems(config),
        *_checkpoint_problems(config.checkpoint),
    ]


def evaluation_problems(config: EvaluateConfig) -> list[str]:
    """Contradictions in an evaluation, as `training_problems`."""
    of_task = {
        "perplexity": _perplexity_problems,
        "completion": _completion_problems,
        "humaneval": _humaneval_problems,
    }
    return list(of_task[config.task](config)) if config.task in of_task else []


def _perplexity_problems(config: EvaluateConfig) -> Iterator[str]:
    if not config.model:
        yield "task=perplexity needs model=DIR, or model=[A,B]"
    if config.problems is None:
        yield from _data_problems(config.data)
    elif config.data.path or config.data.hub or config.stride is not None:
        yield "problems=... scores reference solutions: omit data.path, data.hub and stride, which belong to a split"


def _completion_problems(config: EvaluateConfig) -> Iterator[str]:
    if not config.model:
        yield "task=completion needs model=DIR, or model=[A,B]"
    if config.problems is not None:
        yield "task=completion completes lines of a split: omit problems"
    yield from _data_problems(config.data)


def _generation_problems(config: GenerateConfig) -> Iterator[str]:
    if config.prompt == "" and not config.suffix:
        yield "prompt=: must not be empty without a suffix"
    if config.num_samples > 1 and config.temperature == 0:
        yield f"num_samples={config.num_samples}: greedy completions are all the same; set temperature=0.8, say"
    if 0 < config.temperature < COLDEST:
        yield f"temperature={config.temperature}: must be 0 (greedy) or at least {COLDEST}"


def _humaneval_problems(config: EvaluateConfig) -> Iterator[str]:
    if not config.problems:
        yield "task=humaneval needs problems=FILE"
    if len(config.model) > 1:
        yield f"model=[{','.join(config.model)}]: task=humaneval takes one model"
    if not config.samples:
        yield "task=humaneval needs samples=FILE: samples to score, or a file to write them to"
    allowed = [each for each in config.temperature if each == 0 or each >= COLDEST]
    if not allowed or len({*allowed}) < len(config.temperature):
        yield f"temperature={config.temperature}: needs numbers, each once: 0 (greedy) or at least {COLDEST}"
    if config.share is not None:
        yield from _share_problems(config)
    if min(config.ks, default=1) < 1:
        yield f"ks={config.ks}: each must be at least 1"
    if not config.model and not config.allow_code_execution:
        yield (
            "scoring samples runs them: read docs/evaluate.md, then add allow_code_execution=true; or add model=DIR to "
            "generate samples without scoring them"
        )


def _share_problems(config: EvaluateConfig) -> Iterator[str]:
    if not re.fullmatch(r"[0-9]+/[0-9]+", str(config.share)) or not 0 <= config.part[0] < config.part[1]:
        yield f"share={config.share}: must be I/N with I from 1 to N, as in share=$SLURM_ARRAY_TASK_ID/4"
    if not config.model or config.allow_code_execution:
        yield "share=I/N only generates: set model, and score the joined samples with another command"


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


def _data_problems(data: SourceConfig, section: str = "data") -> Iterator[str]:
    if bool(data.path) == bool(data.hub):
        path, hub = data.path or "null", data.hub or "null"
        yield f"{section}.path={path} and {section}.hub={hub}: set exactly one of them; the other must be null"
    if isinstance(data, DataConfig) and data.prompt_column == data.text_column:
        yield f"data.prompt_column={data.prompt_column} is also data.text_column: name two fields"
    if data.hub_config is not None and not data.hub:
        yield f"{section}.hub_config={data.hub_config} needs {section}.hub, which is not set"


def _corpora_problems(data: DataConfig) -> Iterator[str]:
    for section, settings in data.corpora.items():
        yield from _data_problems(settings, section)
    if data.sources:
        yield from _mixture_problems(data)
    elif data.source_temperature is not None:
        yield f"data.source_temperature={data.source_temperature} needs data.sources, which is not set"


def _mixture_problems(data: DataConfig) -> Iterator[str]:
    unset = values(SourceConfig())
    for name, value in values(data).items():
        if name in unset and value != unset[name]:
            yield (
                f"data.{name}={value} and data.sources are both set, but each source has its own {name}: set "
                f"data.{name}={as_yaml(unset[name])}"
            )
    for section, source in zip(data.corpora, data.sources, strict=True):
        if source.name is not None and not re.fullmatch(SOURCE_NAME, source.name):
            yield f"{section}.name={source.name}: must be letters, digits and any of . _ + # -"
        if data.prompt_column == source.text_column:
            yield f"data.prompt_column={data.prompt_column} is also {section}.text_column: name two fields"
        if source.weight is not None and data.source_temperature is not None:
            yield (
                f"{section}.weight={source.weight} and data.source_temperature={data.source_temperature}: weights or a "
                "temperature, not both"
            )
    given = [source.name for source in data.sources if source.name is not None]
    for name in dict.fromkeys(given):
        if given.count(name) > 1:
            yield f"data.sources: {given.count(name)} sources have the name {name}: give each its own"


def _skip_problems(data: DataConfig) -> Iterator[str]:
    wrong = [each for each in data.skip_steps if not re.fullmatch("[1-9][0-9]*(-[1-9][0-9]*)?", each)]
    if wrong:
        yield f"data.skip_steps=[{','.join(data.skip_steps)}]: {wrong[0]!r} is neither a step nor a range such as 40-42"
    elif not all(data.skipped):
        yield f"data.skip_steps=[{','.join(data.skip_steps)}]: a range ends before it begins"
    elif any(first.stop > second.start for first, second in pairwise(data.skipped)):
        yield f"data.skip_steps=[{','.join(data.skip_steps)}]: a step is named twice"


def _fim_problems(config: TrainConfig) -> Iterator[str]:
    if config.data.fim_rate and not config.data.eos_between_documents:
        yield (
            f"data.fim_rate={config.data.fim_rate} needs the token that ends a middle: set "
            "data.eos_between_documents=true"
        )
    if config.data.fim_rate and config.data.prompt_column is not None:
        yield (
            f"data.fim_rate={config.data.fim_rate} rearranges documents, and data.prompt_column="
            f"{config.data.prompt_column} has them in two parts: set one of them only"
        )
    yield from _fim_token_problems("tokenizer.fim_tokens", config.tokenizer.fim_tokens)


def _fim_token_problems(name: str, tokens: list[str]) -> Iterator[str]:
    if len({*tokens}) != 3 or len(tokens) != 3 or any(each.split() != [each] for each in tokens):
        yield f"{name}={tokens}: must be three different tokens without white space, for prefix, middle and suffix"


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


NEXT_LINE = "\x85"


def as_document(config: TrainConfig) -> str:
    """A configuration in YAML."""
    content = dataclasses.asdict(config)
    document: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if NEXT_LINE in document:  # PyYAML writes it as it is, and reads it as the end of a line
        document = yaml.safe_dump(content, sort_keys=False, allow_unicode=False)
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
