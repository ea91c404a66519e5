"""What a person sees: tables, errors, and no progress bars of libraries."""

import io
import shutil
import sys
import textwrap

from rich.console import Console
from rich.table import Table


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
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
