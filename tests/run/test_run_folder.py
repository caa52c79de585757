"""Who owns a run's folder: names that are taken, two processes at once, runs that were killed early."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf.errors import UserError
from pgolf.run.folder import claim, default_name, read_summary
from pgolf.runtime.files import Lines, WriteError


def test_a_name_is_made_from_time_preset_and_seed():
    assert default_name("demo", 7).endswith("-demo-s7")


def test_runs_of_one_second_get_names_of_their_own(tmp_path):
    folders = [claim(str(tmp_path), "", "now-demo-s7", resume=False) for _ in range(3)]
    assert [folder.path.name for folder in folders] == ["now-demo-s7", "now-demo-s7-2", "now-demo-s7-3"]
    folders[0].log.close()  # its end does not free the name
    assert claim(str(tmp_path), "", "now-demo-s7", resume=False).path.name == "now-demo-s7-4"


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_at_work_is_left_alone(tmp_path, resume):
    first = claim(str(tmp_path), "one", "", resume=False)
    (first.path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="RUN_ID=one: a run is at work in"):
        claim(str(tmp_path), "one", "", resume=resume)
    assert first.path.exists()
    first.log.close()
    assert claim(str(tmp_path), "one", "", resume=True).path == first.path


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    code = (
        "import sys; from pgolf.runtime.files import Lines\n"
        f"log = Lines({str(tmp_path / 'one' / 'train.log')!r}); print(log.lock(), flush=True); sys.stdin.read()"
    )
    (tmp_path / "one").mkdir()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        with pytest.raises(UserError, match="a run is at work"):
            claim(str(tmp_path), "one", "", resume=False)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert claim(str(tmp_path), "one", "", resume=False).path == tmp_path / "one"


LEFT = {"settings.json": "{}", "train.log": "step:1\n", "metrics.jsonl": "{}\n", "report.html": "", ".x.tmp": "torn"}


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
    path = tmp_path / "one"
    path.mkdir()
    for name, content in LEFT.items():
        (path / name).write_text(content)
    (path / "notes.txt").write_text("the user's own")
    folder = claim(str(tmp_path), "one", "", resume=False)
    assert sorted(entry.name for entry in path.iterdir()) == ["notes.txt", "train.log"]
    assert folder.notice == f"{path}: a run of this name ended before its first checkpoint; it begins again"
    folder.log.add("step:2")
    assert (path / "train.log").read_text() == "step:1\nstep:2\n"


@pytest.mark.parametrize("killed_before", range(5))
def test_a_run_killed_while_it_clears_another_leaves_nothing_of_that(tmp_path, monkeypatch, killed_before):
    path = tmp_path / "one"
    path.mkdir()
    for name, content in LEFT.items():
        (path / name).write_text(content)
    unlink, calls = Path.unlink, itertools.count()

    def killed(self, missing_ok=False):
        if next(calls) == killed_before:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        claim(str(tmp_path), "one", "", resume=False)
    monkeypatch.undo()
    claim(str(tmp_path), "one", "", resume=False)
    assert [entry.name for entry in path.iterdir()] == ["train.log"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoint.pt", ""),
        ("checkpoint.previous.pt", ""),
        ("model.pgolf", ""),
        ("summary.json", '{"aborted": true}'),
        ("summary.json", '{"diverged": true}'),
    ],
)
def test_a_run_that_left_something_keeps_its_name(name, content, tmp_path):
    path = tmp_path / "one"
    path.mkdir()
    for left, text in {**LEFT, name: content}.items():
        (path / left).write_text(text)
    with pytest.raises(UserError, match=r"RUN_ID=one: .* holds a run already"):
        claim(str(tmp_path), "one", "", resume=False)
    assert (path / "train.log").read_text() == "step:1\n"


def test_forgetting_takes_only_what_was_made(tmp_path):
    for name in ("one", ""):
        folder = claim(str(tmp_path / "new" / "runs"), name, "made", resume=False)
        folder.forget()
        assert not (tmp_path / "new").exists()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    claim(str(tmp_path), "theirs", "", resume=False).forget()
    assert theirs.exists()


def test_a_line_that_does_not_fit_leaves_nothing(tmp_path):
    lines = Lines(tmp_path / "log")
    lines.add("whole")

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 3

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            part, self.left = min(self.left, len(data)), 0
            if not part:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:part])

    file, lines.file = lines.file, Full(lines.file)
    with pytest.raises(WriteError, match=r"log: cannot be written \(No space left on device\)"):
        lines.add("torn")
    lines.file = file
    lines.add("whole too")
    assert (tmp_path / "log").read_text() == "whole\nwhole too\n"


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"seconds": ', "\udcff"])
def test_a_summary_that_is_none_says_nothing(tmp_path, text):
    (tmp_path / "summary.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert read_summary(tmp_path) == {}
