"""`pgolf presets`: the named systems, and what each changes."""

import argparse
import json
from typing import Any

from pgolf.cli.settings import written
from pgolf.errors import UserError
from pgolf.presets import PRESETS, SYSTEMS


def add_parser(commands: Any) -> None:
    """Add `presets` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    parser = commands.add_parser("presets", help="the named systems, and the settings that each changes")
    parser.add_argument("name", nargs="?", metavar="NAME", help="what this one changes")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.name and arguments.name not in PRESETS:
        raise UserError(f"{arguments.name}: no such preset; accepted are {', '.join(sorted(PRESETS))}")
    names = [arguments.name] if arguments.name else list(PRESETS)
    if arguments.json:
        rows = [{"name": name, "system": SYSTEMS[name], "settings": PRESETS[name]} for name in names]
        print(json.dumps(rows, indent=2))
        return 0
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {SYSTEMS[name]}")
    if arguments.name:
        from pgolf.settings import Settings

        for setting, value in PRESETS[arguments.name].items():
            default = Settings.model_fields[setting].default
            if value != default:
                print(f"  {setting.upper()}={written(value)}  (default: {written(default)})")
    return 0
