"""The `clippy` command: verb -> compose -> check -> call. Each verb imports what it needs when it runs."""

import argparse
import difflib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from clippy_train import __version__, compose, config
from clippy_train.errors import CheckpointError, ClippyError, ConfigError
from clippy_train.files import atomic_write, require_writable
from clippy_train.help import completions, key_lines
from clippy_train.report import escape_unprintable, print_columns, print_error, print_table, quiet_transformers
from clippy_train.sweep.sweep import require_run, sweep
from clippy_train.sweep.trials import follow_sweep

if TYPE_CHECKING:
    from clippy_train.plan import Plan


def run_corpus(settings: config.CorpusConfig) -> int:
    from clippy_train.corpus.build import build_corpus
    from clippy_train.corpus.manifest import statistics
    from clippy_train.corpus.slurm import submit_corpus

    if settings.slurm.partition:
        print_table(f"jobs that build {settings.out}", submit_corpus(settings))
        return 0
    print_table(f"corpus in {settings.out}", statistics(build_corpus(settings)))
    return 0


def report_corpus(settings: config.CorpusConfig) -> int:
    from clippy_train.corpus.manifest import read_manifest, statistics

    print_table(f"corpus in {settings.out}", statistics(read_manifest(Path(settings.out))))
    return 0


def run_extend(settings: config.ExtendConfig) -> int:
    from clippy_train.hf.extend import extend_folder

    quiet_transformers()
    print(extend_folder(settings))
    return 0


def run_import(settings: config.ImportConfig) -> int:
    from clippy_train.hf.import_flax import import_flax

    quiet_transformers()
    print(import_flax(settings))
    return 0


def run_train(settings: config.TrainConfig) -> int:
    from clippy_train.launch.start import train

    follow_sweep()
    return train(settings)


def run_checkpoint(settings: config.CheckpointsConfig) -> int:
    from clippy_train.run.listing import listing

    header, rows, intact = listing(Path(settings.run), content=settings.action == "verify")
    print_columns(f"checkpoints of {settings.run}", header, rows)
    return 0 if intact or settings.action == "ls" else CheckpointError.exit_code


def run_plan(settings: config.PlanConfig) -> int:
    from clippy_train.plan import make_plan

    require_writable(settings.out)
    plan = make_plan(settings, settings.memory_gb)
    show_plan(settings, plan)
    if settings.out is not None:
        with atomic_write(Path(settings.out)) as file:
            file.write(json.dumps(asdict(plan), indent=1) + "\n")
    return 0


def show_plan(settings: config.TrainConfig, plan: "Plan | None" = None) -> int:
    from clippy_train.launch.start import corpus_warnings, preflight_problems
    from clippy_train.plan import make_plan, plan_rows

    print_table("plan", plan_rows(settings, plan or make_plan(settings)))
    for error in preflight_problems(settings):
        print(f"not ready to run here: {error}")
    for warning in corpus_warnings(settings):
        print(f"warning: {warning}")
    return 0


def run_export(settings: config.ExportConfig) -> int:
    from clippy_train.hf.export import export_run

    quiet_transformers()
    print(export_run(settings))
    return 0


def run_generate(settings: config.GenerateConfig) -> int:
    from clippy_train.generate import generate, read_prompt

    quiet_transformers()
    generate(settings, read_prompt(settings), sys.stdout)
    return 0


def run_interactive(settings: config.GenerateConfig) -> int:
    from clippy_train.generate import interact

    if any(each is not None for each in (settings.prompt, settings.file, settings.suffix)):
        raise ConfigError("--interactive asks for prompts: omit prompt, file and suffix")
    quiet_transformers()
    interact(settings, sys.stdin, sys.stdout)
    return 0


def run_evaluate(settings: config.EvaluateConfig) -> int:
    from clippy_train.evaluate import completion, perplexity
    from clippy_train.evaluate.humaneval import humaneval
    from clippy_train.evaluate.results import write_results

    quiet_transformers()
    require_writable(settings.out)
    if settings.task == "humaneval":
        scores = humaneval(settings)
        if scores:
            print_table("pass@k", [(name, f"{value:.4f}") for name, value in scores.pass_at.items()])
            by_temperature = {"by_temperature": scores.by_temperature} if scores.by_temperature else {}
            write_results(settings, {**scores.pass_at, **by_temperature}, scores.about)
        return 0
    if settings.task == "completion":
        found = completion.completion(settings)
        tables = completion.tables(found)
    else:
        found = perplexity.perplexity(settings)
        tables = perplexity.tables(found)
    for title, header, rows in tables:
        print_columns(title, header, rows)
    write_results(settings, {"results": found})
    return 0


def run_demo(settings: config.DemoConfig) -> int:
    from clippy_train.demo import demo

    quiet_transformers()
    return demo(settings)


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        usage: the keys that are usually given.
        bare: the override that arguments without a key stand for.
    """

    schema: type
    run: Callable[[Any], int]
    usage: str
    summary: str
    bare: str = ""


VERBS = {
    "corpus": Verb(
        config.CorpusConfig,
        run_corpus,
        "clippy corpus SRC... out=DIR",
        "Turn folders of source code, or a dataset (hub=NAME), into shards.",
        "src=[{}]",
    ),
    "extend": Verb(config.ExtendConfig, run_extend, "clippy extend base=NAME out=DIR", "Add tokens to a model."),
    "import": Verb(
        config.ImportConfig,
        run_import,
        "clippy import flax=DIR out=DIR",
        "Convert an original checkpoint to a Hugging Face folder.",
    ),
    "train": Verb(
        config.TrainConfig, run_train, "clippy train experiment=NAME data.path=DIR", "Train, or continue training."
    ),
    "plan": Verb(
        config.PlanConfig,
        run_plan,
        "clippy plan experiment=NAME",
        "Show what a run will take; the same as train --dry-run.",
    ),
    "checkpoint": Verb(
        config.CheckpointsConfig,
        run_checkpoint,
        "clippy checkpoint ls|verify run=DIR",
        "List the checkpoints of a run, or verify every byte of them.",
        "action={}",
    ),
    "export": Verb(
        config.ExportConfig,
        run_export,
        "clippy export run=DIR out=DIR",
        "Turn a checkpoint into a Hugging Face folder.",
    ),
    "generate": Verb(
        config.GenerateConfig, run_generate, "clippy generate model=DIR prompt=TEXT", "Complete a prompt."
    ),
    "evaluate": Verb(
        config.EvaluateConfig,
        run_evaluate,
        "clippy evaluate model=DIR task=TASK",
        "Measure bits per byte, how lines are completed, or problems solved.",
    ),
    "demo": Verb(
        config.DemoConfig,
        run_demo,
        "clippy demo",
        "Run the whole pipeline on the source code of this Python, in minutes.",
    ),
}


@dataclass(frozen=True)
class Flag:
    """An option of some verbs; `value` names what follows it, if anything does."""

    verbs: tuple[str, ...]
    meaning: str
    short: tuple[str, ...] = ()
    value: str = ""


FLAGS = {
    "--report": Flag(("corpus",), "show the statistics of the finished corpus in out=DIR"),
    "--multirun": Flag(("train", "plan"), "sweep over keys with several values (KEY=A,B)", ("-m",)),
    "--dry-run": Flag(("train", "plan"), "check everything and print the plan only"),
    "--config-dir": Flag(
        ("train", "plan"), "take options of groups also from DIR/experiment/*.yaml, DIR/model/*.yaml, ...", value="DIR"
    ),
    "--cfg": Flag(("train", "plan"), "print the composed configuration (--cfg job) as YAML, and exit", value="job"),
    "--interactive": Flag(("generate",), "ask for prompts, one after another"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see `errors`)."""
    escape_unprintable()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    _complete()
    parser = _parser(next((each for each in arguments if each in VERBS), ""))
    typed = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if typed is not None and typed not in VERBS:
        near = difflib.get_close_matches(typed, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(VERBS)}"
        print_error(parser.prog, f"unknown verb {typed!r}; {hint}")
        return ConfigError.exit_code
    options = parser.parse_intermixed_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0 if options.help else 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that nothing half-written stays
    try:
        _require_current_folder()
        return _call(parser, options)
    except ClippyError as error:
        print_error(parser.prog, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `clippy ... | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a path of the wrong kind, a full disk
        print_error(parser.prog, str(error))
        return ConfigError.exit_code


def _require_current_folder() -> None:
    """Relative paths start here."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder no longer exists: change to another one") from error


def _parser(name: str) -> argparse.ArgumentParser:
    """The parser of a verb or, for any other name, of the whole command. Both accept the same; their help differs."""
    verb = VERBS.get(name)
    verbs = "".join(f"\n  {each.usage}\n      {each.summary}" for each in VERBS.values())
    parser = argparse.ArgumentParser(
        f"clippy {name}" if verb else "clippy",
        usage=f"{verb.usage if verb else 'clippy VERB'} [KEY=VALUE ...]",
        description=verb.summary if verb else f"Re-train GPT-Neo-125M-Code-Clippy.\n{verbs}",
        epilog=None if verb else "clippy VERB --help explains the options and keys of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    overrides = parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=argparse.SUPPRESS)
    overrides.completer = _completions  # type: ignore[attr-defined]  # argcomplete looks for it there
    parser.add_argument("-h", "--help", action="store_true", help="show this help, and exit")
    for option, flag in FLAGS.items():
        meaning = flag.meaning if name in flag.verbs else argparse.SUPPRESS
        takes: dict[str, Any] = {"metavar": flag.value} if flag.value else {"action": "store_true"}
        parser.add_argument(*flag.short, option, help=meaning, **takes)
    for option, meaning, shown in (
        ("--launch-dir", "print the folder of the Slurm and torchrun scripts, and exit", str(compose.LAUNCH)),
        ("--version", "print the version, and exit", f"clippy_train {__version__}"),
    ):
        parser.add_argument(option, action="version", version=shown, help=argparse.SUPPRESS if verb else meaning)
    return parser


def _complete() -> None:
    """Answer a shell that asks for completions, and exit; do nothing for any other caller."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
        line = re.sub(r" -\S*(?= )", "", typed)  # argparse expects no more keys after an option
        os.environ.update(COMP_LINE=line, COMP_POINT=str(len(line)))
        argcomplete.autocomplete(_parser("".join(line.split()[1:2])))


def _completions(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    return completions(VERBS[parsed_args.verb].schema, prefix) if parsed_args.verb else []


def _call(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    verb, overrides = VERBS[options.verb], options.overrides
    compose.ADDED[:] = _config_dir(options.config_dir)
    if verb.bare:
        overrides = _keyed(verb, overrides)
    if options.help:
        lines = key_lines(verb.schema, compose.composed_values(verb.schema, overrides))
        print(parser.format_help(), *lines, sep="\n")
        return 0
    for option, flag in FLAGS.items():
        if getattr(options, option.strip("-").replace("-", "_")) and options.verb not in flag.verbs:
            raise ConfigError(f"{option} is for {' and '.join(f'clippy {verb}' for verb in flag.verbs)}")
    if options.report:
        return report_corpus(compose.compose(config.CorpusConfig, overrides))
    if options.interactive:
        return run_interactive(compose.compose(config.GenerateConfig, overrides))
    if options.cfg:
        return _print_configuration(options.cfg, verb.schema, overrides)
    plan = options.dry_run or verb.schema is config.PlanConfig
    if options.multirun and any(each.startswith(("out=", "memory_gb=")) for each in overrides):
        raise ConfigError("out and memory_gb are for the plan of one run: leave out -m")
    if options.multirun:
        return sweep(overrides, show_plan if plan else None)
    if plan:
        verb = VERBS["plan"]
    settings: Any = compose.compose(verb.schema, overrides)
    if isinstance(settings, config.TrainConfig):
        require_run(overrides)
    return verb.run(settings)


def _config_dir(typed: str | None) -> list[Path]:
    if typed and not Path(typed).is_dir():
        raise ConfigError(f"--config-dir {typed}: no such folder")
    return [Path(typed).resolve()] if typed else []


def _print_configuration(part: str, schema: type, overrides: list[str]) -> int:
    if part != "job":
        raise ConfigError(f"--cfg {part}: only --cfg job exists")
    print(OmegaConf.to_yaml(compose.composition(schema, overrides)), end="")
    return 0


def _keyed(verb: Verb, arguments: list[str]) -> list[str]:
    """Replace arguments without a key (SRC... of `clippy corpus`) by the override that they stand for."""
    bare = [compose.quoted(argument) for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    return [*overrides, verb.bare.format(",".join(bare))] if bare else overrides


if __name__ == "__main__":
    sys.exit(main())
