"""The counted code: all that a run needs, nothing that it does not, and it runs when unpacked."""

import ast
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import pgolf
from pgolf import packed_code

PACKAGE = Path(pgolf.__file__).parent


def test_what_takes_part_and_what_does_not():
    names = set(packed_code.code_files())
    assert {
        *("train_gpt.py", "setup.py", "pyproject.toml", "CMakeLists.txt", "csrc/coder.cpp", "csrc/pack_bits.cu"),
        *(
            "pgolf/quantize.py",
            "pgolf/ops/gptq.py",
            "pgolf/report.html",
            "pgolf/data/loader.py",
            "pgolf/packed_code.py",
        ),
        *("triton_kernels/newton_schulz.py", "pgolf/__init__.py", "pgolf/ops/__init__.py", "pgolf/low_rank.py"),
    } <= names
    assert not [name for name in names if name.startswith(("tests", "bench")) or name.endswith((".md", ".so"))]
    assert not {"pgolf/cli/__init__.py", "pgolf/doctor.py", "pgolf/data/download.py", "pgolf/compressors.py"} & names


def test_the_archive_is_deterministic_and_counted():
    data = packed_code.pack_code()
    packed_code.pack_code.cache_clear()
    assert packed_code.pack_code() == data
    assert packed_code.code_bytes() == len(data)
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as archive:
        members = archive.getmembers()
    assert {member.name for member in members} == set(packed_code.code_files())
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}
    assert len(data) < 0.3 * packed_code.raw_code_bytes()


def test_the_unpacked_archive_runs(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed_code.pack_code()))) as archive:
        archive.extractall(tmp_path)
    for built in PACKAGE.glob("_native*"):  # what the sources in the archive would be built to
        shutil.copy(built, tmp_path / "pgolf")
    (tmp_path / "pgolf" / "triton_kernels").symlink_to(tmp_path / "triton_kernels")  # as setup.py installs them
    program = """
import torch, pgolf, train_gpt
from pgolf.ops import pack_bits
from pgolf.settings import load_settings
from pgolf.size import gaussian_bytes
print(pgolf.__file__, train_gpt.__file__, sum(gaussian_bytes(load_settings({"PRESET": "demo"})).values()))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0].startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Doc."""\nx = 1  # one\n', "x = 1\n"),
        ('def f():\n    """Doc."""\n', "def f():\n    pass\n"),
        ('class A:\n    """Doc."""\n    b = "kept"\n', "class A:\n    b = 'kept'\n"),
        ('def f():\n    return """kept"""\n', "def f():\n    return 'kept'\n"),
    ],
)
def test_minified(source, expected):
    assert packed_code.minified(source) == expected
    assert ast.dump(ast.parse(packed_code.minified(expected))) == ast.dump(ast.parse(expected))
