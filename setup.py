"""Builds csrc/ into `pgolf._native` with CMake and ninja; pyproject.toml holds the metadata.

A wheel carries train_gpt.py, csrc/ and the build files too, in pgolf/_sources/: `pgolf train` runs the one, and all of
them count as code (pgolf/artifact/packed_code.py).

PGOLF_CUDA        auto (default): build the CUDA half where nvcc is found; if that fails, say why in one line and build
                  without it. on: the CUDA half must build. off: never.
PGOLF_CUDA_ARCHS  architectures to compile for, "90a" by default; separate several with spaces, commas or semicolons.

`pgolf._native.build_info()` tells what came of it.
"""

from __future__ import annotations

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES, HOST = (runpy.run_path(str(ROOT / "pgolf" / "runtime" / name)) for name in ("sources.py", "host.py"))
ARCH = re.compile(r"\d+[af]?(-real|-virtual)?")
COMPILER_ERROR = re.compile(r"^(?!CMake).*\b(fatal|error)\b\s*:")
NO_NVCC = f"nvcc was not found ({HOST['NVCC_PLACES']})"


class BuildFailed(Exception):
    """A step of CMake or ninja failed; the message is one line."""


def cuda_mode() -> str:
    mode = os.environ.get("PGOLF_CUDA", "").strip().lower() or "auto"
    if mode not in ("auto", "on", "off"):
        sys.exit(f"PGOLF_CUDA={os.environ['PGOLF_CUDA']}: accepted are auto, on and off")
    return mode


def cuda_archs() -> str:
    archs = re.split(r"[\s,;]+", os.environ.get("PGOLF_CUDA_ARCHS", "").strip() or "90a")
    for arch in archs:
        if not ARCH.fullmatch(arch):
            sys.exit(f"PGOLF_CUDA_ARCHS: '{arch}' is no architecture; accepted are numbers like 90a or 100")
    return " ".join(archs)


def first_error(output: str) -> str:
    """What a build's output gives as the cause, fit for one line of a terminal and for a C++ string."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    text = next((line for line in lines if COMPILER_ERROR.search(line)), None)
    starts = [at for at, line in enumerate(lines) if line.startswith("CMake Error")]
    if not text and starts:  # the text follows its first line
        following = lines[starts[0] + 1 : starts[0] + 4]
        text = " ".join(itertools.takewhile(lambda line: not line.startswith(("Call Stack", "CMake")), following))
        text = text or lines[starts[0]]
    text = text or (lines[-1] if lines else "no output")
    return " ".join(re.sub(r"[^ -~]|[\\\"]", "'", text).split())[:200]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        mode, nvcc = cuda_mode(), HOST["find_nvcc"]()
        shutil.rmtree(self.build_temp, ignore_errors=True)  # its cache names the tools of an isolation that is gone
        if mode == "on" and not nvcc:
            sys.exit(f"PGOLF_CUDA=on: {NO_NVCC}")
        if mode != "off" and nvcc:
            try:
                return self.build_with(f"-DPGOLF_CUDA_ARCHS={cuda_archs()}", f"-DCMAKE_CUDA_COMPILER={nvcc}", cuda=True)
            except BuildFailed as error:
                reason = f"the CUDA half failed with {nvcc}: {error}"
                if mode == "on":
                    sys.exit(f"PGOLF_CUDA=on: {reason}")
                print(f"pgolf: {reason}; building without CUDA", file=sys.stderr)
        else:
            reason = "PGOLF_CUDA=off" if mode == "off" else NO_NVCC
        try:
            self.build_with(f"-DPGOLF_CUDA_REASON={reason}", cuda=False)
        except BuildFailed as error:
            sys.exit(f"pgolf: csrc/ does not build: {error}")

    def build_with(self, *options: str, cuda: bool) -> None:
        """One configure and build; the second, after a failed CUDA half, finds the first one's objects."""
        import pybind11

        extension = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve()
        folder = Path(self.build_temp).resolve()
        self.run_tool(
            "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={extension.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPGOLF_SOURCES={SOURCES['native_digest'](ROOT)}",
            f"-DPGOLF_VERSION={self.distribution.get_version()}",
            f"-DPGOLF_CUDA={'ON' if cuda else 'OFF'}",
            *options,
        )  # fmt: skip
        self.run_tool("cmake", "--build", folder)

    def run_tool(self, name: str, *arguments: object) -> None:
        done = subprocess.run(
            [find_tool(name), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout, flush=True)
        if done.returncode:
            raise BuildFailed(first_error(done.stdout))


class BuildWithSources(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "pgolf" / SOURCES["SHIPPED"]
        shutil.rmtree(target, ignore_errors=True)
        for name in SOURCES["shipped_files"](ROOT):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(ROOT / name), str(target / name))


def find_tool(name: str) -> str:
    found = shutil.which(name)
    if not found:
        sys.exit(f"pgolf: {name} is not in PATH; pip brings it by itself unless --no-build-isolation is given")
    return found


cuda_mode(), cuda_archs()  # a wrong value ends the build before anything is done
setup(
    packages=[*find_packages(str(ROOT), include=["pgolf", "pgolf.*"]), "pgolf.triton_kernels"],
    package_dir={"pgolf.triton_kernels": "triton_kernels"},
    ext_modules=[Extension("pgolf._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildWithSources},
)
