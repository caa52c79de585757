"""The counted code: all that a run needs, nothing that it does not, and it runs when unpacked."""

import ast
import io
import lzma
import os
import subprocess
import sys
import tarfile

import pytest

from pgolf.artifact import packed_code
from pgolf.artifact.minify import minified


def test_what_takes_part_and_what_does_not():
    names = set(packed_code.code_files())
    assert {
        *(
            "train_gpt.py",
            "setup.py",
            "pyproject.toml",
            "CMakeLists.txt",
            "csrc/coder/coder.cpp",
            "csrc/pack/pack_bits.cu",
        ),
        *(
            "pgolf/quantization/quantize.py",
            "pgolf/ops/gptq.py",
            "pgolf/run/report.html",
            "pgolf/data/loader.py",
            "pgolf/artifact/packed_code.py",
        ),
        *(
            "triton_kernels/newton_schulz.py",
            "pgolf/__init__.py",
            "pgolf/ops/__init__.py",
            "pgolf/quantization/low_rank.py",
        ),
    } <= names
    assert not [name for name in names if name.startswith(("tests", "bench")) or name.endswith((".md", ".so"))]
    assert (
        not {
            "pgolf/cli/__init__.py",
            "pgolf/runtime/doctor.py",
            "pgolf/data/download.py",
            "pgolf/artifact/compressors.py",
        }
        & names
    )


def test_the_archive_is_deterministic_and_counted():
    data = packed_code.pack_code()
    assert packed_code.tar_code() == packed_code.tar_code() == lzma.decompress(data)
    assert packed_code.code_bytes() == len(data)
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data))) as archive:
        members = archive.getmembers()
    assert {member.name for member in members} == set(packed_code.code_files())
    assert {(member.mtime, member.uid, member.uname, member.mode) for member in members} == {(0, 0, "", 0o644)}
    assert len(data) < 0.3 * packed_code.raw_code_bytes()


def test_the_unpacked_archive_runs(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(packed_code.tar_code())) as archive:
        archive.extractall(tmp_path)
    program = """
import torch, pgolf, train_gpt
from pgolf.ops import pack_bits
from pgolf.settings import load_settings
from pgolf.quantization.size import projected_size
size = projected_size(load_settings({"PRESET": "demo"}))
print(pgolf.__file__, train_gpt.__file__, size["projected_bytes_at_clip_sigmas"])
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
        ('"""Doc."""; x = 1\n', "pass; x = 1\n"),
        ('"in " "two"\nx = 1\n', "x = 1\n"),
        ('def f():\n    """Doc."""\n', "def f():\n pass\n"),
        ('class A:\n    """Doc."""\n\n    # c\n    b = "kept"\n', 'class A:\n b = "kept"\n'),
        ('def f():\n    return """kept\n\n  # too"""\n', 'def f():\n return """kept\n\n  # too"""\n'),
        ("x = f(\n    1,  # one\n    [\n        2\n    ],\n)\n", "x = f(1, [2],)\n"),
        ('if a:\n    é = f"{{x}} {y!r:>{w}}  #"  # ä\n', 'if a:\n é = f"{{x}} {y!r:>{w}}  #"\n'),
        ('x = """ä"""; y = a + \\\n    b\n', 'x = """ä"""; y = a + b\n'),
    ],
)
def test_minified(source, expected):
    assert minified(source) == expected
    assert minified(expected) == expected or "pass; " in expected


def test_minified_files_are_the_same_programs():
    for name, path in packed_code.code_files().items():
        if path.suffix == ".py":
            source = path.read_text(encoding="utf-8")
            short = minified(source)
            assert ast.dump(ast.parse(short)) == ast.dump(without_docstrings(source)), name
            assert minified(short) == short, name  # what an unpacked archive counts


def without_docstrings(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
