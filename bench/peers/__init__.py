"""Other people's kernels beside ours. Nothing of theirs is kept, fetched or built here.

`PGOLF_PEERS` names a folder with checkouts, each under its repository's name; whoever measures puts them there.
An adapter is a module of this package with `REPOSITORY` ("owner/name"), `load(checkout: Path)`, which takes from the
checkout the functions that need nothing but PyTorch and returns them as a namespace, and one function
`<operation>(checkout: Path)` for each operation of ours whose counterpart it has, returning a callable with our
arguments, or raising an error that says why the two cannot be compared.
"""

import ast
import importlib
import importlib.util
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

_numbers = itertools.count()


class NoPeer(Exception):
    """A peer is not here or cannot be compared; the message says which and why."""


def peer(name: str) -> SimpleNamespace:
    """The functions that adapter `name` takes from its checkout; skips with the reason where there is none."""
    try:
        return _loaded(name, "load")
    except NoPeer as reason:
        pytest.skip(str(reason))


def contenders(operation: str, *names: str) -> dict[str, Callable[..., Any]]:
    """{repository: its counterpart of `operation`} of the adapters `names`; a warning tells why one is left out."""
    found = {}
    for name in names:
        try:
            found[name.replace("_", "-")] = _loaded(name, operation)
        except NoPeer as reason:
            warnings.warn(str(reason), stacklevel=2)
    return found


def take(path: Path, names: list[str], given: dict[str, Any], text: str | None = None) -> SimpleNamespace:
    """What is defined under `names` at the top of a script, without running the rest of it.

    Functions, classes and values of simple assignments, with what the script registers on them there
    (`@name.register_fake`, `name.register_autograd(...)`). `given` are the globals that they need. They keep their file
    and line numbers, from which Triton reads its kernels, and live in a module of their own, for torch.compile.
    `text` stands in for the script's.
    """
    tree = ast.parse(path.read_text(encoding="utf-8") if text is None else text, filename=str(path))
    defined = {name for node in tree.body for name in _defines(node)}
    missing = sorted(set(names) - defined)
    if missing:
        raise LookupError(f"{path.name} defines no {missing[0]}")
    wanted = [node for node in tree.body if _defines(node) & set(names) or _registers_on(node) & set(names)]
    module = ModuleType(f"bench.peers.taken_{next(_numbers)}_{path.stem}")
    module.__file__ = str(path)
    module.__dict__.update(given)
    sys.modules[module.__name__] = module
    exec(compile(ast.Module(body=wanted, type_ignores=[]), str(path), "exec"), module.__dict__)
    return SimpleNamespace(**{name: getattr(module, name) for name in names})


def load_module(path: Path) -> ModuleType:
    """A whole file of a peer, run as a module of its own."""
    name = f"bench.peers.loaded_{next(_numbers)}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise LookupError(f"no {path.name} in the checkout")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache
def _taken(checkout: Path, name: str, what: str) -> Any:
    return getattr(importlib.import_module(f"bench.peers.{name}"), what)(checkout)


def _loaded(name: str, what: str) -> Any:
    repository = importlib.import_module(f"bench.peers.{name}").REPOSITORY
    folder = os.environ.get("PGOLF_PEERS")
    if not folder:
        raise NoPeer(f"peer {repository}: PGOLF_PEERS names no folder with checkouts")
    checkout = Path(folder) / repository.split("/")[1]
    if not checkout.is_dir():
        raise NoPeer(f"peer {repository}: no checkout at PGOLF_PEERS/{checkout.name}")
    try:
        return _taken(checkout.resolve(), name, what)
    except Exception as error:  # other people's code may raise anything
        raise NoPeer(f"peer {repository}: {error}") from error


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def _registers_on(node: ast.stmt) -> set[str]:
    """Names to which a decorator or a bare call of a method belongs."""
    calls = [*node.decorator_list] if isinstance(node, ast.FunctionDef) else []
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        calls.append(node.value.func)
    owners = set()
    for call in calls:
        while isinstance(call, (ast.Attribute, ast.Call)):
            call = call.func if isinstance(call, ast.Call) else call.value
        if isinstance(call, ast.Name):
            owners.add(call.id)
    return owners
