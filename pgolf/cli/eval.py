"""`pgolf eval`: score an artifact on a validation split."""

import argparse
import json
from pathlib import Path
from typing import Any

from pgolf.errors import DataError, UserError, one_line
from pgolf.evaluation.stored_scoring import LONGEST_CONTEXT, scoring_of

MIXINGS = ("adaptive", "dirichlet", "pyp", "tilt")  # of pgolf.evaluation.ngram_cache, which needs torch


def add_parser(commands: Any) -> None:
    """Add `eval` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    score = commands.add_parser("eval", help="score an artifact on a validation split")
    score.add_argument("target", metavar="RUN_OR_ARTIFACT", help="a run's folder or a .pgolf file")
    score.add_argument("--data-path", help="folder with *_val_*.bin shards (default: the run's)")
    score.add_argument("--tokenizer-path", help="SentencePiece model (default: the run's)")
    score.add_argument("--seq-len", type=int, help=f"tokens of context, 1 to {LONGEST_CONTEXT} (default: the run's)")
    score.add_argument("--stride", type=int, help="tokens scored by each further window (default: the run's)")
    score.add_argument("--ngram", choices=MIXINGS, help="also with a causal n-gram cache, mixed so (default: without)")
    score.add_argument("--json", action="store_true")
    score.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from pgolf.artifact import read_artifact
    from pgolf.artifact.model import model_from_artifact
    from pgolf.data.dataset import check_origin, validation_split
    from pgolf.data.tokenizer import Tokenizer
    from pgolf.evaluation.ngram import NgramConfig, evaluate_ngram
    from pgolf.evaluation.scoring import evaluate
    from pgolf.model import choose_execution
    from pgolf.run.saved_settings import read_settings
    from pgolf.runtime.machine import compute_dtype
    from pgolf.runtime.ranks import launch
    from pgolf.settings import load_settings

    target = Path(arguments.target)
    folder = target if target.is_dir() else target.parent
    path = target / "model.pgolf" if target.is_dir() else target
    if not path.is_file():
        raise UserError(f"{target}: no artifact there; name a run's folder or a .pgolf file")
    saved = read_settings(folder / "settings.json") if (folder / "settings.json").is_file() else None
    data_path = arguments.data_path or (saved and saved.data_path)
    tokenizer_path = arguments.tokenizer_path or (saved and saved.tokenizer_path)
    if not data_path or not tokenizer_path:
        raise UserError(f"{path}: no settings.json beside it; name --data-path and --tokenizer-path")
    artifact = read_artifact(path)
    tokenizer = Tokenizer(tokenizer_path)
    if artifact.metadata.get("tokenizer_sha256") != tokenizer.sha256:
        raise DataError(f"{tokenizer_path}: not the tokenizer that {path} was trained with (their SHA-256 differ)")
    same_tokenizer = check_origin(data_path, tokenizer)
    tokens, token_bytes = validation_split(data_path, tokenizer)
    scoring = scoring_of(artifact.metadata.get("scoring"), arguments.seq_len, arguments.stride)
    with launch() as ranks:
        execution = choose_execution(ranks.device, compute_dtype("auto", ranks.device), scoring["seq_len"])
        model = model_from_artifact(artifact, execution, ranks.device)
        batch_tokens = saved.val_batch_size if saved else 65_536
        if arguments.ngram:
            config = NgramConfig.of(saved or load_settings({}, preset="baseline"), arguments.ngram)
            how = {**scoring, "batch_tokens": batch_tokens, "ranks": ranks}
            score, mixed = evaluate_ngram(model, tokens, token_bytes, config, **how)
        else:
            score, mixed = evaluate(model, tokens, token_bytes, batch_tokens=batch_tokens, ranks=ranks, **scoring), None
    result = {
        "artifact": str(path),
        "artifact_bytes": artifact.bytes.total,
        "data_path": data_path,
        "data_made_with_this_tokenizer": same_tokenizer or None,  # None: the folder cannot tell
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
        "val_loss": score.loss,
        "val_bpb": score.bpb,
        **({"val_bpb_ngram": mixed.bpb} if mixed else {}),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        cached = f" ({mixed.bpb:.4f} with the n-gram cache)" if mixed else ""
        print(
            f"{one_line(path)}: val_bpb {score.bpb:.4f}{cached}, val_loss {score.loss:.4f} nats a token, "
            f"{score.tokens:,} tokens, {score.bytes:,} bytes of text, artifact {artifact.bytes.total:,} bytes"
        )
        if not same_tokenizer:
            where = one_line(data_path)
            print(f"{where}: no prepared.json names the tokenizer of its shards; whether it is this one is unknown")
    return 0
