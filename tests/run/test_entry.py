"""How `train_gpt.py` and `pgolf` begin and end: at once where they can, and with one line for what stops them."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf.errors import MOST_LETTERS, DataError, Interrupted, PgolfError, UserError, complain, one_line
from pgolf.ops import backends
from pgolf.quantization.quantizers import OPERATIONS, QUANTIZERS
from pgolf.run.entry import ending

ROOT = Path(__file__).parents[2]
SCRIPT = [str(ROOT / "train_gpt.py")]
COMMAND = ["-m", "pgolf"]


def run(
    arguments: list[str], folder: Path, torch_is: str = "raise ImportError('nothing here may need torch')", **kwargs
) -> subprocess.CompletedProcess:
    """Run Python with a module `torch` of our own."""
    (folder / "torch.py").write_text(torch_is, encoding="utf-8")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), **kwargs.pop("environ", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.run([sys.executable, *arguments], env=environ, cwd=folder, text=True, timeout=100, **pipes)


def test_help_is_usage_and_needs_no_torch(tmp_path):
    result = run([*SCRIPT, "--help"], tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: python train_gpt.py [-h] [NAME=value ...]\n")
    assert "PRESET=name" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["SEED=x"], {}, "SEED=x: must be a valid integer"),
        ([], {"RESUME": "x", "DATA_PATH": b"a\xff\x1b[2J"}, "DATA_PATH=a\\udcff\\x1b[2J: must be"),
    ],
)
def test_a_wrong_setting_is_refused_before_torch_is_imported(tmp_path, arguments, environ, message):
    environ = {os.fsencode(name): os.fsencode(value) for name, value in environ.items()}
    (tmp_path / "torch.py").write_text("raise ImportError('not yet')", encoding="utf-8")
    path = os.fsencode(os.pathsep.join((str(tmp_path), str(ROOT))))
    result = subprocess.run(
        [sys.executable, *SCRIPT, *arguments],
        env={**os.environb, b"PYTHONPATH": path, **environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"train_gpt.py: {message}")
    assert result.stderr.count("\n") == 1


INTERRUPT = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"


@pytest.mark.parametrize(
    ("arguments", "module"),
    [(SCRIPT, "torch"), ([*COMMAND, "size"], "torch"), (SCRIPT, "shlex"), ([*COMMAND, "size"], "argparse")],
)
def test_an_interrupt_while_something_is_imported_ends_without_a_word(tmp_path, arguments, module):
    """shlex and argparse are the first of all."""
    (tmp_path / f"{module}.py").write_text(INTERRUPT, encoding="utf-8")
    result = run(
        arguments, tmp_path, INTERRUPT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_an_interrupt_while_python_ends_is_no_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal\natexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))", encoding="utf-8"
    )
    result = run([*COMMAND, "presets"], tmp_path)
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_help_of_the_command_imports_nothing_heavy(tmp_path):
    look = (
        "import sys, pgolf.cli\n"
        "try: pgolf.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'numpy', 'pydantic', 'matplotlib', 'jinja2'} & set(sys.modules))"
    )
    result = run(["-c", look], tmp_path)
    assert result.stdout.endswith("\nset()\n"), result.stdout + result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
@pytest.mark.parametrize("arguments", [[*COMMAND, "settings"], [*COMMAND, "--help"], [*SCRIPT, "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(tmp_path, arguments, unbuffered):
    with open("/dev/full", "w", encoding="utf-8") as full:
        result = run(arguments, tmp_path, stdout=full, environ={"PYTHONUNBUFFERED": unbuffered})
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "No space left on device" in result.stderr


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        result = run([*COMMAND, "settings"], tmp_path, stdout=closed)
    assert (result.returncode, result.stderr) == (0, "")


def test_messages_are_one_short_line_without_control_characters(capsys):
    def work():
        raise DataError("first\nsecond \x1b[31m\x9b\x7f\u202e \udcff end")

    assert ending("pgolf", work) == 2
    assert capsys.readouterr().err == "pgolf: first\\nsecond \\x1b[31m\\x9b\\x7f\\u202e \\udcff end\n"
    assert complain("pgolf", "x" * 5000) == 2
    assert len(capsys.readouterr().err) == MOST_LETTERS + 1
    long = one_line(f"start {'x' * 5000} end")
    assert len(long) == MOST_LETTERS
    assert (long[:5], long[-3:]) == ("start", "end")
    assert one_line("ü € 漢") == "ü € 漢"


def test_every_end_has_its_status(monkeypatch):
    def raising(error):
        def work():
            raise error

        return ending("pgolf", work)

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert ending("pgolf", lambda: 1) == 1
    assert raising(UserError("x")) == raising(OSError(28, "full")) == raising(FileNotFoundError(2, "no", "name")) == 2
    assert raising(BrokenPipeError(32, "cut")) == 2  # of a training whose log nobody reads any more
    assert raising(KeyboardInterrupt()) == 130
    assert raising(Interrupted(signal.SIGINT)) == 130
    assert raising(Interrupted()) == 143
    assert raising(MemoryError()) == raising(torch.OutOfMemoryError("CUDA")) == 2
    for error in (ZeroDivisionError(), RuntimeError("a bug")):
        with pytest.raises(type(error)):
            raising(error)


def test_a_backend_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("PGOLF_BACKEND", "foo\x1b")
    with pytest.raises(UserError, match=r"PGOLF_BACKEND=foo\\x1b: no such backend; accepted are reference, native"):
        backends.check_environment([], "cpu")


def test_a_backend_that_a_run_cannot_finish_with_is_refused_before_it_begins(monkeypatch):
    monkeypatch.setenv("PGOLF_BACKEND", "reference")
    assert OPERATIONS.keys() == QUANTIZERS.keys()
    for operations in OPERATIONS.values():
        backends.check_environment(operations, "cpu")
    monkeypatch.setenv("PGOLF_BACKEND", "triton")
    with pytest.raises(PgolfError, match="PGOLF_BACKEND=triton: trellis_quantize has no triton kernel"):
        backends.check_environment(OPERATIONS["trellis"], "cpu")
    with pytest.raises(PgolfError, match="PGOLF_BACKEND=triton: triton needs a CUDA device"):
        backends.check_environment(OPERATIONS["rtn"], "cpu")  # where a run on a GPU unpacks its weights, too


def test_the_choice_of_a_backend_is_marked_as_the_compiler_marks_constants():
    assert vars(torch.compiler.assume_constant_result(lambda: 0)).items() <= vars(backends._choose).items()
