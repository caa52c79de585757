"""`pgolf train`: the training script of this installation, wherever it lies."""

import argparse
import runpy
import sys
from typing import Any

from pgolf.errors import UserError
from pgolf.runtime import sources


def add_parser(commands: Any) -> None:
    """Add `train` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    parser = commands.add_parser(
        "train",
        help="train, quantise, write the artifact and score it, in this process",
        description="Runs train_gpt.py with the given settings; several GPUs: torchrun --nproc_per_node=8 "
        "$(pgolf train --where) NAME=value ...",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="NAME=value", help="settings, handed to train_gpt.py as they are"
    )
    parser.add_argument("--where", action="store_true", help="print the script's path, for torchrun, and do nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Ends with the script's own exit status."""
    script = sources.root() / sources.SCRIPT
    if not script.is_file():
        raise UserError(f"{script}: not there; install pgolf again")
    if arguments.where:
        print(script)
        return 0
    sys.argv = [str(script), *arguments.settings]
    runpy.run_path(str(script), run_name="__main__")
    return 0
