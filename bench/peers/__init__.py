"""Other people's kernels beside ours. Nothing of theirs is kept, fetched or built here.

`PGOLF_PEERS` names a folder with checkouts, each under its repository's name; whoever measures puts them there.
An adapter is a module of this package with `REPOSITORY` ("owner/name") and `load(checkout: Path)`, which takes from the
checkout the functions that are compared and returns them as a namespace.
"""

import ast
import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def peer(name: str) -> SimpleNamespace:
    """The functions that adapter `name` takes from its checkout; skips with the reason where there is none."""
    adapter = importlib.import_module(f"peers.{name}")
    folder = os.environ.get("PGOLF_PEERS")
    if not folder:
        pytest.skip(f"peer {adapter.REPOSITORY}: PGOLF_PEERS names no folder with checkouts")
    checkout = Path(folder) / adapter.REPOSITORY.split("/")[1]
    if not checkout.is_dir():
        pytest.skip(f"peer {adapter.REPOSITORY}: no checkout at PGOLF_PEERS/{checkout.name}")
    try:
        return adapter.load(checkout)
    except (OSError, ImportError, LookupError) as error:
        pytest.skip(f"peer {adapter.REPOSITORY}: {error}")


def take_functions(path: Path, names: list[str], given: dict[str, Any]) -> SimpleNamespace:
    """Functions defined at the top of a script, without running the rest of it; `given` are the globals they need."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    missing = sorted(set(names) - {node.name for node in wanted})
    if missing:
        raise LookupError(f"{path.name} defines no {missing[0]}")
    scope = dict(given)
    exec(compile(ast.Module(body=wanted, type_ignores=[]), str(path), "exec"), scope)
    return SimpleNamespace(**{name: scope[name] for name in names})
