"""`pgolf import-checkpoint`: an entry's weights as an artifact."""

import argparse
import os
from pathlib import Path
from typing import Any

from pgolf.errors import UserError, one_line


def add_parser(commands: Any) -> None:
    """Add `import-checkpoint` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    importing = commands.add_parser(
        "import-checkpoint", help="turn an entry's final_model.pt into an artifact that `pgolf eval` scores"
    )
    importing.add_argument("checkpoint", help="state dict saved by the entry's script; read as data, never run")
    importing.add_argument("--preset", help="the entry's preset; environment variables change its settings as in a run")
    importing.add_argument("--output", default="model.pgolf", help="artifact to write (default: %(default)s)")
    importing.add_argument("--tokenizer-path", help="SentencePiece model (default: the preset's)")
    importing.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from pgolf.artifact.import_checkpoint import import_checkpoint
    from pgolf.data.tokenizer import Tokenizer
    from pgolf.model import ModelConfig
    from pgolf.settings import load_settings

    if not Path(arguments.checkpoint).is_file():
        raise UserError(f"{arguments.checkpoint}: no such file")
    settings = load_settings({**os.environ, "PRESET": arguments.preset} if arguments.preset else None)
    tokenizer = Tokenizer(arguments.tokenizer_path or settings.tokenizer_path)
    metadata = {"scoring": settings.scoring, "tokenizer_sha256": tokenizer.sha256}
    config = ModelConfig.of(settings)
    total = import_checkpoint(arguments.checkpoint, arguments.output, config, metadata)
    print(f"{one_line(arguments.output)}: {config.parameters():,} parameters in float32, {total:,} bytes")
    return 0
