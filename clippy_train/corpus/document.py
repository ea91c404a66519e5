"""What every source of a corpus gives: documents that are described before they are read."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Unusable(Exception):
    """A document that is left out; the only argument is the name of the rule that it is counted under."""


class Document(NamedTuple):
    key: str  # names the document in its source: its place in the shuffled order depends on it
    repository: str  # what is never split between train, validation and test
    meta: dict[str, Any]  # Code Clippy meta
    read: Callable[[], str]  # the text, or Unusable
