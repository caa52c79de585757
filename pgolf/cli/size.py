"""`pgolf size`: parameters and bytes by role, projected for a preset or a run, exact for an artifact."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pgolf.errors import UserError, one_line


def add_parser(commands: Any) -> None:
    """Add `size` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    size = commands.add_parser("size", help="parameters and bytes of a preset, of a run's weights, or of an artifact")
    size.add_argument(
        "target",
        nargs="?",
        metavar="RUN_OR_ARTIFACT",
        help="a run's folder: project from its checkpoint; or a .pgolf file: its exact bytes",
    )
    size.add_argument("--preset", help="preset; environment variables change its settings as in a run")
    size.add_argument("--json", action="store_true")
    size.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Status 4 when an artifact and the code are over the budget; what is only projected has time to change."""
    if arguments.target and arguments.preset:
        raise UserError(f"{arguments.target} has settings of its own; --preset cannot be given with it")
    if arguments.target and not Path(arguments.target).is_dir():
        return _exact(Path(arguments.target), arguments.json)
    return _projected(arguments)


def _exact(path: Path, as_json: bool) -> int:
    from pgolf.quantization.size import size_of_artifact
    from pgolf.run.saved_settings import read_settings
    from pgolf.settings import load_settings

    if not path.is_file():
        raise UserError(f"{path}: no run and no artifact there; name a run's folder or a .pgolf file")
    beside = path.with_name("settings.json")
    settings = read_settings(beside) if beside.is_file() else load_settings()
    result = size_of_artifact(path, settings.budget_bytes)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{one_line(path)}: {result['parameters']:,} parameters; bytes as they lie in the file")
        _table(result, result["bytes_by_role"], result["total_bytes"])
        print(f"of {result['budget_bytes']:,} bytes: {'fits' if result['fits_budget'] else 'does not fit'}")
    return 0 if result["fits_budget"] else 4


def _projected(arguments: argparse.Namespace) -> int:
    from pgolf.model import ModelConfig
    from pgolf.quantization.size import projected_size
    from pgolf.run.saved_settings import read_settings
    from pgolf.settings import load_settings
    from pgolf.training import checkpoint

    if arguments.target:
        folder = Path(arguments.target)
        if not (folder / "settings.json").is_file():
            raise UserError(f"{folder}: no run there; name the folder of one")
        settings = read_settings(folder / "settings.json")
        weights = checkpoint.weights(folder)
        if {name: tuple(tensor.shape) for name, tensor in weights} != ModelConfig.of(settings).shapes():
            raise UserError(f"{folder}: its checkpoint is not of the model that its settings.json describes")
        result = projected_size(settings, weights)
    else:
        settings = load_settings({**os.environ, "PRESET": arguments.preset} if arguments.preset else None)
        result = projected_size(settings)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return 0
    source = "its checkpoint's weights" if result["from_weights"] else "Gaussian weights"
    print(f"preset {one_line(result['preset'])}: {result['parameters']:,} parameters; bytes projected from {source}")
    fitted = result["projected_artifact_bytes"] - result["projected_bytes_at_clip_sigmas"]
    by_role = result["projected_bytes_by_role"] | ({"fitted": fitted} if fitted else {})  # by ARTIFACT_BYTES
    _table(result, by_role, result["projected_total_bytes"])
    remedy = "ARTIFACT_BYTES is too large" if settings.artifact_bytes else "a run would choose larger steps"
    verdict = "fits" if result["fits_budget"] else f"does not fit; {remedy}"
    print(f"of {result['budget_bytes']:,} bytes: {verdict} (projected)")
    return 0


def _table(result: dict[str, Any], by_role: dict[str, int], total: int) -> None:
    budget = result["budget_bytes"]
    print(f"{'role':12}{'parameters':>14}{'bytes':>14}{'share':>9}")
    for role, size in {**by_role, "code": result["code_bytes"], "left": budget - total}.items():
        count = result["parameters_by_role"].get(role)
        print(f"{role:12}{f'{count:,}' if count else '':>14}{size:>14,}{size / budget:>9.2%}")
    print(f"code: packed; {result['code_bytes_raw']:,} bytes as it lies")
