"""Ways to damage a file of a checkpoint: each takes the file and the same file of an older checkpoint."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "deleted": lambda path, older: path.unlink(),
    "truncated": lambda path, older: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path, older: os.truncate(path, 0),
    "one bit flipped": lambda path, older: flip(path),
    "swapped with an older one": lambda path, older: shutil.copy(older, path),
    "replaced by a folder": lambda path, older: replace_by_folder(path),
    "replaced by a link to nowhere": lambda path, older: replace_by_dead_link(path),
    "beside an extra file": lambda path, older: path.with_suffix(".extra").write_bytes(b""),
}
