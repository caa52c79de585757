"""The `pgolf` command: one file a command.

What needs torch, or anything else that takes time to import, is imported by the function that runs a command, never
above it: `pgolf --help` must answer at once, and `pgolf doctor` must run where torch does not.
"""

import argparse
import sys
from typing import Any, NoReturn

import pgolf
from pgolf.cli import artifact, data, doctor, eval, import_checkpoint, presets, settings, size, train
from pgolf.errors import one_line
from pgolf.run.entry import before_torch, ending

COMMANDS = (doctor, train, settings, presets, data, artifact, eval, size, import_checkpoint)


class Parser(argparse.ArgumentParser):
    """Errors are one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: {message} (see {self.prog} --help)") + "\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Of argparse, which would not tell that the help could not be written."""
        print(message, end="", file=file or sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: of the process) and return its exit status."""
    before_torch()
    return ending("pgolf", lambda: _run(argv), may_be_cut=True) or 0


def _run(argv: list[str] | None) -> int:
    parser = Parser(prog="pgolf", description="Train and price tiny language models under a byte budget.")
    parser.add_argument("--version", action="version", version=pgolf.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)
