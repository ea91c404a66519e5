"""What every source of a corpus yields: documents that are read, and their meta found, when they are wanted."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Rejected(Exception):
    """A document is rejected; the only argument is the name of the rule that it is counted under."""


class Document(NamedTuple):
    key: str  # identifies the document in its source: its place in the shuffled order depends on it
    repository: str  # never split between train, validation and test
    read: Callable[[], tuple[str, dict[str, Any]]]  # returns the text and its Code Clippy meta, or raises Rejected
    prompt: str | None = None  # what the text continues
