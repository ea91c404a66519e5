"""What a person sees: tables, and no progress bars of libraries in between."""

from rich.console import Console
from rich.table import Table


def print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """A two-column table on standard output."""
    table = Table(title=title, show_header=False, title_justify="left", pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def print_columns(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table with a row of headings on standard output; numbers are the caller's to format."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    for heading in header:
        table.add_column(heading, overflow="fold")  # a name that is cut off is no name
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and advice."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
