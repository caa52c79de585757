"""`pgolf size`: parameters and projected bytes, of a preset or of a run."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pgolf.errors import UserError


def add_parser(commands: Any) -> None:
    """Add `size` to the subparsers of a command line; `arguments.run(arguments)` runs it."""
    size = commands.add_parser("size", help="parameters and projected bytes of a preset, or of a run from its weights")
    size.add_argument("run_folder", nargs="?", metavar="RUN", help="a run's folder: project from its checkpoint")
    size.add_argument("--preset", help="preset; environment variables change its settings as in a run")
    size.add_argument("--json", action="store_true")
    size.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
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
