"""Where this installation keeps the sources of pgolf: in a checkout beside the package, in a wheel inside it.

setup.py runs this file before anything is installed, so it needs the standard library alone.
"""

import hashlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SHIPPED = "_sources"  # the folder inside the package that setup.py fills in a wheel
SCRIPT = "train_gpt.py"
BUILD_FILES = ("setup.py", "pyproject.toml", "CMakeLists.txt")
SOURCE_SUFFIXES = (".h", ".cpp", ".cu", ".cuh", ".in")


def checkout() -> Path | None:
    """The checkout that this package is imported from, be it installed in place or not; None in a wheel."""
    root = PACKAGE.parent
    return root if (root / "CMakeLists.txt").is_file() and (root / "csrc").is_dir() else None


def root() -> Path:
    """The folder of train_gpt.py, the build files and csrc/."""
    return checkout() or PACKAGE / SHIPPED


def kernels() -> Path:
    """The folder of `pgolf.triton_kernels`."""
    return (checkout() or PACKAGE) / "triton_kernels"


def native_files(folder: Path) -> list[str]:
    """The sources of `pgolf._native` under a checkout's or a wheel's `folder`, in a fixed order."""
    found = [path for path in (folder / "csrc").rglob("*") if path.suffix in SOURCE_SUFFIXES]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def shipped_files(folder: Path) -> list[str]:
    """What a wheel carries in SHIPPED."""
    return [SCRIPT, *BUILD_FILES, *native_files(folder)]


def native_digest(folder: Path) -> str:
    """SHA-256 of what `pgolf._native` is built from; the build carries it as `build_info()["sources"]`."""
    digest = hashlib.sha256()
    for name in ("CMakeLists.txt", *native_files(folder)):
        data = (folder / name).read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
