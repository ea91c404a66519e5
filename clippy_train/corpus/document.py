"""What every source of a corpus yields: documents whose meta is known before their text is read."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Rejected(Exception):
    """A document is rejected; the only argument is the name of the rule that it is counted under."""


class Document(NamedTuple):
    key: str  # identifies the document in its source: its place in the shuffled order depends on it
    repository: str  # never split between train, validation and test
    meta: dict[str, Any]  # Code Clippy meta
    read: Callable[[], str]  # returns the text, or raises Rejected
