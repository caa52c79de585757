"""The code that a run needs, as one archive: what a submission would have to carry besides the artifact.

The accepted entries count `train_gpt.py` alone, minified, compressed with LZMA and wrapped, and helper files not at
all. Here every file of ours that takes part counts: the script that was started, every module of this package that it
imports directly or through others, their templates, and the sources and build files of the native extension; an
installation without sources counts the built extension. Tests, benchmarks, the command line and documentation do not
take part. Python loses comments and docstrings, as in the entries; C++ and CUDA stay as they are.

The archive is a tar without times and owners through xz, the same for the same sources. Unpacked, it is a checkout that
`pip install .` builds and `train_gpt.py` runs.
"""

import ast
import io
import lzma
import sys
import tarfile
from functools import cache
from pathlib import Path

import pgolf

BUILD_FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt")
SOURCE_SUFFIXES = (".h", ".cpp", ".cu", ".in")


def code_files() -> dict[str, Path]:
    """Every counted file by its name in the archive."""
    package = Path(pgolf.__file__).parent
    checkout = package.parent
    modules = _modules(package)
    script = checkout / "train_gpt.py"
    if not script.exists():
        script = Path(sys.argv[0])
    found = {script.name: script} if script.suffix == ".py" and script.is_file() else {}
    start = [script] if found else list(modules.values())
    for name in _reached(start, modules):
        path = modules[name]
        found[str(path.relative_to(checkout))] = path
        template = path.with_suffix(".html")
        if template.exists():
            found[str(template.relative_to(checkout))] = template
    sources = [path for path in (checkout / "csrc").glob("*") if path.suffix in SOURCE_SUFFIXES]
    if sources:
        sources += [checkout / name for name in BUILD_FILES if (checkout / name).exists()]
    else:
        sources = list(package.glob("_native*"))
    return dict(sorted({**found, **{str(path.relative_to(checkout)): path for path in sources}}.items()))


def code_bytes() -> int:
    """Bytes of the archive."""
    return len(pack_code())


def raw_code_bytes() -> int:
    """Bytes of the same files as they lie."""
    return sum(path.stat().st_size for path in code_files().values())


@cache
def pack_code() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, path in sorted(code_files().items(), key=lambda each: (each[1].suffix, each[0])):  # like by like
            data = path.read_bytes()
            if path.suffix == ".py":
                data = minified(data.decode("utf-8")).encode("utf-8")
            info = tarfile.TarInfo(name.replace("\\", "/"))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_CRC32)


def minified(source: str) -> str:
    """Python without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree) + "\n"


def _modules(package: Path) -> dict[str, Path]:
    """Our modules by their dotted names. In a checkout `triton_kernels` lies beside the package."""
    kernels = package.parent / "triton_kernels"
    found = {}
    for base, folder in (("pgolf", package), ("pgolf.triton_kernels", kernels)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((base, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def _reached(start: list[Path], modules: dict[str, Path]) -> set[str]:
    """The modules that `start` imports anywhere in them, directly or through others; the packages above count."""
    reached: set[str] = set()
    waiting = list(start)
    while waiting:
        for name in _imported(waiting.pop()):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                above = ".".join(parts[:depth])
                if above in modules and above not in reached:
                    reached.add(above)
                    waiting.append(modules[above])
    return reached


def _imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found
