"""Measure what fill-in-the-middle costs left-to-right prediction, and what it teaches: short runs at several rates.

    python benchmarks/fim.py [STEPS] [ROWS] [KEY=VALUE...]    in a folder with the corpus and tokenizer of `clippy demo`

All rates train on equally many tokens (700 steps by default). Bits per byte and next lines are left to right, over the
validation split (its first ROWS blocks and documents); lines and spans are filled in by the models that can. What is
finished is not repeated.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RATES = (0.0, 0.5, 0.9)
WARMUP = 50  # the demo's
SEQ_LEN = 256  # the demo's
HEADER = ["fim_rate", "tokens", "bits per byte", "next lines", "lines filled in", "spans filled in"]


def clippy(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "clippy_train.cli", *arguments], check=True, stdout=sys.stderr)


def trained(rate: float, steps: int, settings: list[str]) -> Path:
    """The folder of a run, with its exported model."""
    run = Path("runs") / f"fim-{rate}-{steps}"
    if not (run / "model").exists():
        length = [f"trainer.max_steps={steps}", f"optim.decay_steps={max(1, steps - WARMUP)}"]
        clippy("train", "experiment=demo_fim", f"run.name={run.name}", f"data.fim_rate={rate}", *length, *settings)
        clippy("export", f"run={run}", f"out={run / 'model'}")
    return run


def total(run: Path, name: str, rows: str, *arguments: str) -> dict[str, Any]:
    """What an evaluation found, over all languages."""
    out = run / f"{name}.json"
    if not out.exists():
        asked = [f"model={run / 'model'}", "data.path=demo/corpus", f"max_rows={rows}", f"out={out}"]
        clippy("evaluate", *asked, *arguments)
    (found,) = json.loads(out.read_text())["results"].values()
    return dict(found["total"])


def lines(run: Path, infill: str, rows: str) -> str:
    """Exact match and edit similarity."""
    found = total(run, infill, rows, "task=completion", f"infill={infill}", "n=8")
    return f"{found['exact_match']:.1%}, {found['edit_similarity']:.3f}"


def row(rate: float, steps: int, rows: str, settings: list[str]) -> list[str]:
    run = trained(rate, steps, settings)
    bits = total(run, "bits", rows, "task=perplexity", f"seq_len={SEQ_LEN}")["bits_per_byte"]
    filled = [lines(run, infill, rows) if rate else "" for infill in ("line", "span")]
    return [f"{rate}", f"{steps * 16 * SEQ_LEN:,}", f"{bits:.4f}", lines(run, "none", rows), *filled]


def main(steps: str = "700", rows: str = "null", *settings: str) -> None:
    measured = [row(rate, int(steps), rows, list(settings)) for rate in RATES]
    for cells in (HEADER, ["---"] * len(HEADER), *measured):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
