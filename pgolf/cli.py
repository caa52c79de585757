"""The `pgolf` command."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import pgolf
from pgolf.artifact_cli import add_artifact_parser
from pgolf.doctor import add_doctor_parser
from pgolf.errors import ArtifactError, DataError, PgolfError, UserError

# What needs torch is imported by the command that uses it: `pgolf doctor` must run where torch does not.

MIXINGS = ("adaptive", "dirichlet", "pyp", "tilt")  # of pgolf.ngram_cache, which needs torch


class Parser(argparse.ArgumentParser):
    """Errors are one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="pgolf", description="Train and price tiny language models under a byte budget.")
    parser.add_argument("--version", action="version", version=pgolf.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    add_doctor_parser(commands)
    _add_data_commands(commands)
    add_artifact_parser(commands)

    score = commands.add_parser("eval", help="score an artifact on a validation split")
    score.add_argument("target", metavar="RUN_OR_ARTIFACT", help="a run's folder or a .pgolf file")
    score.add_argument("--data-path", help="folder with *_val_*.bin shards (default: the run's)")
    score.add_argument("--tokenizer-path", help="SentencePiece model (default: the run's)")
    score.add_argument("--seq-len", type=int, help="tokens of context at most (default: the run's)")
    score.add_argument("--stride", type=int, help="tokens scored by each further window (default: the run's)")
    score.add_argument("--ngram", choices=MIXINGS, help="also with a causal n-gram cache, mixed so (default: without)")
    score.add_argument("--json", action="store_true")
    score.set_defaults(run=run_eval)

    size = commands.add_parser("size", help="parameters and projected bytes of a preset, or of a run from its weights")
    size.add_argument("run_folder", nargs="?", metavar="RUN", help="a run's folder: project from its checkpoint")
    size.add_argument("--preset", help="preset; environment variables change its settings as in a run")
    size.add_argument("--json", action="store_true")
    size.set_defaults(run=run_size)

    importing = commands.add_parser(
        "import-checkpoint", help="turn an entry's final_model.pt into an artifact that `pgolf eval` scores"
    )
    importing.add_argument("checkpoint", help="state dict saved by the entry's script; read as data, never run")
    importing.add_argument("--preset", help="the entry's preset; environment variables change its settings as in a run")
    importing.add_argument("--output", default="model.pgolf", help="artifact to write (default: %(default)s)")
    importing.add_argument("--tokenizer-path", help="SentencePiece model (default: the preset's)")
    importing.set_defaults(run=run_import)

    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except PgolfError as error:
        print(f"pgolf: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `pgolf ... | head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130


def _add_data_commands(commands: Any) -> None:
    try:
        from pgolf.data.cli import add_data_parser
    except (ImportError, OSError):  # the doctor tells what is missing
        return
    add_data_parser(commands)


def run_size(arguments: argparse.Namespace) -> int:
    from pgolf.run import read_settings
    from pgolf.settings import load_settings
    from pgolf.size import projected_size, weights_of_run

    if arguments.run_folder:
        if arguments.preset:
            raise UserError(f"{arguments.run_folder} has settings of its own; --preset cannot be given with it")
        folder = Path(arguments.run_folder)
        if not (folder / "settings.json").is_file():
            raise UserError(f"{folder}: no run there; name the folder of one")
        result = projected_size(read_settings(folder / "settings.json"), weights_of_run(folder))
    else:
        environ = {**os.environ, "PRESET": arguments.preset} if arguments.preset else None
        result = projected_size(load_settings(environ))
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    source = "its checkpoint's weights" if result["from_weights"] else "Gaussian weights"
    print(f"preset {result['preset']}: {result['parameters']:,} parameters; bytes projected from {source}")
    print(f"{'role':12}{'parameters':>14}{'bytes':>14}{'share':>9}")
    rows = {**result["projected_bytes_by_role"], "code": result["code_bytes"]}
    fitted = result["projected_artifact_bytes"] - result["projected_bytes_at_clip_sigmas"]
    if fitted:
        rows["fitted"] = fitted  # what ARTIFACT_BYTES adds or takes
    for role, size in rows.items():
        count = result["parameters_by_role"].get(role)
        print(f"{role:12}{f'{count:,}' if count else '':>14}{size:>14,}{size / result['budget_bytes']:>9.2%}")
    left = result["budget_bytes"] - result["projected_total_bytes"]
    print(f"{'left':12}{'':>14}{left:>14,}{left / result['budget_bytes']:>9.2%}")
    print(f"code: packed; {result['code_bytes_raw']:,} bytes as it lies")
    verdict = "fits" if result["fits_budget"] else "DOES NOT FIT; a run would choose larger steps"
    print(f"of {result['budget_bytes']:,} bytes: {verdict} (projected)")
    return 0


def run_import(arguments: argparse.Namespace) -> int:
    from pgolf.data.tokenizer import Tokenizer
    from pgolf.import_checkpoint import import_checkpoint
    from pgolf.model import ModelConfig
    from pgolf.settings import load_settings

    if not Path(arguments.checkpoint).is_file():
        raise UserError(f"{arguments.checkpoint}: no such file")
    settings = load_settings({**os.environ, "PRESET": arguments.preset} if arguments.preset else None)
    tokenizer = Tokenizer(arguments.tokenizer_path or settings.tokenizer_path)
    metadata = {"scoring": settings.scoring, "tokenizer_sha256": tokenizer.sha256}
    config = ModelConfig.of(settings)
    total = import_checkpoint(arguments.checkpoint, arguments.output, config, metadata)
    print(f"{arguments.output}: {config.parameters():,} parameters in float32, {total:,} bytes")
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    from pgolf.artifact import read_artifact
    from pgolf.attention import choose_attention
    from pgolf.data.tokenizer import Tokenizer
    from pgolf.dataset import validation_split
    from pgolf.distributed import launch
    from pgolf.evaluate import evaluate
    from pgolf.evaluate_ngram import evaluate_ngram
    from pgolf.machine import compute_dtype
    from pgolf.quantize import model_from_artifact
    from pgolf.run import read_settings
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
    tokens, token_bytes = validation_split(data_path, tokenizer)
    scoring = scoring_of(artifact.metadata.get("scoring"), arguments.seq_len, arguments.stride)
    with launch() as ranks:
        dtype = compute_dtype("auto", ranks.device)
        attention = choose_attention("auto", ranks.device, dtype, scoring["seq_len"])
        model = model_from_artifact(artifact, dtype, ranks.device, attention)
        batch_tokens = saved.val_batch_size if saved else 65_536
        if arguments.ngram:
            chosen = {"ngram": arguments.ngram, "vocab_size": tokenizer.vocab_size, "val_batch_size": batch_tokens}
            settings = (saved or load_settings({}, preset="baseline")).model_copy(update=chosen)
            score, mixed = evaluate_ngram(model, tokens, token_bytes, settings, ranks, scoring)
        else:
            score, mixed = evaluate(model, tokens, token_bytes, batch_tokens=batch_tokens, ranks=ranks, **scoring), None
    result = {
        "artifact": str(path),
        "artifact_bytes": artifact.bytes.total,
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
            f"{path}: val_bpb {score.bpb:.4f}{cached}, val_loss {score.loss:.4f} nats a token, "
            f"{score.tokens:,} tokens, {score.bytes:,} bytes of text, artifact {artifact.bytes.total:,} bytes"
        )
    return 0


def scoring_of(stored: Any, seq_len: int | None, stride: int | None) -> dict[str, Any]:
    """How an artifact wants to be scored, with what the command line says instead."""
    scoring = {"stride": 0, "bos_id": None, **(stored if isinstance(stored, dict) else {})}
    given = {"seq_len": seq_len, "stride": stride if stride is not None or seq_len is None else 0}
    scoring |= {name: value for name, value in given.items() if value is not None}
    length, stride, bos_id = (scoring.get(name) for name in ("seq_len", "stride", "bos_id"))
    if type(length) is not int or length < 1:
        raise UserError(f"--seq-len {length}: must be a whole number, at least 1")
    if type(stride) is not int or not 0 <= stride <= length:
        raise UserError(f"--stride {stride}: must be a whole number from 0 (no overlap) to --seq-len {length}")
    if scoring.keys() != {"seq_len", "stride", "bos_id"} or not (bos_id is None or type(bos_id) is int):
        raise ArtifactError("artifact: its metadata does not say how to score it")
    return scoring


if __name__ == "__main__":
    sys.exit(main())
