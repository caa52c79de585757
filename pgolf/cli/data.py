"""`pgolf data`: demo, tokenize, download, inspect."""

import argparse
import json
import os
import shlex
from typing import TYPE_CHECKING, Any

from pgolf.errors import one_line
from pgolf.presets import DEFAULT_TRAIN_SHARDS, DEMO_VOCAB_SIZE, FINEWEB

if TYPE_CHECKING:
    from pgolf.data.prepare import DataPaths

LINE = 2000  # letters of a line that names files, at most


def add_parser(commands: Any) -> None:
    """Add `data` and its own commands to the subparsers of a command line; `arguments.run(arguments)` runs one."""
    data = commands.add_parser("data", help="make, fetch and check training data")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make the demo's data from Python's own documentation")
    demo.add_argument("--root", default="data", help="folder for datasets/ and tokenizers/ (default: %(default)s)")
    demo.set_defaults(run=_demo)

    tokenize = commands.add_parser(
        "tokenize",
        help="make shards of your own text",
        description="Make shards and a tokenizer of text: each file is a document, and fewer than 10 are cut into "
        'several; of JSONL each line\'s "text" is one.',
    )
    tokenize.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text, JSONL, a folder (all .txt, .text, .md, .rst, .jsonl and .ndjson files within, by name), or - "
        "for standard input",
    )
    tokenize.add_argument(
        "--format",
        choices=("auto", "text", "jsonl"),
        default="auto",
        help="auto: .jsonl and .ndjson files are JSONL, all else and standard input is text (default: %(default)s)",
    )
    tokenize.add_argument("--out", required=True, metavar="DIR", help="new folder for shards and tokenizer")
    which = tokenize.add_mutually_exclusive_group()
    which.add_argument(
        "--vocab-size", type=int, default=DEMO_VOCAB_SIZE, metavar="N", help="pieces to train (default: %(default)s)"
    )
    which.add_argument("--tokenizer", metavar="MODEL", help="use this SentencePiece model, train none")
    tokenize.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of the text to validate on (default: %(default)s)",
    )
    tokenize.set_defaults(run=_tokenize)

    fetch = commands.add_parser("download", help="fetch FineWeb shards from Hugging Face")
    fetch.add_argument("--variant", choices=list(FINEWEB), default="sp1024", help="default: %(default)s")
    fetch.add_argument(
        "--train-shards",
        type=int,
        default=DEFAULT_TRAIN_SHARDS,
        metavar="N",
        help="training shards of 200 MB each (default: %(default)s)",
    )
    fetch.add_argument("--root", default="data", help="folder for datasets/ and tokenizers/ (default: %(default)s)")
    fetch.set_defaults(run=_download)

    inspect = commands.add_parser("inspect", help="shards, tokens, documents, bytes per token, and anything wrong")
    inspect.add_argument("folder", metavar="DIR")
    inspect.add_argument("--tokenizer", metavar="MODEL", help="SentencePiece model (default: the one it was made with)")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)


def _demo(arguments: argparse.Namespace) -> int:
    from pgolf.data.prepare import prepare_demo

    return _tell(prepare_demo(arguments.root))


def _tokenize(arguments: argparse.Namespace) -> int:
    from pgolf.data.prepare import tokenize_files

    return _tell(
        tokenize_files(
            arguments.files,
            arguments.out,
            arguments.vocab_size,
            arguments.tokenizer,
            arguments.val_fraction,
            arguments.format,
        )
    )


def _download(arguments: argparse.Namespace) -> int:
    from pgolf.data.download import download

    return _tell(download(arguments.variant, arguments.root, arguments.train_shards))


def _tell(paths: "DataPaths") -> int:
    """Print what to put before the training command, as a shell takes it."""
    from pgolf.data.tokenizer import Tokenizer

    vocab_size = Tokenizer(paths.tokenizer_path).vocab_size
    data_path, tokenizer_path = (_quoted(str(path)) for path in (paths.data_path, paths.tokenizer_path))
    print(f"DATA_PATH={data_path} TOKENIZER_PATH={tokenizer_path} VOCAB_SIZE={vocab_size}")
    return 0


def _quoted(path: str) -> str:
    """One word of a shell that a terminal can show: what is unprintable is written out."""
    if path.isprintable():
        return shlex.quote(path)
    return "$'" + "".join(chr(b) if chr(b).isalnum() and b < 128 else f"\\x{b:02x}" for b in os.fsencode(path)) + "'"


def _inspect(arguments: argparse.Namespace) -> int:
    """Status 1 when something is wrong."""
    from pgolf.data.inspect import inspect_folder

    facts = inspect_folder(arguments.folder, arguments.tokenizer)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 1 if facts["problems"] else 0
    pieces = f", {facts['vocab_size']} pieces" if facts["vocab_size"] else "; name it with --tokenizer to count bytes"
    print(one_line(f"{facts['folder']}: tokenizer {facts['tokenizer'] or 'not known'}{pieces}", LINE))
    print(f"{'split':8}{'shards':>8}{'tokens':>16}{'documents':>12}{'bytes':>16}{'bytes/token':>13}  token ids")
    for split, row in facts["splits"].items():
        text_bytes = "-" if row["bytes"] is None else f"{row['bytes']:,}"
        ratio = "-" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:.4f}"
        ids = "-" if row["min_token"] is None else f"{row['min_token']} to {row['max_token']}"
        print(
            f"{split:8}{row['shards']:>8}{row['tokens']:>16,}{row['documents']:>12,}{text_bytes:>16}{ratio:>13}  {ids}"
        )
    if facts["sidecar"]:
        print(f"byte sidecar: {facts['sidecar']['tokens']:,} tokens, {facts['sidecar']['bytes']:,} bytes")
    for problem in facts["problems"]:
        print(one_line(f"problem: {problem}", LINE))
    return 1 if facts["problems"] else 0
