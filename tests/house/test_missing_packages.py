"""What runs without brotli, zstandard, tqdm, jinja2, matplotlib, or pgolf itself installed, as on a bare GPU machine.

And what is said of them where they are needed.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
HIDE = "import sys\nsys.modules.update(dict.fromkeys({names!r}))\n"


def python(code: str, *hidden: str, arguments: tuple[str, ...] = (), status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", HIDE.format(names=hidden) + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, timeout=200)
    assert done.returncode == status, done.stderr
    return done


def test_training_and_scoring_run_without_them(tmp_path):
    code = """
from pathlib import Path
import torch
import pgolf.artifact.compressors, pgolf.artifact.model, pgolf.data.dataset
from pgolf.artifact import StoredTensor, write_artifact
from pgolf.errors import NotInstalledError
from pgolf.evaluation.scoring import evaluate
from small_trainer import make_trainer

trainer = make_trainer(Path(sys.argv[1]))
trainer.take_step(0.1)
tokens = torch.arange(200, dtype=torch.int32) % 7
lengths = torch.ones(200, dtype=torch.int64)
print(evaluate(trainer.model, tokens, lengths, seq_len=16, batch_tokens=128, ranks=trainer.ranks).tokens)
try:
    write_artifact(Path(sys.argv[1]) / "a.pgolf", [], {})
except NotInstalledError as error:
    print(error)
"""
    hidden = ("brotli", "zstandard", "tqdm", "jinja2", "matplotlib")
    told = python(code, *hidden, arguments=(str(tmp_path),)).stdout.splitlines()
    needed = "the artifact's manifest needs brotli"
    assert told == ["199", f"{needed}, which is not installed for {sys.executable}; run: pip install brotli"]


@pytest.mark.parametrize(
    ("hidden", "arguments", "said"),
    [
        ("pydantic", ("settings",), "pgolf.settings needs pydantic"),
        ("pydantic_core", ("settings",), "pgolf.settings needs pydantic_core"),
    ],
)
def test_a_command_that_needs_them_says_so_in_one_line(hidden, arguments, said):
    code = "from pgolf.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = python(code, hidden, arguments=arguments, status=2)
    assert done.stderr == f"pgolf: {said}, which is not installed for {sys.executable}; run: pip install {hidden}\n"
    assert done.stdout == ""


IN_PLACE = """
import torch
import pgolf
from pgolf import ops
from pgolf.triton_kernels import variants

weight = torch.tensor([[1, -2, 3]], dtype=torch.int8)
packed = ops.pack_bits(weight, 3)
assert torch.equal(ops.unpack_bits(packed, 3, (1, 3)), weight)
assert ops.newton_schulz(torch.randn(4, 6)).shape == (4, 6)
print(pgolf.__file__)
print(variants.__file__)
print(ops.available()["pack_bits"]["native"].reason)
print(ops.available()["pack_bits"]["native"].mend)
"""


@pytest.mark.parametrize("linked", [True, False])
def test_what_was_never_installed_runs(tmp_path, linked):
    """A checkout by PYTHONPATH alone, two folders of it with a link between them. -S: no installation is seen."""
    pytest.importorskip("triton")
    folder = tmp_path / "checkout"
    leave = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels")
    shutil.copytree(ROOT / "pgolf", folder / "pgolf", ignore=leave)
    shutil.copytree(ROOT / "triton_kernels", folder / "triton_kernels", ignore=leave)
    if linked:
        (folder / "pgolf" / "triton_kernels").symlink_to("../triton_kernels")
    else:
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", folder)
    modules = map(importlib.import_module, ("torch", "numpy", "triton"))
    places = {str(Path(module.__file__).parents[1]) for module in modules}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), *places))}
    command = [sys.executable, "-S", "-c", IN_PLACE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    package, kernels, reason, mend = done.stdout.splitlines()
    assert Path(package) == folder / "pgolf" / "__init__.py"
    assert Path(kernels).resolve() == folder / "triton_kernels" / "variants.py"
    assert reason
    assert mend == "build it with: pip install -e ."
