"""Command line -> typed configuration, through Hydra, once per run.

Overrides are Hydra's `KEY=VALUE`, except that an unknown key or option is rejected with the nearest one, and free text
(prompts, paths) is taken as typed, without Hydra's quoting rules. Options of groups come from the package's conf/, from
a conf/ with experiments in the current folder, and from `--config-dir`.
"""

import difflib
import re
from itertools import islice
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, cast, get_args

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from clippy_train.config import MixtureSource, TrainConfig, keys, listed_section, to_schema
from clippy_train.errors import ConfigError, first_line
from clippy_train.launch.resources import fill_in

T = TypeVar("T")

_HERE = Path(__file__).parent
# In a wheel the folders conf/ and launch/ are inside the package; in the source tree they are beside it.
_INSTALLED = (_HERE / "conf").is_dir()
CONF = _HERE / "conf" if _INSTALLED else _HERE.parent / "conf"
LAUNCH = _HERE / "launch_scripts" if _INSTALLED else _HERE.parent / "launch"
ADDED: list[Path] = []  # folders like `CONF` that the command line names
MOST_VALUES = 10_000  # of one key in a sweep: stops an endless range
TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    list[MixtureSource]: "a list such as [{path:A,weight:3},{path:B}]",
    NoneType: "null",
}


def compose(schema: type[T], overrides: list[str]) -> T:
    """Compose and check the configuration of a verb.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type, a missing value, a contradiction.
    """
    return checked(composition(schema, overrides), schema)


def checked(composed: DictConfig, schema: type[T]) -> T:
    """Convert what `composition` returned to its schema; errors as in `compose`."""
    try:
        if issubclass(schema, TrainConfig):
            fill_in(composed)
        return to_schema(composed, schema)
    except OmegaConfBaseException as error:  # an interpolation of a key that does not exist
        raise ConfigError(explanation(error)) from error


def composition(schema: type, overrides: list[str]) -> DictConfig:
    """Compose the configuration of a verb; of its values, only the types are checked."""
    parsed = parse_overrides(schema, overrides)
    name = register_schema(schema)
    try:
        with _search_path(schema):
            places = search_path() if issubclass(schema, TrainConfig) else []
            return hydra.compose(name, overrides=[*places, *map(input_line, parsed)])
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_wrong_type(schema, parsed, error) or explanation(error)) from error


def _search_path(schema: type) -> hydra.initialize_config_dir:
    """conf/ for `train` and `plan`; for the others, whose keys (`model`) may have names of its groups, one without any.

    `hydra.initialize(None)` would be that too, but looks at every frame of the caller for the place of its source.
    """
    folder = CONF if issubclass(schema, TrainConfig) else CONF / "hardware"
    return hydra.initialize_config_dir(str(folder), version_base="1.3")


def config_dirs() -> list[Path]:
    """The folders of groups, `CONF` first."""
    own = Path.cwd() / "conf"
    found = [CONF, *([own] if (own / "experiment").is_dir() else []), *ADDED]
    return list(dict.fromkeys(folder.resolve() for folder in found))


def search_path() -> list[str]:
    """Hydra's own override for the folders beside `CONF`."""
    places = ",".join(quoted(f"file://{folder}") for folder in config_dirs()[1:])
    return [f"hydra.searchpath=[{places}]"] if places else []


def register_schema(schema: type) -> str:
    """Make a schema known to Hydra; return the name of the configuration to compose."""
    training = issubclass(schema, TrainConfig)
    name = "train" if training else schema.__name__.removesuffix("Config").lower()
    stored, store = "train_schema" if training else name, ConfigStore.instance()
    known = store.repo.get(f"{stored}.yaml")
    if known is None or OmegaConf.get_type(known.node) is not schema:  # storing costs a tenth of composing
        store.store(name=stored, node=schema)
    return name


def groups() -> dict[str, list[str]]:
    """The options of each group of `clippy train`, the default first: `null` if nothing is chosen."""
    defaults = [item for item in OmegaConf.load(CONF / "train.yaml").defaults if isinstance(item, DictConfig)]
    found = {}
    for name, default in ((str(name), str(item[name] or "null")) for item in defaults for name in item):
        if (CONF / name).is_dir():
            options = sorted({path.stem for folder in config_dirs() for path in (folder / name).glob("*.yaml")})
            found[name] = [default, *(option for option in options if option != default)]
    return dict(sorted(found.items(), key=lambda item: item[1][0] != "null"))


def parse_overrides(schema: type, overrides: list[str], sweep: bool = False) -> list[Override]:
    """Parse overrides. Hydra's prefixes `+` and `++` are accepted and change nothing: every key exists.

    Raises:
        ConfigError: a key or an option that does not exist, a value that Hydra cannot read, or, without `sweep`,
            several values.
    """
    options = groups() if issubclass(schema, TrainConfig) else {}
    parsed = [_parse(schema, options, text) for text in overrides]
    for override, text in zip(parsed, overrides, strict=True):
        if override.is_sweep_override() and not sweep:
            hint = ", or add -m for a sweep over them" if issubclass(schema, TrainConfig) else ""
            raise ConfigError(f"{text}: give one value{hint}. Text with a comma needs quotes: KEY='\"a,b\"'")
    names = [override.key_or_group for override in parsed]
    for name in options:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is given {names.count(name)} times: choose one option")
    # Hydra can default to null in a group, but not be told to.
    parsed = [override for override in parsed if override.key_or_group not in options or override.value() is not None]
    return list({override.key_or_group: override for override in parsed}.values())  # of a key given twice, the last one


def _parse(schema: type, options: dict[str, list[str]], text: str) -> Override:
    known = dict(keys(schema))
    name, equals, value = text.lstrip("+").partition("=")
    if name.startswith("~"):
        raise ConfigError(f"{text}: keys cannot be removed; set KEY=null where null is allowed")
    if not name or not equals:
        raise ConfigError(f"{text!r} is not KEY=VALUE")
    if name in options:
        return _parse_choice(name, value, options[name])
    if name not in known:
        raise ConfigError(_unknown_key(name, [*known, *options]))
    key_type, is_text = known[name].type, known[name].metadata["text"]
    if is_text and not issubclass(schema, TrainConfig):
        value = quoted(value) if value != "null" else value
    if key_type == list[str] and "," in value and value[0] != "[" and "(" not in value:
        raise ConfigError(f"{text}: a list of several values needs brackets: {name}=[{value}]")
    if key_type in (list[str], list[int], list[float]) and value[:1] not in ("[", ""):
        value = f"[{quoted(value) if key_type == list[str] else value}]"  # one value is a list of one
    override = _parse_value(name, value, quoted(text.partition("=")[2]) if is_text else None)
    if (listed := listed_section(known[name])) and isinstance(override.value(), list):
        _require_sections(name, listed, cast(list[Any], override.value()))
    if isinstance(override.value(), Glob):
        raise ConfigError(f"{text}: glob() matches the options of a group; {name} is a key")
    return override


def _require_sections(name: str, schema: type, items: list[Any]) -> None:
    """Raises ConfigError, with the index of the item, unless each item has keys of `schema` with the right types."""
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            return  # the type of the whole value is wrong
        try:
            OmegaConf.merge(schema, item)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_wrong_item(f"{name}[{index}]", schema, error)) from error


def _wrong_item(place: str, schema: type, error: Exception) -> str:
    """What is wrong with an item of a list of sections."""
    at_fault, cause = _key_at_fault(error)
    name, known = re.sub(r"\[\d+\]$", "", at_fault), dict(keys(schema))
    if name in known:
        return f"{place}.{name}: must be {_type_name(known[name].type)}"
    return f"{place}: {_unknown_key(name, list(known)) if name else first_line(cause)}"


def _unknown_key(name: str, known: list[str]) -> str:
    inside = [each for each in known if each.startswith(f"{name}.")]
    if inside:
        return f"{name} is a section: set its keys one by one, as in {inside[0]}=VALUE"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [each for each in known if each.endswith(f".{name}") and each not in near]
    return f"unknown key {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else " (--help lists all keys)")


def _parse_choice(group: str, value: str, options: list[str]) -> Override:
    override = _parse_value(group, value)
    pattern: object = override.value()
    if isinstance(pattern, Glob):
        chosen = pattern.filter([option for option in options if option != "null"])
        if chosen:
            return _parse_value(group, f"choice({','.join(chosen)})")
    else:
        chosen = sweep_values(override) if override.is_sweep_override() else [override.get_value_element_as_str()]
        chosen = [option.strip("'\"") for option in chosen]
        if "null" in chosen and override.is_sweep_override():
            raise ConfigError(f"{group}={value}: null cannot be part of a sweep")
    if not chosen or not set(chosen) <= set(options):
        raise ConfigError(f"{group}={value}: choose one of {', '.join(options)}")
    for option in chosen:
        _require_one_file(group, option)
    return _parse_value(group, "null") if chosen == ["null"] else override


def _require_one_file(group: str, option: str) -> None:
    """Raises ConfigError if two files with different contents define an option: Hydra would take the first."""
    paths = [path for folder in config_dirs() if (path := folder / group / f"{option}.yaml").exists()]
    if len({path.read_bytes() for path in paths}) > 1:
        raise ConfigError(f"{group}={option}: {' and '.join(map(str, paths))} differ; rename yours")


def _parse_value(name: str, value: str, as_text: str | None = None) -> Override:
    """Parse a value; use `as_text` for text that Hydra cannot read (`/data/{split}`) or reads as a number (1.10)."""
    parse = OverridesParser.create().parse_override
    try:
        parsed = parse(f"{name}={value}")
    except (HydraException, RecursionError) as error:
        if as_text is not None:
            return parse(f"{name}={as_text}")
        called = " while evaluating " in str(error) and error.__cause__  # a function such as range()
        detail = (
            first_line(called)
            if called
            else "not a valid value; close quotes and brackets, and quote text, as in KEY='\"a, b\"'"
        )
        raise ConfigError(f"{name}={value}: {detail}") from error
    return parse(f"{name}={as_text}") if as_text is not None and isinstance(parsed.value(), int | float) else parsed


def quoted(text: str) -> str:
    """Text as a Hydra string that means exactly that text, interpolations included."""
    escaped = text.replace("${", "\\${")
    backslashes = re.sub(r"(\\+)(?=\"|$)", r"\1\1", escaped)  # Hydra unescapes them only before a quote
    return '"' + backslashes.replace('"', '\\"') + '"'


def input_line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def sweep_values(override: Override) -> list[str]:
    """The values of a sweep, as Hydra writes them; of an interval, its ends.

    Raises:
        ConfigError: it has no values, or no end.
    """
    if override.is_interval_sweep():
        interval: Any = override.value()
        return [str(interval.start), str(interval.end)]
    try:
        values = list(islice(override.sweep_string_iterator(), MOST_VALUES + 1))
    except (HydraException, ValueError) as error:
        raise ConfigError(f"{override.input_line}: {first_line(error)}") from error
    if not 0 < len(values) <= MOST_VALUES:
        raise ConfigError(f"{override.input_line}: {'too many values' if values else 'no value'} for a sweep")
    return values


def shortened(override: Override) -> Override:
    """A sweep over a range of numbers as one over its values without their rounding errors (0.30000000000000004)."""
    value: Any = override.value()
    if not isinstance(value, RangeSweep) or all(isinstance(n, int) for n in (value.start, value.stop, value.step)):
        return override
    values = ",".join(f"{float(each):.12g}" for each in sweep_values(override))
    return _parse_value(override.key_or_group, f"choice({values})")


def _wrong_type(schema: type, parsed: list[Override], error: Exception) -> str | None:
    """The override whose value has the wrong type, and the right one; None for any other error."""
    name = re.sub(r"\[\d+\]$", "", _key_at_fault(error)[0])
    given = [input_line(override) for override in parsed if override.key_or_group == name]
    if not given or name not in dict(keys(schema)):
        return None
    return f"{given[-1]}: must be {_type_name(dict(keys(schema))[name].type)}"


def _type_name(declared: Any) -> str:
    allowed = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    return " or ".join(TYPE_NAMES[each] for each in allowed)


def _key_at_fault(error: BaseException) -> tuple[str, BaseException]:
    """The key that a Hydra or OmegaConf error is about ("" if it names none), and the error that names it."""
    cause = error
    while cause.__cause__ is not None and not getattr(cause, "full_key", None):
        cause = cause.__cause__
    return getattr(cause, "full_key", None) or "", cause


def explanation(error: Exception) -> str:
    """A Hydra or OmegaConf error in one line, led by the key at fault."""
    name, cause = _key_at_fault(error)
    text = first_line(cause) if name else " ".join(str(error).split())
    text = text.replace("a ListConfig, list or tuple", "a list")
    if re.search(rf"Key '({'|'.join(groups())})' not in '(Train|Plan)Config'", text):
        text += "; does that file begin with `# @package _global_`?"
    return f"{name}: {text}" if name else text


def composed_values(schema: type, overrides: list[str]) -> dict[str, Any]:
    """The value of every key under `overrides`, as plain Python; keys without a value are absent."""
    composed = composition(schema, overrides)
    missing = OmegaConf.missing_keys(composed)
    values = {name: OmegaConf.select(composed, name) for name, _ in keys(schema) if name not in missing}
    return {name: plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """A value that OmegaConf holds, in lists and dictionaries."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
