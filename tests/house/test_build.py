"""setup.py: its settings, and what becomes of a build whose CUDA half cannot work."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf.runtime import host

setuptools = pytest.importorskip("setuptools", "77", reason="building needs setuptools 77 or newer")
ROOT = Path(__file__).resolve().parents[2]


def missing_tools() -> str:
    """What a build without pip's isolation lacks here; "" when nothing."""
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed"
    for name, version in (("cmake", (3, 26)), ("ninja", (1, 0))):
        if not shutil.which(name):
            return f"{name} is not in PATH"
        text = subprocess.run([name, "--version"], capture_output=True, text=True).stdout.split()
        found = next(word for word in text if word[0].isdigit())
        if tuple(map(int, found.split(".")[:2])) < version:
            return f"{name} is {found}, needed is {version[0]}.{version[1]} or newer"
    return ""


needs_tools = pytest.mark.skipif(bool(missing_tools()), reason=f"a build by hand: {missing_tools()}")


@pytest.fixture
def build(tmp_path):
    """Builds the extension into a temporary folder with the given environment variables added."""

    def run(**variables: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "setup.py", "-q", "build_ext"]
        command += ["--build-temp", str(tmp_path / "objects"), "--build-lib", str(tmp_path / "library")]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PGOLF_", "CUDA"))}
        return subprocess.run(command, cwd=ROOT, env={**clean, **variables}, capture_output=True, text=True)

    return run


@pytest.fixture
def broken_nvcc(tmp_path):
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    return script


@pytest.fixture
def functions(monkeypatch):
    """The functions of setup.py, without a build."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PGOLF_CUDA": "maybe"}, "PGOLF_CUDA=maybe: accepted are auto, on and off"),
        (
            {"PGOLF_CUDA_ARCHS": "90a,hopper"},
            "PGOLF_CUDA_ARCHS: 'hopper' is no architecture; accepted are numbers like 90a or 100",
        ),
    ],
)
def test_wrong_settings_end_the_build_in_one_line(build, variables, message):
    done = build(**variables)
    assert done.returncode == 1
    assert done.stderr.strip() == message


@needs_tools
def test_broken_nvcc_leaves_a_working_cpu_build(build, broken_nvcc, tmp_path):
    done = build(PATH=f"{broken_nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("pgolf: ")]
    assert len(told) == 1
    assert told[0].startswith(f"pgolf: the CUDA half failed with {broken_nvcc}: ")
    assert told[0].endswith("; building without CUDA")

    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
source, target = bytearray(range(8)), bytearray(6)
address = lambda data: __import__("ctypes").addressof(__import__("ctypes").c_char.from_buffer(data))
native.pack_bits(address(source), address(target), 8, 6)
assert int.from_bytes(target, "little") == sum(i << 6 * i for i in range(8)), target
info = native.build_info()
assert not info["cuda"] and not hasattr(native, "pack_bits_cuda")
print(info["cuda_reason"])
"""
    (library,) = (tmp_path / "library" / "pgolf").iterdir()
    loaded = subprocess.run([sys.executable, "-c", script, str(library)], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert f"pgolf: {loaded.stdout.strip()}; building without CUDA" == told[0]


@needs_tools
def test_broken_nvcc_is_an_error_when_cuda_is_asked_for(build, broken_nvcc, tmp_path):
    done = build(PGOLF_CUDA="on", CUDACXX=str(broken_nvcc))
    assert done.returncode == 1
    assert last_line(done.stderr).startswith(f"PGOLF_CUDA=on: the CUDA half failed with {broken_nvcc}: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "library").exists() or not any((tmp_path / "library").rglob("*.so"))


@needs_tools
def test_missing_nvcc_is_an_error_when_cuda_is_asked_for(build, tmp_path):
    done = build(PGOLF_CUDA="on", CUDACXX=str(tmp_path / "nvcc"))
    assert done.returncode == 1
    assert last_line(done.stderr).startswith("PGOLF_CUDA=on: nvcc was not found")


def test_nvcc_is_looked_for_in_order(broken_nvcc, monkeypatch):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", str(broken_nvcc.parent))
    assert host.find_nvcc() == str(broken_nvcc)
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")  # an explicit choice is not replaced by another
    assert host.find_nvcc() is None


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("[1/3] g++ a.cpp\na.cpp:3:1: error: no x\nninja: stopped", "a.cpp:3:1: error: no x"),
        ("CMake Error at a.cmake:5 (message):\n  The CUDA compiler\n\n    \"/bin/nvcc\"\n\n  is not able to work.\n\n"
         "  It fails with:\n    nvcc fatal   : Unsupported gpu architecture 'compute_10'\n",
         "nvcc fatal : Unsupported gpu architecture 'compute_10'"),
        ("CMake Error at a.cmake:5 (message):\n  The CUDA compiler\n\n    \"/bin/nvcc\"\n\n  is not able to work.\n",
         "The CUDA compiler '/bin/nvcc' is not able to work."),
        ("CMake Error at a.cmake:5 (message):\n  No library.\nCall Stack (most recent call first):\n  b.cmake\n",
         "No library."),
        ("killed\n", "killed"),
        ("", "no output"),
    ],
)  # fmt: skip
def test_the_cause_is_found_in_a_builds_output(functions, output, reason):
    assert functions["first_error"](output) == reason


def test_the_reason_fits_a_line_and_a_string(functions):
    reason = functions["first_error"]('error: "a\\b" ‘c’ ' + "x" * 1000)
    assert reason.startswith("error: 'a'b' 'c' x")
    assert len(reason) == 200


@pytest.mark.parametrize(("text", "archs"), [("", "90a"), ("90a", "90a"), ("80; 90a,100f", "80 90a 100f")])
def test_architectures(functions, monkeypatch, text, archs):
    monkeypatch.setenv("PGOLF_CUDA_ARCHS", text)
    assert functions["cuda_archs"]() == archs


def test_csrc_needs_neither_torch_nor_python():
    for path in (ROOT / "csrc").rglob("*.*"):
        included = re.findall(r"#\s*include\s*[<\"]([^>\"]+)", path.read_text())
        assert not [name for name in included if re.match(r"(torch|ATen|c10|triton)/", name)], path.name
        if not path.stem.endswith("bindings"):
            assert not [name for name in included if re.match(r"pybind11/|Python\.h", name)], path.name


def test_no_build_is_tied_to_the_machine_that_makes_it():
    text = (ROOT / "setup.py").read_text() + (ROOT / "CMakeLists.txt").read_text()
    assert not re.search(r"march|mtune|mcpu|-mavx|-mbmi", text)
