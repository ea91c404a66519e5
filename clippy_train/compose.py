"""Command line -> typed configuration, through Hydra and once per run.

`key=value` overrides are Hydra's, with two additions: an unknown key is refused with the nearest one, and free text
(prompts, paths) is taken as typed, without Hydra's quoting rules.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clippy_train.config import TrainConfig, keys, typed
from clippy_train.errors import ConfigError, first_line
from clippy_train.launch.resources import fill_in

T = TypeVar("T")

_HERE = Path(__file__).parent
# In a wheel the folders conf/ and launch/ are inside the package; in the source tree they are beside it.
_INSTALLED = (_HERE / "conf").is_dir()
CONF = _HERE / "conf" if _INSTALLED else _HERE.parent / "conf"
LAUNCH = _HERE / "launch_scripts" if _INSTALLED else _HERE.parent / "launch"


def compose(schema: type[T], overrides: list[str]) -> T:
    """The configuration of a verb.

    Raises:
        ConfigError: an unknown key or choice, a value of the wrong type, a missing value, a contradiction.
    """
    return validated(composition(schema, overrides), schema)


def validated(composed: DictConfig, schema: type[T]) -> T:
    """As `compose`, for what is composed already."""
    try:
        if schema is TrainConfig:
            fill_in(composed)
        return typed(composed, schema)
    except OmegaConfBaseException as error:  # an interpolation of what there is not
        raise ConfigError(reason(error)) from error


def checked(schema: type, overrides: list[str]) -> list[Override]:
    """Parse overrides and refuse keys that do not exist.

    Raises:
        ConfigError: naming the key at fault and the nearest ones.
    """
    known = dict(keys(schema))
    groups = (
        {str(path.relative_to(CONF)) for path in CONF.iterdir() if path.is_dir()} if schema is TrainConfig else set()
    )
    parsed = []
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not KEY=VALUE")
        name = name.lstrip("+")
        if name not in known and name not in groups:
            near = difflib.get_close_matches(name, [*known, *groups], n=3, cutoff=0.5)
            near += [each for each in known if each.endswith(f".{name}") and each not in near]
            hint = f"; did you mean {' or '.join(near)}?" if near else " (--help lists every key)"
            raise ConfigError(f"unknown key {name}{hint}")
        if name in known and known[name].metadata["text"] and schema is not TrainConfig:
            text = f"{name}={quoted(value)}" if value != "null" else text
        if name in known and known[name].type in (list[str], list[int]) and value[:1] not in ("[", ""):
            text = f"{name}=[{quoted(value) if known[name].type == list[str] else value}]"  # one is a list of one
        is_text = name in known and known[name].metadata["text"]
        parsed.append(_parsed(text, f"{name}={quoted(value)}" if is_text else ""))
    return parsed


def _parsed(text: str, as_text: str) -> Override:
    """An override; `as_text`, where free text is no value of Hydra's (a path with `{split}`) or another (1.10: 1.1)."""
    parse = OverridesParser.create().parse_overrides
    try:
        (parsed,) = parse([text])
    except HydraException as error:
        if not as_text:
            raise ConfigError(f"{text}: {first_line(error)}") from error
    else:
        if not as_text or not isinstance(parsed.value(), int | float):
            return parsed
    return parse([as_text])[0]


def quoted(text: str) -> str:
    """Text as a Hydra string that means exactly that text, interpolations and all."""
    escaped = text.replace("${", "\\${")
    backslashes = re.sub(r"(\\+)(?=\"|$)", r"\1\1", escaped)  # Hydra unescapes them only before a quote
    return '"' + backslashes.replace('"', '\\"') + '"'


def composition(schema: type, overrides: list[str]) -> DictConfig:
    """As `compose`, without looking at values beyond their types."""
    name = register(schema)
    lines = [input_line(override) for override in checked(schema, overrides)]
    try:
        with _search_path(schema):
            return hydra.compose(name, overrides=lines)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(reason(error)) from error


def _search_path(schema: type) -> Any:
    """conf/ for `train`; none for the other verbs, whose keys (`model`) may be called like its groups."""
    if schema is TrainConfig:
        return hydra.initialize_config_dir(str(CONF), version_base="1.3")
    return hydra.initialize(None, version_base="1.3")


def register(schema: type) -> str:
    """Make a schema known to Hydra; the name of the configuration to compose."""
    name = schema.__name__.removesuffix("Config").lower()
    if schema is TrainConfig:
        ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    else:
        ConfigStore.instance().store(name=name, node=schema)
    return name


def input_line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def reason(error: Exception) -> str:
    """A Hydra or OmegaConf error in one line, led by the key at fault."""
    cause: Any = error
    while cause.__cause__ is not None and not getattr(cause, "full_key", None):
        cause = cause.__cause__
    key = getattr(cause, "full_key", None)
    text = first_line(cause) if key else " ".join(str(error).split())
    return f"{key}: {text}" if key else text


def to_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def composed_values(schema: type, overrides: list[str]) -> dict[str, Any]:
    """Every key with its value under `overrides`, `MISSING` where it has none yet: what `--help` shows."""
    composed = composition(schema, overrides)
    missing = OmegaConf.missing_keys(composed)
    return {name: "" if name in missing else OmegaConf.select(composed, name) for name, _ in keys(schema)}


def experiments() -> list[str]:
    return sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
