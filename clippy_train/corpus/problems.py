"""Files of programming problems -> documents with a prompt: one for each reference solution.

Promises: the solutions of a problem are never divided between splits; the order is that of the file. Memory: one file.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from clippy_train.corpus.document import Document, Rejected
from clippy_train.shards.problems import Exercise, read_exercises

META = {"stars": None, "file_name": None, "mime_type": None, "license": None}


def problem_documents(name: str) -> Iterator[Document]:
    """A document for each solution of each exercise.

    Raises:
        ConfigError, DataError: as `read_exercises`.
    """
    for exercise in read_exercises(name, "problems"):
        for number, solution in enumerate(exercise.solutions):
            read = partial(_read, exercise, solution)
            yield Document(f"{exercise.name} {number}", exercise.name, read, exercise.prompt)


def _read(exercise: Exercise, solution: str) -> tuple[str, dict[str, Any]]:
    if not solution:
        raise Rejected("no_text")
    return solution, {**META, "repo_name": exercise.name, "repo_language": exercise.language}
