"""`pgolf settings`: every setting with its default, what it accepts and what it does."""

import argparse
import json
from typing import Any

from pgolf.errors import UserError


def add_parser(commands: Any) -> None:
    """Add `settings` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    parser = commands.add_parser("settings", help="all settings of a run: defaults, accepted values, what they do")
    parser.add_argument("name", nargs="?", metavar="NAME", help="this one, or all that have it in their name")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from pgolf.presets import PRESETS
    from pgolf.settings import Settings, accepted

    rows = [
        {
            "name": name.upper(),
            "default": field.default,
            "accepted": accepted(name),
            "text": field.description,
            "presets": {preset: values[name] for preset, values in PRESETS.items() if name in values},
        }
        for name, field in Settings.model_fields.items()
    ]
    if arguments.name:
        asked = arguments.name.upper()
        exact = [row for row in rows if row["name"] == asked]
        rows = exact or [row for row in rows if asked in row["name"]]
        if not rows:
            raise UserError(f"{arguments.name}: no such setting, and none with that in its name")
    if arguments.json:
        print(json.dumps(rows, indent=2))
    elif len(rows) == 1:
        print(_at_length(rows[0]))
    else:
        widths = [max(len(cell(row)) for row in rows) for cell in (_name, _accepted)]
        for row in rows:
            print(f"{_name(row):{widths[0]}}  {_accepted(row):{widths[1]}}  {row['text']}")
    return 0


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']}={written(row['default'])}"


def _accepted(row: dict[str, Any]) -> str:
    return row["accepted"] if len(row["accepted"]) <= 36 else row["accepted"][:33] + "..."


def _at_length(row: dict[str, Any]) -> str:
    lines = [f"{row['name']}: {row['text']}", f"default: {written(row['default'])}", f"accepted: {row['accepted']}"]
    of_presets = (f"{preset} {written(value)}" for preset, value in row["presets"].items())
    return "\n".join([*lines, *([f"presets: {', '.join(of_presets)}"] if row["presets"] else [])])


def written(value: Any) -> str:
    """A value as a variable takes it."""
    return str(int(value)) if isinstance(value, bool) else str(value)
