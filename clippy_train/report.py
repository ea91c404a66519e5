"""What a person sees: a run's log, tables, errors, and no progress bars of libraries."""

import io
import logging
import shutil
import sys
import textwrap
import time

from rich.console import Console
from rich.table import Table

TIME = "%Y-%m-%d %H:%M:%S"


def set_up_log() -> None:
    """Send warnings of this process of a run to standard output, where the run's other lines are, with their time."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt=TIME, level=logging.WARNING, stream=sys.stdout)


def say(line: str) -> None:
    """Print a line of a run's log at once, with its time."""
    print(f"{time.strftime(TIME)} {line}", flush=True)


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print a table of names and values."""
    table = Table(title=title, show_header=False, title_justify="left", pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def print_columns(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table with a header; the caller formats numbers."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for heading in header:
        table.add_column(heading, overflow="fold")  # never cut a name off
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def escape_unprintable() -> None:
    """Print what a terminal's encoding lacks as an escape, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_error(command: str, message: str) -> None:
    """Print each line of a message to standard error, after the command's name; wrapped at words on a terminal."""
    width = shutil.get_terminal_size().columns if sys.stderr.isatty() else sys.maxsize
    for line in message.splitlines():
        text = f"{command}: {line}"
        wrapped = textwrap.wrap(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        print("\n".join(wrapped), file=sys.stderr)


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and advice."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
