"""`pgolf artifact`: show, verify, compare."""

import argparse
import hashlib
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf.errors import ArtifactError, UserError, one_line

if TYPE_CHECKING:
    from pgolf.artifact import Artifact


def add_parser(commands: Any) -> None:
    """Add `artifact` and its own commands to the subparsers of a command line; `arguments.run(arguments)` runs one."""
    artifact = commands.add_parser("artifact", help="look into a .pgolf file, check it, compare its bytes")
    commands = artifact.add_subparsers(dest="artifact_command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("show", _show, "every stream's shape, bits, bytes, bits a weight and share of the file"),
        (
            "verify",
            _verify,
            "decode everything and check it against checksums, the model it describes and how it is to be scored",
        ),
        ("compare", _compare, "bytes and seconds of other compressors on the same tensors"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("file", metavar="FILE", help="a .pgolf file, or the folder of a run")
        command.add_argument("--json", action="store_true")
        command.set_defaults(run=run)


def _path(given: str) -> Path:
    path = Path(given) / "model.pgolf" if Path(given).is_dir() else Path(given)
    if not path.is_file():
        raise UserError(f"{given}: no artifact there; name a .pgolf file or a run's folder")
    return path


def _row(artifact: "Artifact", label: str, size: int) -> dict[str, Any]:
    owner, part = label.split(":")
    if part == "values":
        tensor = artifact.tensors[owner]
        shape, bits, count, states = "x".join(map(str, tensor.shape)), tensor.bits, tensor.values.numel(), tensor.states
    else:
        own = [each for each in artifact.tensors.values() if each.role == owner]
        held = {
            "scales": [each.scale for each in own if each.scale is not None],
            "orders": [each.order for each in own if each.order is not None],
            "floats": [each.values for each in own if each.scale is None],
        }[part]
        shape, count, states = f"{len(held)} arrays", sum(each.numel() for each in held), 0
        bits = 2 if part == "orders" else max(8 * each.element_size() for each in held)
    return {
        "stream": label,
        "shape": shape,
        "values": count,
        "bits": bits,
        "trellis_states": states,
        "bytes": size,
        "bits_per_value": 8 * size / count if count else None,
        "share": size / artifact.bytes.total,
    }


def _show(arguments: argparse.Namespace) -> int:
    from pgolf.artifact import VERSION, read_artifact

    path = _path(arguments.file)
    artifact = read_artifact(path)
    total = artifact.bytes.total
    rows = [_row(artifact, label, size) for label, size in artifact.bytes.streams.items()]
    weights = sum(math.prod(each.shape) for each in artifact.tensors.values())
    result: dict[str, Any] = {
        "artifact": str(path),
        "version": VERSION,
        "metadata": artifact.metadata,
        "streams": rows,
        "container_bytes": artifact.bytes.container,
        "total_bytes": total,
        "weights": weights,
        "bits_per_weight": 8 * total / weights if weights else None,
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    width = max([len("container"), *(len(row["stream"]) for row in rows)])
    print(f"{'stream':{width}}{'shape':>18}{'bits':>6}{'values':>13}{'bytes':>13}{'bits each':>11}{'share':>9}")
    for row in rows:
        each = "" if row["bits_per_value"] is None else f"{row['bits_per_value']:.4f}"
        bits = f"{row['bits']}{'t' if row['trellis_states'] else ''}"
        print(
            f"{row['stream']:{width}}{row['shape']:>18}{bits:>6}{row['values']:>13,}"
            f"{row['bytes']:>13,}{each:>11}{row['share']:>9.2%}"
        )
    container = result["container_bytes"]
    print(f"{'container':{width}}{'':>37}{container:>13,}{'':>11}{container / total:>9.2%}")
    average = f"{8 * total / weights:.4f}" if weights else ""
    print(f"{'total':{width}}{'':>24}{weights:>13,}{total:>13,}{average:>11}{1:>9.2%}")
    if any(row["trellis_states"] for row in rows):
        print("t: indices of a trellis")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    from pgolf.artifact import VERSION, read_artifact
    from pgolf.artifact.model import model_from_artifact
    from pgolf.evaluation.stored_scoring import scoring_of
    from pgolf.model import Execution

    path = _path(arguments.file)
    artifact = read_artifact(path)
    describes = "model" in artifact.metadata
    if describes:  # all that `pgolf eval` takes from it
        model_from_artifact(artifact, Execution(), torch.device("cpu"))
        scoring_of(artifact.metadata.get("scoring"))
        if not _is_sha256(artifact.metadata.get("tokenizer_sha256")):
            raise ArtifactError("artifact: its metadata does not name its tokenizer by a SHA-256")
    result = {
        "artifact": str(path),
        "version": VERSION,
        "bytes": artifact.bytes.total,
        "tensors": len(artifact.tensors),
        "weights": sum(math.prod(each.shape) for each in artifact.tensors.values()),
        "model": describes,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        of = "the model that it describes" if describes else "no model described"
        print(
            f"{one_line(path)}: sound: version {VERSION}, {result['bytes']:,} bytes, {result['tensors']} tensors, "
            f"{result['weights']:,} weights, {of}, sha256 {result['sha256']}"
        )
    return 0


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _compare(arguments: argparse.Namespace) -> int:
    from pgolf.artifact import read_artifact
    from pgolf.artifact.compressors import compare, has_lrzip

    path = _path(arguments.file)
    artifact = read_artifact(path)
    weights = sum(math.prod(each.shape) for each in artifact.tensors.values())
    results = compare(artifact)
    least = results[0].bytes
    rows = [
        {
            "compressor": each.name,
            "bytes": each.bytes,
            "bits_per_weight": 8 * each.bytes / weights if weights else None,
            "encode_seconds": each.encode_seconds,
            "decode_seconds": each.decode_seconds,
        }
        for each in results
    ]
    missing = None if has_lrzip() else "lrzip is not installed: the record's scheme is left out"
    if arguments.json:
        print(json.dumps({"artifact": str(path), "weights": weights, "results": rows, "missing": missing}, indent=2))
        return 0
    print(f"{'compressor':32}{'bytes':>13}{'bits/weight':>13}{'over ours':>11}{'encode s':>10}{'decode s':>10}")
    for row, each in zip(rows, results, strict=True):
        bits = "" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.4f}"
        print(
            f"{each.name:32}{each.bytes:>13,}{bits:>13}{each.bytes / least - 1:>11.2%}"
            f"{each.encode_seconds:>10.2f}{each.decode_seconds:>10.2f}"
        )
    if missing:
        print(missing)
    return 0
