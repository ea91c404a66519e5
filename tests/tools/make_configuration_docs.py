"""docs/configuration.md, from the schema and conf/: every verb's keys, and the groups. `make docs` writes it."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from clippy_train.cli import VERBS
from clippy_train.compose import CONF, composed_values, groups
from clippy_train.config import TrainConfig
from clippy_train.help import REQUIRED, limits, sections, shown_value

PAGE = CONF.parent / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

`make docs` generates this page from `clippy_train/config.py` and `conf/`; a test keeps it current.

Settings are `KEY=VALUE` on the command line, with values in YAML. `clippy VERB --help` shows the same, with the values
that the rest of the command line leads to. An unknown key is rejected with the nearest one, and contradictions are
reported all at once, before anything starts. Several values of a key are a sweep: [sweeps.md](sweeps.md).

## Tab completion

For bash and zsh, in the environment that has `clippy`:

```
eval "$(register-python-argcomplete clippy)"
```

completes verbs, keys, groups, their options, and the choices of a key. Put it in `~/.bashrc` or `~/.zshrc` to keep it.

## Groups of clippy train

`GROUP=OPTION` sets several keys at once; keys on the command line override them. [recipe.md](recipe.md) explains the
numbers of the experiments.
"""


def page() -> str:
    verbs = map(_verb, VERBS)
    return "\n".join([INTRODUCTION, *_groups(), "", *verbs])


def _groups() -> list[str]:
    rows = [
        f"| `{group}={option}`{' (default)' if option == options[0] else ''} | {_comment(group, option)} |"
        for group, options in groups().items()
        for option in options
    ]
    return ["| option | meaning |", "|---|---|", *rows]


def _comment(group: str, option: str) -> str:
    """The comment at the top of an option's file, with a link to the file."""
    if option == "null":
        return "none"
    path = CONF / group / f"{option}.yaml"
    lines = [line[2:] for line in path.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
    return _linked(f"{' '.join(lines)} [{path.name}](../conf/{group}/{path.name})")


def _verb(name: str) -> str:
    verb = VERBS[name]
    values = composed_values(verb.schema, [])
    lines = [f"## clippy {name}", "", f"`{verb.usage}`", "", verb.summary]
    found = list(sections(verb.schema))
    if verb.schema is TrainConfig:
        lines[-1] += f" Defaults are those of the default options above; an experiment sets the keys marked {REQUIRED}."
    elif issubclass(verb.schema, TrainConfig):
        lines[-1] += " It takes the keys of `clippy train`, and:"
        own = [field for field in found[0][2] if field.name not in TrainConfig.__annotations__]
        found = [("", "", own)]
    for section, meaning, fields in found:
        if fields:
            lines += [
                "",
                *([f"### {section}", "", meaning, ""] if section else []),
                "| key | default | limits | meaning |",
            ]
            lines += [
                "|---|---|---|---|",
                *(_row(f"{section}.{field.name}".lstrip("."), field, values) for field in fields),
            ]
    return "\n".join([*lines, ""])


def _row(name: str, field: dataclasses.Field[Any], values: dict[str, Any]) -> str:
    shown = shown_value(values.get(name, field.default))
    default = shown if shown == REQUIRED else f"`{shown}`"
    cells = [f"`{name}`", default, limits(field).rstrip("."), _linked(field.metadata["meaning"])]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _linked(text: str) -> str:
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


if __name__ == "__main__":
    Path(PAGE).write_text(page())
