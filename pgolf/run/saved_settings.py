"""`settings.json` of a run: the resolved settings, and where the run was started, from where relative paths go.

`started_in` has that folder twice: seen from the run's folder, which stays right when both move together, and absolute,
for a run that was moved or copied alone. The first under which a path exists is taken.
"""

import os
from pathlib import Path
from typing import Any

from pgolf.errors import UserError
from pgolf.runtime.files import read_json, write_json
from pgolf.settings import Settings, validate

STARTED_IN = "started_in"
PATHS = ("data_path", "tokenizer_path")


def write_settings(path: Path, settings: Settings) -> None:
    """Write `path`, the settings.json of a run that is started in the current folder."""
    here, folder = Path.cwd(), path.parent.resolve()
    seen_from_run = [os.path.relpath(here, folder)] if folder.is_relative_to(here) else []
    write_json(path, {**settings.model_dump(), STARTED_IN: [*seen_from_run, str(here)]})


def read_settings(path: Path) -> Settings:
    """The settings in `path`; relative paths that meant something else there are absolute here."""
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("not an object of settings by name")
        started_in = values.pop(STARTED_IN, None)
        settings = validate(values)
        bases = _bases(started_in, path.parent.resolve())
        moved = {name: _from_here(name, getattr(settings, name), bases) for name in PATHS}
    except OSError as error:
        raise UserError(f"{path}: not the settings of a run ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not the settings of a run ({error})") from None
    return settings.model_copy(update=moved)


def _bases(started_in: Any, folder: Path) -> list[str]:
    """Folders from which relative paths of the run in `folder` may go, best first."""
    if started_in is None:  # a file without it: here, or where the run's folder lies
        return [os.getcwd(), *map(str, folder.parents)]
    if not isinstance(started_in, list) or not all(isinstance(each, str) for each in started_in) or not started_in:
        raise ValueError(f"{STARTED_IN}: must be a list of folders")
    return [os.path.normpath(folder / each) for each in started_in]


def _from_here(name: str, path: str, bases: list[str]) -> str:
    try:
        usable = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise ValueError(f"{name}: not a path")
    if os.path.isabs(path):
        return path
    base = next((each for each in bases if os.path.exists(os.path.join(each, path))), bases[-1])
    return path if base == os.getcwd() else os.path.join(base, path)
