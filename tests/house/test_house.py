"""The rules of the house: imports run one way, headers stay where they belong, files keep one noun."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE = {"pgolf": 420, "csrc": 500, "triton_kernels": 420, "bench": 420, "tests": 420}  # lines


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("pgolf", *parts) if parts[0] == "triton_kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for folder in ("pgolf", "triton_kernels") for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports_of(path: Path) -> set[str]:
    """Our own modules that a file imports, anywhere in it; `from pgolf import ops` is pgolf.ops."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            base = node.module or ""
            found |= {f"{base}.{alias.name}" for alias in node.names}
    ours = set()
    for name in found:
        while name and name not in MODULES and name != "pgolf._native":
            name = name.rpartition(".")[0]
        if name:
            ours.add(name)
    return ours


GRAPH = {name: imports_of(path) for name, path in MODULES.items()}


BASE = {"errors", "settings", "presets", "setting_rules", "community_names"}  # modules that every folder may import
MAY_IMPORT = {  # a folder of pgolf/ -> the others that it may import from
    "triton_kernels": set(),
    "ops": {"triton_kernels", "_native", "errors"},
    "runtime": {"ops", "errors"},
    "model": {"ops", *BASE},
    "data": {"runtime", *BASE},
    "artifact": {"ops", "model", "runtime", *BASE},
    "evaluation": {"ops", "model", "data", "runtime", *BASE},
    "quantization": {"ops", "model", "data", "artifact", "runtime", *BASE},
    "training": {"ops", "model", "data", "evaluation", "quantization", "runtime", *BASE},
    "run": {"ops", "evaluation", "training", "runtime", *BASE},
}
ABOVE_ALL = {"cli", "__main__"}
FULLEST_FOLDER = {"ops": 22, "model": 22}  # files; 15 elsewhere


def room(name: str) -> str:
    """The folder of pgolf/ that a module lies in, or the module itself where it lies in none."""
    return name.split(".")[1] if "." in name else "pgolf"


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_run_one_way(name):
    here = room(name)
    allowed = MAY_IMPORT.get(here, BASE) | {here}
    if here in ABOVE_ALL or name == "pgolf":
        return
    # The doctor and the build report look at the native module itself; nobody computes with it there.
    if name in ("pgolf.runtime.doctor", "pgolf.runtime.probes"):
        allowed |= {"_native"}
    wrong = {other for other in GRAPH[name] if other != "pgolf" and room(other) not in allowed}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_every_folder_has_its_walls_and_says_what_is_in_it():
    for folder in sorted({path.parent for path in MODULES.values()} - {ROOT / "pgolf", ROOT / "triton_kernels"}):
        inside = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
        assert room(module_name(folder / "__init__.py")) in MAY_IMPORT.keys() | ABOVE_ALL, folder.name
        assert len(inside) < FULLEST_FOLDER.get(folder.name, 15), f"{folder.name} has {len(inside) + 1} files"
        if folder.name in ("ops", "model", "attention", "cli"):  # one noun a file, or one command
            continue
        told = re.findall(r"^ *(\w+)  +\w", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), re.M)
        assert sorted(told) == sorted(inside), f"{folder.name}/__init__.py"


def test_there_are_no_circles():
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in finished:
            return
        for other in GRAPH.get(name, ()):
            if other != "pgolf":  # the package's face imports the rooms; every `from pgolf import ops` passes by it
                visit(other, (*path, name))
        finished.add(name)

    for name in GRAPH:
        visit(name, ())


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                ours = name.startswith("pgolf.triton_kernels")
                standard = top in ("functools", "dataclasses", "math", "collections", "typing", "os", "itertools")
                assert ours or standard or top in ("torch", "triton"), f"{path.name} imports {name}"


def test_native_sources_know_neither_torch_nor_python():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".in")]
    assert len(sources) > 5
    for path in sources:
        includes = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text(encoding="utf-8"))
        for name in includes:
            assert not re.search(r"torch|ATen|c10", name), f"{path.name} includes {name}"
            if not path.stem.endswith("bindings"):
                assert not re.search(r"pybind11|Python\.h", name), f"{path.name} includes {name}"


def test_the_story_is_short_and_files_keep_one_noun():
    assert len((ROOT / "train_gpt.py").read_text(encoding="utf-8").splitlines()) < 200
    for folder, longest in LONGEST_FILE.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= longest, f"{path.relative_to(ROOT)}: {lines} lines; two nouns in one file?"


def test_every_public_operation_is_there():
    from pgolf import ops

    names = "leaky_relu2_mlp newton_schulz softcapped_cross_entropy pack_bits unpack_bits unpack_dequantize gptq"
    for name in names.split():
        assert callable(getattr(ops, name)), name
        assert getattr(ops, name).__doc__, f"ops.{name} has no docstring"
    for path in (ROOT / "pgolf").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} has no module docstring"
