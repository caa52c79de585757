"""What a package that is imported from a checkout takes from where: its Triton kernels from the checkout, the compiled
`pgolf._native` from wherever it was installed to, and only if it was built from the very sources in the checkout.

With `pip install -e .` all lies in place. With `pip install .`, `python train_gpt.py` in the checkout still imports the
`pgolf/` beside it, which has neither; with another checkout installed in place, Python would take that one's.
"""

import importlib
import importlib.util
import os
import shlex
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from pgolf.errors import NotInstalledError
from pgolf.runtime import sources

KERNELS, NATIVE = "pgolf.triton_kernels", "pgolf._native"
# What train_gpt.py cannot begin without, by the names that are imported; `pgolf doctor` looks at the rest.
REQUIRED = ("torch", "numpy", "pydantic", "sentencepiece", "brotli")


def complete() -> None:
    """Have Python find the two parts that a checkout's `pgolf/` folder lacks."""
    if folder := sources.checkout():
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != CheckoutFinder.__name__]
        sys.meta_path.insert(0, CheckoutFinder(folder))


def require_installation(program: str) -> None:
    """End `program` with one line and status 2 where it could not even begin."""
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        end = f"{', '.join(missing)}: not installed for {sys.executable}; run: {rebuild_command(tested=True)}"
        sys.exit(_refuse(program, end))
    try:
        importlib.import_module(NATIVE)
    except NotInstalledError as error:
        sys.exit(_refuse(program, str(error)))
    except ImportError as error:
        if "PGOLF_CPU_LEVEL" in str(error):
            sys.exit(_refuse(program, str(error)))
        sys.exit(_refuse(program, f"{NATIVE} does not load ({error}); run: {rebuild_command()}"))


def rebuild_command(tested: bool = False) -> str:
    """Installs pgolf again from the folder that it came from; `tested`: with its dependencies as they were tested."""
    folder = sources.checkout()
    if not folder:
        return "pip install --force-reinstall --no-deps pgolf"
    here = folder == Path.cwd()
    constraints = folder / "constraints.txt"
    command = "pip install -e " + ("." if here else shlex.quote(str(folder)))
    if tested and constraints.is_file():
        command += " -c " + ("constraints.txt" if here else shlex.quote(str(constraints)))
    return command


def _refuse(program: str, text: str) -> int:
    print(f"{program}: {text}", file=sys.stderr)
    return 2


class CheckoutFinder(MetaPathFinder):
    """Comes before Python's own finders, for two names."""

    def __init__(self, folder: Path):
        self.folder = folder

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname == KERNELS:
            kernels = self.folder / "triton_kernels"
            return importlib.util.spec_from_file_location(
                KERNELS, kernels / "__init__.py", submodule_search_locations=[str(kernels)]
            )
        if fullname == NATIVE:
            if built := self.find_built():
                return importlib.util.spec_from_file_location(NATIVE, built, loader=CheckedLoader(self.folder, built))
            return ModuleSpec(NATIVE, MissingLoader(self.folder))
        return None

    def find_built(self) -> str | None:
        """The extension in place, else in another installation of pgolf."""
        places = [str(sources.PACKAGE), *(os.path.join(entry, "pgolf") for entry in sys.path)]
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                found = finder.find_spec(NATIVE, places)
                if found and found.origin and found.origin.endswith(tuple(EXTENSION_SUFFIXES)):
                    return found.origin
        return None


class CheckedLoader(ExtensionFileLoader):
    """Refuses an extension that other sources than the checkout's were built to: it would compute something else."""

    def __init__(self, folder: Path, built: str):
        super().__init__(NATIVE, built)
        self.folder = folder

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module.build_info().get("sources") != sources.native_digest(self.folder):
            raise NotInstalledError(
                f"{self.path} was built from other sources than those in {self.folder / 'csrc'}; "
                f"run: {rebuild_command()}"
            )


class MissingLoader(Loader):
    def __init__(self, folder: Path):
        self.folder = folder

    def create_module(self, spec: ModuleSpec) -> None:
        raise NotInstalledError(
            f"the sources in {self.folder} are not built for {sys.executable}; run: {rebuild_command()}"
        )

    def exec_module(self, module: ModuleType) -> None:
        """Never reached; a loader has to have it."""
