"""`pgolf doctor`: what this machine has, and the command that mends each problem."""

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `doctor` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    parser = commands.add_parser(
        "doctor", help="check this machine; every problem comes with the command that mends it"
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 when something is stopped, else 0."""
    from pgolf.runtime.doctor import as_text, collect

    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 0 if report["ok"] else 1
