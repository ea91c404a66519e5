"""The `clippy` command: verb -> compose -> validate -> call. No logic of its own; heavy imports wait for their verb."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clippy_train import __version__, compose, config
from clippy_train.errors import CheckpointError, ClippyError, ConfigError
from clippy_train.report import print_columns, print_table, quiet_transformers
from clippy_train.sweep.sweep import sweep
from clippy_train.sweep.trials import follow_sweep


def run_corpus(settings: config.CorpusConfig) -> int:
    from clippy_train.corpus.build import build_corpus
    from clippy_train.corpus.manifest import statistics

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


def run_plan(settings: config.TrainConfig) -> int:
    from clippy_train.launch.start import preflight_problems
    from clippy_train.plan import plan

    print_table("plan", plan(settings))
    for error in preflight_problems(settings):
        print(f"before it can run here: {error}")
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

    if settings.prompt is not None or settings.file is not None:
        raise ConfigError("--interactive asks for prompts: leave out prompt and file")
    quiet_transformers()
    interact(settings, sys.stdin, sys.stdout)
    return 0


def run_evaluate(settings: config.EvaluateConfig) -> int:
    from clippy_train.evaluate.humaneval import humaneval
    from clippy_train.evaluate.perplexity import perplexity, tables
    from clippy_train.evaluate.results import require_writable, write_results

    quiet_transformers()
    require_writable(settings)
    results: dict[str, Any] = {}
    if settings.task == "humaneval":
        results.update(humaneval(settings))
        print_table("HumanEval", [(name, f"{value:.4f}") for name, value in results.items()])
    else:
        results["results"] = perplexity(settings)
        for title, header, rows in tables(results["results"]):
            print_columns(title, header, rows)
    write_results(settings, results)
    return 0


def run_demo(settings: config.DemoConfig) -> int:
    from clippy_train.demo import demo

    quiet_transformers()
    return demo(settings)


@dataclass(frozen=True)
class Verb:
    schema: type
    run: Callable[[Any], int]
    summary: str
    bare: str = ""  # the override that arguments without a key stand for


VERBS = {
    "corpus": Verb(
        config.CorpusConfig, run_corpus, "SRC... out=DIR  folders of source code, or hub=NAME -> shards", "src=[{}]"
    ),
    "extend": Verb(config.ExtendConfig, run_extend, "base=NAME out=DIR  add white-space tokens to a model"),
    "import": Verb(config.ImportConfig, run_import, "flax=DIR out=DIR  original checkpoint -> Hugging Face folder"),
    "train": Verb(config.TrainConfig, run_train, "experiment=NAME data.path=DIR  train, or continue training"),
    "plan": Verb(
        config.TrainConfig, run_plan, "experiment=NAME  what a training will take; the same as train --dry-run"
    ),
    "checkpoint": Verb(
        config.CheckpointsConfig,
        run_checkpoint,
        "ls|verify run=DIR  list a run's checkpoints, or read all of them",
        "action={}",
    ),
    "export": Verb(config.ExportConfig, run_export, "run=DIR out=DIR  checkpoint -> Hugging Face folder"),
    "generate": Verb(config.GenerateConfig, run_generate, "model=DIR prompt=TEXT  complete a prompt"),
    "evaluate": Verb(
        config.EvaluateConfig,
        run_evaluate,
        "model=DIR task=perplexity|humaneval  bits per byte on a split; problems that samples solve",
    ),
    "demo": Verb(config.DemoConfig, run_demo, "the whole pipeline on the source code of this Python, in minutes"),
}

FLAGS = {  # which verb has which
    "report": (config.CorpusConfig, "corpus"),
    "interactive": (config.GenerateConfig, "generate"),
    "multirun": (config.TrainConfig, "train"),
    "dry_run": (config.TrainConfig, "train"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see `errors`)."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0 if options.help else 2
    verb = VERBS[options.verb]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that nothing half-written stays
    try:
        return _call(verb, options)
    except ClippyError as error:
        print(f"clippy {options.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `clippy ... | head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a path that cannot be what it is to be, a full disk
        print(f"clippy {options.verb}: {error}", file=sys.stderr)
        return ConfigError.exit_code


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {name:10}{verb.summary}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        "clippy",
        description=f"Re-train GPT-Neo-125M-Code-Clippy.\n\nverbs:\n{verbs}",
        epilog="clippy VERB --help explains every key of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the verb")
    parser.add_argument("-h", "--help", action="store_true", help="explain the verb's keys, with their values")
    parser.add_argument("-m", "--multirun", action="store_true", help="train: sweep over comma-separated values")
    parser.add_argument("--dry-run", action="store_true", help="train: check everything and print the plan only")
    parser.add_argument(
        "--report", action="store_true", help="corpus: the statistics of the finished corpus in out=DIR"
    )
    parser.add_argument(
        "--launch-dir", action="version", version=str(compose.LAUNCH), help="print the folder of the Slurm scripts"
    )
    parser.add_argument("--interactive", action="store_true", help="generate: ask for prompts, one after another")
    parser.add_argument("--version", action="version", version=f"clippy_train {__version__}")
    return parser


def _call(verb: Verb, options: argparse.Namespace) -> int:
    overrides = options.overrides
    if verb.bare:
        overrides = _keyed(verb, overrides)
    if options.help:
        return _explain(verb, overrides)
    for flag, (schema, owner) in FLAGS.items():
        if getattr(options, flag) and verb.schema is not schema:
            raise ConfigError(f"--{flag.replace('_', '-')} is for clippy {owner}")
    if options.report:
        return report_corpus(compose.compose(config.CorpusConfig, overrides))
    if options.interactive:
        return run_interactive(compose.compose(config.GenerateConfig, overrides))
    if verb.schema is not config.TrainConfig:
        return verb.run(compose.compose(verb.schema, overrides))
    run = run_plan if options.dry_run else verb.run
    if options.multirun:
        return sweep(overrides, run_plan if run is run_plan else None)
    return run(compose.compose(config.TrainConfig, overrides))


def _keyed(verb: Verb, arguments: list[str]) -> list[str]:
    """Arguments without a key (SRC... of `clippy corpus`) as the override that they stand for."""
    bare = [compose.quoted(argument) for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    return [*overrides, verb.bare.format(",".join(bare))] if bare else overrides


def _explain(verb: Verb, overrides: list[str]) -> int:
    """Print every key with its meaning and its value under the overrides given."""
    values = compose.composed_values(verb.schema, overrides)
    table = Table("key", "value", "meaning", title=f"clippy {verb.summary}", title_justify="left", pad_edge=False)
    for name, field in config.keys(verb.schema):
        meaning, choices, minimum, maximum = (
            field.metadata[part] for part in ("meaning", "choices", "minimum", "maximum")
        )
        meaning += f" [one of {', '.join(choices)}]" if choices else ""
        meaning += f" [at least {minimum:g}]" if minimum is not None else ""
        meaning += f" [at most {maximum:g}]" if maximum is not None else ""
        table.add_row(escape(name), escape(str(values[name])) or "(required)", escape(meaning))
    console = Console(highlight=False)
    console.print(table)
    if verb.schema is config.TrainConfig:
        console.print(f"Groups: experiment ({', '.join(compose.experiments())}),")
        console.print("recipe (original), model, optim, strategy, launcher.")
        console.print("Values are those of the experiment given: clippy train experiment=NAME --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
