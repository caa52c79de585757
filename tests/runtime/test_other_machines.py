"""What the native code computes must not depend on the machine: an Arm build, emulated, gives the bytes of this one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from native_drivers import native_source

ROOT = Path(__file__).parents[2]
DRIVER = ROOT / "tests" / "portable_driver.cpp"
SOURCES = (
    *("coder", "float_coder", "int_layout", "logistic", "match_rows", "mix_coder", "static_coder", "cpu_features"),
    *("hint_counts", "ngram_cache", "ngram_counts", "pack_bits", "trellis"),
)
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-w")  # the second as in CMakeLists.txt


def start_build(compiler: str, program: Path, *flags: str) -> subprocess.Popen:
    sources = [DRIVER, *map(native_source, SOURCES)]
    command = [compiler, *FLAGS, *flags, "-I", ROOT / "csrc", *sources, "-o", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(program: Path, *runner: str, **variables: str) -> dict[str, str]:
    command = [*runner, str(program)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


def test_an_arm_build_gives_the_same_bytes(tmp_path):
    if missing := [tool for tool in ("g++", "aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(tool)]:
        pytest.skip(f"g++, aarch64-linux-gnu-g++ and qemu-aarch64 are needed; missing here: {', '.join(missing)}")
    here, arm = tmp_path / "here", tmp_path / "arm"
    for build in (start_build("g++", here), start_build("aarch64-linux-gnu-g++", arm, "-static")):
        output, _ = build.communicate(timeout=280)
        assert build.returncode == 0, output
    expected = results(here)
    assert len(expected) > 30
    assert results(arm, "qemu-aarch64") == expected
    # an x86 CPU without fused products, as glibc may be told that this is one; elsewhere that changes nothing
    older = "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX2_Usable,-FMA_Usable"
    assert results(here, GLIBC_TUNABLES=older) == expected
