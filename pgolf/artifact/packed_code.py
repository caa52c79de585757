"""The code that a run needs, as one archive: what a submission would have to carry besides the artifact.

The accepted entries count `train_gpt.py` alone, minified, compressed with LZMA and wrapped, and helper files not at
all. Here every file of ours that takes part counts: the `train_gpt.py` that was started, every module of this package
that it imports directly or through others, their templates, and the sources and build files of the native extension.
Tests, benchmarks, the command line and documentation do not take part. Python loses comments, docstrings and the layout
of its lines; C++ and CUDA stay as they are. One code has one size, however it was installed.

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

from pgolf.artifact.minify import minified
from pgolf.errors import UserError
from pgolf.runtime import sources


def code_files() -> dict[str, Path]:
    """Every counted file by its name in the archive."""
    root, modules = sources.root(), _modules()
    script = _script()
    counted = {script.name: script}
    counted |= {name: root / name for name in (*sources.BUILD_FILES, *sources.native_files(root))}
    for name in _reached(script, modules):
        member, path = modules[name]
        counted[member] = path
        template = path.with_suffix(".html")
        if template.exists():
            counted[member.removesuffix(".py") + ".html"] = template
    if lacking := [name for name, path in counted.items() if not path.is_file()]:
        raise UserError(f"{root / lacking[0]}: not there, but counts as code; install pgolf again")
    return dict(sorted(counted.items()))


def _script() -> Path:
    """The train_gpt.py that this process runs, a changed copy elsewhere too; else the one that pgolf has."""
    started = Path(getattr(sys.modules.get("__main__"), "__file__", None) or "")
    return started if started.name == sources.SCRIPT and started.is_file() else sources.root() / sources.SCRIPT


def code_bytes() -> int:
    """Bytes of the archive."""
    return len(pack_code())


def raw_code_bytes() -> int:
    """Bytes of the same files as they lie."""
    return sum(path.stat().st_size for path in code_files().values())


@cache
def pack_code() -> bytes:
    return lzma.compress(tar_code(), preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_CRC32)


def tar_code() -> bytes:
    """The archive before it is compressed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, path in sorted(code_files().items(), key=lambda each: (each[1].suffix, each[0])):  # like by like
            data = path.read_bytes()
            if path.suffix == ".py":
                data = minified(data.decode("utf-8")).encode("utf-8")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _modules() -> dict[str, tuple[str, Path]]:
    """Our modules by their dotted names: the name in the archive, where `triton_kernels` lies beside the package, and
    the path here."""
    found = {}
    for base, member, folder in (
        ("pgolf", "pgolf", sources.PACKAGE),
        ("pgolf.triton_kernels", "triton_kernels", sources.kernels()),
    ):
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder)
            parts = inner.with_suffix("").parts
            name = ".".join((base, *(parts[:-1] if parts[-1] == "__init__" else parts)))
            found[name] = (f"{member}/{inner.as_posix()}", path)
    return found


def _reached(script: Path, modules: dict[str, tuple[str, Path]]) -> set[str]:
    """The modules that `script` imports anywhere in it, directly or through others; the packages above count."""
    reached: set[str] = set()
    waiting = [script]
    while waiting:
        for name in _imported(waiting.pop()):
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                above = ".".join(parts[:depth])
                if above in modules and above not in reached:
                    reached.add(above)
                    waiting.append(modules[above][1])
    return reached


def _imported(path: Path) -> set[str]:
    """Dotted names that a file may import, anywhere in it: `from a import b` is a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found
