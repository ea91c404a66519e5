"""Structure of the package: imports, names in a run folder, and private parts of other libraries."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import clippy_train
from clippy_train.run import folder
from clippy_train.train.internals import PRIVATE, Part

PACKAGE = Path(clippy_train.__file__).parent
HEAVY = ("torch", "lightning", "deepspeed", "transformers")


@pytest.mark.processes
@pytest.mark.parametrize("room", ["run", "launch", "sweep"])
def test_a_room_is_imported_without_torch(room: str) -> None:
    """Except `launch.preflight`, which runs in the process of a rank."""
    modules = [f"clippy_train.{room}.{path.stem}" for path in sorted((PACKAGE / room).glob("*.py"))]
    imports = ", ".join(module for module in modules if not module.endswith(("__init__", "preflight")))
    code = f"import sys, {imports}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.processes
def test_a_rank_does_not_import_the_compiler_for_an_optimizer_that_it_has_not() -> None:
    code = """import sys, torch
from clippy_train.train.internals import import_muon
import_muon()
import deepspeed.runtime.zero.muon.muon_optimizer
print("torch._inductor.compile_fx" in sys.modules, type(torch.compile(lambda: 1)))"""
    output = subprocess.check_output(
        [sys.executable, "-c", code], text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    assert output.splitlines()[-1].startswith("False <class 'function'>")


def test_names_in_a_run_folder_are_written_in_one_module_only() -> None:
    constants = {name: value for name, value in vars(folder).items() if name.isupper() and isinstance(value, str)}
    names = [value for name, value in constants.items() if name != "STAGING"]
    assert len(names) > 15
    # A name with a dot is a file's wherever it stands; a word (`best`) is a folder's after a slash.
    pattern = re.compile("|".join(f'{"" if "." in name else "/ "}"{re.escape(name)}"' for name in names))
    own = (PACKAGE / "run" / "folder.py", PACKAGE / "shards" / "sources.py")  # a corpus has a manifest.json as well
    found = {path.name for path in PACKAGE.rglob("*.py") if path not in own and pattern.search(path.read_text())}
    assert found == set()


@pytest.mark.processes  # importing deepspeed.ops starts a compiler
@pytest.mark.parametrize("part", PRIVATE, ids=lambda part: f"{part.owner.rpartition(':')[2]}.{part.name}")
def test_every_private_part_still_exists(part: Part) -> None:
    module, _, name = part.owner.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, name) if name else owner
    in_source = re.search(rf"\w+\.{part.name}\b", inspect.getsource(owner))  # attributes that only instances have
    assert hasattr(owner, part.name) or in_source, f"{part.owner} no longer has {part.name}: {part.why}"
