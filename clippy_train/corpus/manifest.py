"""What a corpus holds: counted while it is built, saved in `manifest.json`, shown by `clippy corpus --report`."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from clippy_train.errors import DataError
from clippy_train.shards.sources import MANIFEST

VERSION = 2
UNKNOWN = "unknown"  # a language or licence that is not stated


class Tally:
    """Kept documents and bytes of text under several headings, rejected documents by rule, and what was replaced in
    documents that break no rule, by kind."""

    def __init__(self) -> None:
        self.rejected: Counter[str] = Counter()
        self.redacted: Counter[str] = Counter()
        self.kept: dict[str, defaultdict[str, Counter[str]]] = {
            heading: defaultdict(Counter) for heading in ("splits", "languages", "licences")
        }

    def add(self, heading: str, name: str | None, text_bytes: int) -> None:
        self.kept[heading][name or UNKNOWN].update(documents=1, text_bytes=text_bytes)

    def update(self, kept: dict[str, dict[str, dict[str, int]]]) -> None:
        """Add the `kept` of another tally."""
        for heading, counts in kept.items():
            for name, count in counts.items():
                self.kept[heading][name].update(count)

    def counts(self) -> dict[str, Any]:
        """The counts in a fixed order, the largest first."""
        totals = sum(self.kept["splits"].values(), Counter())
        return {
            "documents": totals["documents"],
            "text_bytes": totals["text_bytes"],
            **{heading: _largest_first(counts) for heading, counts in self.kept.items()},
            "redacted": dict(sorted(self.redacted.items())),
            "rejected": dict(sorted(self.rejected.items(), key=lambda item: (-item[1], item[0]))),
        }


def _largest_first(counts: dict[str, Counter[str]]) -> dict[str, dict[str, int]]:
    return {name: dict(count) for name, count in sorted(counts.items(), key=lambda i: (-i[1]["text_bytes"], i[0]))}


def write_manifest(corpus: Path, manifest: dict[str, Any]) -> None:
    (corpus / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def read_manifest(corpus: Path) -> dict[str, Any]:
    """The manifest of a finished corpus.

    Raises:
        DataError: there is none, or it has another version.
    """
    path = corpus / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"out={corpus} is not a finished corpus: {MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        raise DataError(f"{path} is not version {VERSION}: build the corpus again")
    return manifest


def statistics(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the statistics table."""
    documents, text_bytes = manifest["documents"], manifest["text_bytes"]
    seen = documents + sum(manifest["rejected"].values())
    rows = [("documents", f"{seen:,} seen, {documents:,} kept"), ("text", f"{text_bytes / 1e6:,.1f} MB")]
    checked = manifest["settings"]["filter"].get("decontaminate", [])
    rows.append(("checked against", ", ".join(checked) or "no benchmark"))
    for split, files in manifest["files"].items():
        share = _share(manifest["splits"][split], text_bytes)
        rows.append((split, f"{share}, {manifest['repositories'][split]:,} repositories, {len(files):,} shards"))
    for heading in ("languages", "licences"):
        rows += [(f"{heading[:-1]} {name}", _share(counts, text_bytes)) for name, counts in manifest[heading].items()]
    rows += [(f"rejected: {rule}", f"{count:,} ({count / seen:.1%})") for rule, count in manifest["rejected"].items()]
    rows += [(f"replaced: {kind}", f"{count:,}") for kind, count in manifest.get("redacted", {}).items()]
    return rows


def _share(counts: dict[str, int], total_bytes: int) -> str:
    size = counts["text_bytes"]
    return f"{counts['documents']:,} documents, {size / 1e6:,.1f} MB ({size / total_bytes:.1%})"
