"""The keys of a verb for people: the pages of `clippy VERB --help`, at any width, and completions for shells."""

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, cast

from omegaconf import MISSING

from clippy_train.compose import groups
from clippy_train.config import POSITIVE, TrainConfig, as_yaml, keys, listed_section

REQUIRED = "(required)"
GROUPS = (
    "Groups: GROUP=OPTION sets several keys at once. The first option is the default. conf/experiment/NAME.yaml in the "
    "current folder adds experiment=NAME."
)
VALUES = "Values are those of this command line: clippy train experiment=NAME --help shows an experiment's."


def sections(schema: type, name: str = "") -> Iterator[tuple[str, str, list[dataclasses.Field[Any]]]]:
    """The sections of a schema as (dotted name, meaning, fields of its keys); the name of the outermost is empty.

    Of the sections in a list, the keys that they alone have.
    """
    nested = [item for item in dataclasses.fields(schema) if dataclasses.is_dataclass(item.type)]
    yield name, schema.__doc__ or "", [item for item in dataclasses.fields(schema) if item not in nested]
    for item in nested:
        yield from sections(cast(type, item.type), f"{name}.{item.name}".lstrip("."))
    for item, listed in ((item, listed_section(item)) for item in dataclasses.fields(schema)):
        if listed:
            own = [each for each in dataclasses.fields(listed) if each.name in listed.__annotations__]
            yield f"{name}.{item.name}[]".lstrip("."), listed.__doc__ or "", own


def limits(field: dataclasses.Field[Any]) -> str:
    """The choices or limits that a key declares, as a sentence; empty if it declares none."""
    choices, minimum, maximum = (field.metadata[part] for part in ("choices", "minimum", "maximum"))
    if choices:
        return f"{'Any' if field.type == list[str] else 'One'} of {', '.join(choices)}."
    if maximum is not None:
        return f"From {minimum:.12g} to {maximum:.12g}."
    if minimum == POSITIVE:
        return "Above 0."
    return f"At least {minimum:.12g}." if minimum is not None else ""


def shown_value(value: Any) -> str:
    return REQUIRED if value == MISSING else as_yaml(value)


def key_lines(schema: type, values: dict[str, Any]) -> Iterator[str]:
    """The lines of the help: groups, then each section with its keys, their `values` and meanings."""
    width = max(40, min(100, shutil.get_terminal_size().columns))
    if issubclass(schema, TrainConfig):
        yield from _wrapped("", GROUPS, width)
        for group, options in groups().items():
            yield from _wrapped(f"  {group:12}", ", ".join(options), width)
        yield from ["", *_wrapped("", VALUES, width), ""]
    for section, meaning, fields in sections(schema):
        if section:
            yield ""
        if fields:
            yield from _wrapped("", f"{section}: {meaning}" if section else "Keys:", width)
        for field in fields:
            name = f"{section}.{field.name}".lstrip(".")
            yield from _value_lines(f"  {name}: ", shown_value(values.get(name, field.default)), width)
            yield from _wrapped(" " * 6, f"{field.metadata['meaning']} {limits(field)}", width)


def _wrapped(indent: str, text: str, width: int) -> list[str]:
    rest = " " * len(indent)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False)


def _value_lines(name: str, value: str, width: int) -> list[str]:
    """`name` and a value of any length; every space of the value stays, since it may be a token."""
    if len(name + value) <= width:
        return [name + value]
    wrapped = textwrap.wrap(value, width - 6, drop_whitespace=False, replace_whitespace=False, break_on_hyphens=False)
    return [name.rstrip(), *(" " * 6 + line for line in wrapped)]


def completions(schema: type, prefix: str) -> list[str]:
    """What `prefix` can become: `KEY=` and `GROUP=`, or, after the "=", the options and choices that they take."""
    choices = {
        **(groups() if issubclass(schema, TrainConfig) else {}),
        **{
            name: ("true", "false") if field.type is bool else field.metadata["choices"] for name, field in keys(schema)
        },
    }
    name, equals, _ = prefix.partition("=")
    found = [f"{name}={choice}" for choice in choices.get(name, ())] if equals else [f"{each}=" for each in choices]
    return [each for each in found if each.startswith(prefix)]
