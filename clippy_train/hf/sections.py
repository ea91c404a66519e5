"""Parts of the model card: data, results and validations as Markdown tables, settings in words, and the curves."""

import shlex
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any

from clippy_train.config import DataConfig, FilterConfig, OptimConfig, TokenizerConfig
from clippy_train.corpus.manifest import VERSION
from clippy_train.data.mixture import corpus_name
from clippy_train.evaluate import completion
from clippy_train.files import file_name

MAX_ROWS = 20  # of a table; the others are summed, or left out between the first and the last
HEADLINES = ("bits_per_byte", "exact_match", "edit_similarity")
BITS_HEADER = ["bits per byte", "loss", "perplexity", "bytes"]
# Keys of `clippy evaluate` whose values name a file or a folder, files, or perhaps something on the hub
PATHS, LISTED_PATHS = ("data.path", "data.filter.opt_out", "samples"), ("data.filter.decontaminate",)
HUB_NAMES = ("data.hub", "problems")
CHARACTERS = {" ": "space", "\t": "tab", "\n": "line end"}


def markdown_table(table: list[list[str]]) -> str:
    """Format rows of cells, the header first."""
    header, *rows = ("| " + " | ".join(cells) + " |" for cells in table)
    return "\n".join([header, "|---" * len(table[0]) + "|", *rows])


# Settings in words


def describe_optimizer(optim: OptimConfig) -> str:
    """The optimizer's name and the settings that apply to it."""
    own = {"betas": optim.betas, "eps": optim.eps, "weight decay": optim.weight_decay}
    return ", ".join([optim.name, *(f"{name} {value}" for name, value in own.items() if value is not None)])


def describe_whitespace_tokens(settings: TokenizerConfig) -> str:
    """The runs of whitespace that are one token each."""
    runs = [" and ".join(_runs(token)) for token in settings.whitespace_tokens]
    if not runs:
        return "no tokens beyond the vocabulary's own"
    which = "the longest" if settings.matching == "longest" else "the first of these"
    return f"one token each for {', '.join(runs)}; where several match, {which}"


def _runs(token: str) -> list[str]:
    counts = [(CHARACTERS.get(character, repr(character)), len(list(run))) for character, run in groupby(token)]
    return [f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts]


# Training data


def data_section(data: DataConfig, corpus: dict[str, Any], tokens: int, cursors: list[list[int]]) -> str:
    """What a run was trained on: its corpus, or the sources of a mixture.

    Args:
        corpus: what the run recorded about its data when it started.
        tokens: trained.
        cursors: of all streams.
    """
    if not data.sources:
        return corpus_section(corpus_name(data.path, data.hub), corpus, data.filter)
    found = list(zip(corpus.get("sources", []), data.sources, strict=False))
    table = [["source", "weight", "share of the tokens", "tokens", "times read in full"]]
    for recorded, source in found:
        streams = recorded["streams"]
        weight = "by size" if data.source_temperature is not None else f"{source.weight or 1:g}"
        share, read = len(streams) / len(cursors), min(cursors[stream][0] for stream in streams)
        table.append(
            [recorded["name"], weight, f"{share:.2%}", f"{tokens // len(cursors) * len(streams):,}", f"{read:,}"]
        )
    sections = [corpus_section(recorded["name"], recorded["manifest"], each.filter) for recorded, each in found]
    temperature = f", with data.source_temperature={data.source_temperature:g}" if data.source_temperature else ""
    return "\n\n".join([f"A mixture of {len(data.sources)} sources{temperature}.", markdown_table(table), *sections])


def corpus_section(name: str, corpus: dict[str, Any], read_with: FilterConfig) -> str:
    """The documents of a corpus by split, language and licence, and the rules that left documents out.

    Args:
        corpus: the manifest that `clippy corpus` wrote; empty if it was made in another way.
        read_with: the rules that training added.
    """
    if corpus.get("version") != VERSION:
        unknown = f"`{name}` has no record of how it was made, so its sources, licences and rules are not known here."
        return f"{unknown} {_cleaning(corpus, read_with)}"
    seen = corpus["documents"] + sum(corpus["rejected"].values())
    splits = {
        name: {**counts, "repositories": corpus["repositories"][name]} for name, counts in corpus["splits"].items()
    }
    dropped = [["rule", "documents dropped"], *([name, f"{count:,}"] for name, count in corpus["rejected"].items())]
    return "\n\n".join(
        [
            f"`{name}`: {corpus['documents']:,} of {seen:,} documents were kept. No repository is in two splits.",
            _documents_table("split", splits),
            _documents_table("language", corpus["languages"]),
            _documents_table("licence", corpus["licences"]),
            f"Documents were dropped by these rules: {', '.join(f'`{each}`' for each in _rules(corpus['settings']))}.",
            *([markdown_table(dropped)] if len(dropped) > 1 else []),
            _cleaning(corpus, read_with),
        ]
    )


def _cleaning(corpus: dict[str, Any], read_with: FilterConfig) -> str:
    """What is known to have been done about benchmarks, personal data and secrets, by the corpus and in training."""
    made_with, counts = corpus.get("settings", {}).get("filter", {}), corpus.get("redacted", {})
    paths = [*made_with.get("decontaminate", []), *read_with.decontaminate]
    files = dict.fromkeys(PurePath(path).name.partition("@")[0] for path in paths)
    kinds = dict.fromkeys([*made_with.get("redact", []), *read_with.redact])
    checked = (
        f"Documents that hold a problem of {', '.join(f'`{name}`' for name in files)} were left out."
        if files
        else "The documents were not checked against any benchmark, and may contain its problems."
    )
    replaced = [f"{kind} ({counts[kind]:,})" if kind in counts else kind for kind in kinds]
    cleaned = (
        f"Placeholders replace {', '.join(replaced)}, where a pattern found them; others remain."
        if replaced
        else "Secrets and personal data were not replaced."
    )
    return f"{checked} {cleaned}"


def _documents_table(heading: str, counted: dict[str, dict[str, int]]) -> str:
    """Documents and text by name, the largest first; small ones are one row."""
    rows = dict(list(counted.items())[:MAX_ROWS])
    others = [counts for name, counts in counted.items() if name not in rows]
    if others:
        rows[f"{len(others)} others"] = {key: sum(each[key] for each in others) for key in others[0]}
    extra = ["repositories"] if "repositories" in next(iter(counted.values()), {}) else []
    cells = [
        [name, f"{each['documents']:,}", f"{each['text_bytes'] / 1e6:,.2f}", *(f"{each[key]:,}" for key in extra)]
        for name, each in rows.items()
    ]
    return markdown_table([[heading, "documents", "MB", *extra], *cells])


def _rules(settings: dict[str, Any]) -> list[str]:
    """The rules of a corpus that are on, as settings."""
    dedup = settings["dedup"] if settings["dedup"]["near"] else {"exact": settings["dedup"]["exact"]}
    found = {"filter": settings["filter"], "dedup": dedup}
    pairs = [(f"{section}.{name}", value) for section in found for name, value in found[section].items()]
    return [
        f"{name}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in pairs
        if value not in (None, [], False)
    ]


# Results


def measured_on(results: dict[str, Any]) -> tuple[str, str]:
    """Short names of what an evaluation measured on: a dataset or a file of problems, and its split."""
    words = _keyed_words(results["about"]["command"])
    if "problems" in words:
        return file_name(words["problems"]).split(".")[0], "test"
    return corpus_name(words.get("data.path"), words.get("data.hub")), words.get("split", "validation")


def headline_metrics(results: dict[str, Any]) -> dict[str, float]:
    """The numbers that summarise an evaluation: pass@k, bits per byte, or how well lines are completed."""
    if results["about"]["task"] == "humaneval":
        return {name: value for name, value in results.items() if name.startswith("pass@")}
    total = results["results"][results["about"]["model"]]["total"]
    return {name: total[name] for name in HEADLINES if name in total}


def sampling_of(results: dict[str, Any]) -> dict[str, Any]:
    """What a pass@k is stated with, None where another tool made the samples; for other tasks, what was filled in."""
    infill = _infill(results)
    if infill:
        return {"infill": infill}
    made = results["about"].get("samples")
    return {name: made.get(name) for name in ("n", "temperature", "top_p", "problems")} if made else {}


def _infill(results: dict[str, Any]) -> str | None:
    """What lines were completed from both sides; other tasks take the key and do not read it."""
    about = results["about"]
    return _keyed_words(about["command"]).get("infill") if about["task"] == "completion" else None


def evaluation_section(evaluations: list[dict[str, Any]], place: str) -> str:
    """All evaluations: one table of pass@k, one by language for each of the others, and the commands."""
    if not evaluations:
        return "None beyond the validation below."
    solved = [each for each in evaluations if each["about"]["task"] == "humaneval"]
    tables = [_pass_table(solved)] if solved else []
    tables += [_language_table(each) for each in evaluations if each not in solved]
    commands = "\n".join(public_command(each["about"]["command"], place) for each in evaluations)
    return "\n\n".join([*tables, f"By these commands:\n\n```\n{commands}\n```"])


def _pass_table(evaluations: list[dict[str, Any]]) -> str:
    rows = []
    for each in evaluations:
        best = each["about"]["samples"].get("best_temperature", {})
        for name, value in headline_metrics(each).items():
            made = sampling_of(each)
            if best:
                made["temperature"] = f"{best[name]}, the best of {', '.join(map(str, made['temperature']))}"
            cells = ["unknown" if cell is None else str(cell) for cell in made.values()]
            rows.append([measured_on(each)[0], name, f"{100 * value:.2f} %", *cells])
    return markdown_table([["problems", "metric", "solved", "n", "temperature", "top_p", "with samples"], *rows])


def _language_table(results: dict[str, Any]) -> str:
    found = results["results"][results["about"]["model"]]
    parts = {"total": found["total"], **found["languages"]}
    rows = [[name, *_cells(each)] for name, each in list(parts.items())[: 1 + MAX_ROWS]]
    header = completion.HEADER[1:] if "exact_match" in found["total"] else BITS_HEADER
    name, split = measured_on(results)
    what = "solutions" if "problems" in _keyed_words(results["about"]["command"]) else split
    infill = _infill(results)
    what = f"{what}, {infill}s filled in" if infill else what
    return markdown_table([[f"{name}, {what}", *header], *rows])


def _cells(each: dict[str, float]) -> list[str]:
    if "exact_match" in each:
        return completion.cells(each)
    bits, loss = (f"{each[name]:.4f}" for name in ("bits_per_byte", "loss"))
    return [bits, loss, f"{each['perplexity']:.2f}", f"{each['bytes']:,}"]


def public_command(command: str, place: str) -> str:
    """A command without folders: the model as others load it, files by their names."""
    words = [word.partition("=") for word in shlex.split(command)]
    return shlex.join(name + equal + _public_value(name, value, place) for name, equal, value in words)


def _public_value(name: str, value: str, place: str) -> str:
    if name == "model":
        return place
    if name in PATHS:
        return PurePath(value).name
    if name in LISTED_PATHS:
        return f"[{','.join(PurePath(each).name for each in value.strip('[]').split(','))}]"
    return file_name(value) if name in HUB_NAMES else value


def _keyed_words(command: str) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition("=") for word in shlex.split(command))}


# Validation


def validation_tables(validations: list[dict[str, Any]]) -> str:
    """A table of validations, at most `MAX_ROWS` of them, and one of the last validation by language."""
    if not validations:
        return "None was run."
    total = [["step", "loss", "perplexity", "bits per byte"]] + [
        [
            f"{row['step']:,}",
            f"{row['val/loss']:.4f}",
            f"{row['val/perplexity']:.2f}",
            f"{row['val/bits_per_byte']:.4f}",
        ]
        for row in evenly(validations, MAX_ROWS)
    ]
    last = [
        _bits_per_byte("language", "val/", validations[-1]),
        _bits_per_byte("source", "val/sources/", validations[-1]),
    ]
    some = f"{MAX_ROWS} of {len(validations):,} validations:\n\n" if len(validations) > MAX_ROWS else ""
    return some + "\n\n".join(markdown_table(table) for table in [total, *last] if len(table) > 1)


def evenly(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` of the rows, evenly spaced, with the first and the last."""
    if len(rows) <= count:
        return rows
    return [rows[round(index * (len(rows) - 1) / (count - 1))] for index in range(count)]


def _bits_per_byte(heading: str, prefix: str, row: dict[str, Any]) -> list[list[str]]:
    """A table of the bits per byte of each part in a validation's metrics row."""
    prefix += "bits_per_byte/"
    found = sorted((name.removeprefix(prefix), value) for name, value in row.items() if name.startswith(prefix))
    return [[heading, "bits per byte at the end"], *([name, f"{value:.4f}"] for name, value in found)]


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot training and validation loss and the learning rate over the optimizer steps, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, names in ((left, ("train/loss", "val/loss")), (right, ("train/lr",))):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot([step for step, _ in points], [value for _, value in points], ".-", label=name)
        axes.set_xlabel("optimizer step")
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
