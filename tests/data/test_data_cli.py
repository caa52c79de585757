import argparse
import json
import os
import shlex
import shutil
import subprocess

import pytest

from pgolf.cli import data as cli
from pgolf.data.download import VARIANTS
from pgolf.data.prepare import DataPaths
from pgolf.data.shards import write_shard
from pgolf.data.texts import FORMATS, JSONL_SUFFIXES, TEXT_SUFFIXES
from pgolf.errors import DataError
from pgolf.presets import FINEWEB


def run(*words: str) -> int:
    parser = argparse.ArgumentParser(prog="pgolf")
    cli.add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["data", *map(str, words)])
    return arguments.run(arguments)


def test_demo_tells_what_to_set(demo, capsys):
    assert run("demo", "--root", demo.data_path.parent.parent) == 0
    printed = capsys.readouterr().out
    assert printed == f"DATA_PATH={demo.data_path} TOKENIZER_PATH={demo.tokenizer_path} VOCAB_SIZE=1024\n"


def test_tokenize_then_inspect(tmp_path, demo, capsys):
    (tmp_path / "a.txt").write_text("Some words to learn from.\n\n" * 2000)
    (tmp_path / "b.txt").write_text("".join(f"Line {i} of another text.\n" for i in range(2000)))
    assert run("tokenize", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "o", "--vocab-size", 330) == 0
    assert f"DATA_PATH={tmp_path / 'o'} " in capsys.readouterr().out
    assert run("inspect", tmp_path / "o") == 0
    printed = capsys.readouterr().out
    assert "330 pieces" in printed
    assert "problem" not in printed
    assert run("tokenize", tmp_path / "b.txt", "--out", tmp_path / "p", "--tokenizer", demo.tokenizer_path) == 0
    assert "VOCAB_SIZE=1024" in capsys.readouterr().out


def test_the_line_is_what_a_shell_takes(tmp_path, capsys):
    folder = tmp_path / "it's my text"
    folder.mkdir()
    for name in "ab":
        text = f"Some words to learn from {name}.\n\n" * 1000
        (folder / f"{name}.txt").write_text(text + "Line of another text.\n" * 99)
    assert run("tokenize", folder, "--out", folder / "o $HOME", "--vocab-size", 330) == 0
    words = shlex.split(capsys.readouterr().out)
    model = folder / "o $HOME" / "o $HOME_330_bpe.model"
    assert words == [f"DATA_PATH={folder / 'o $HOME'}", f"TOKENIZER_PATH={model}", "VOCAB_SIZE=330"]
    assert model.is_file()


def test_names_that_a_terminal_would_obey_are_written_out(tmp_path, demo, capsys):
    folder = tmp_path / "\x1b[31m\udcff"
    folder.mkdir()
    write_shard(folder / "x\x1b]0;title\x07_train_000000.bin", [7, 5, 6])
    assert run("inspect", folder) == 1
    printed = capsys.readouterr().out
    assert "\\x1b[31m\\udcff" in printed
    assert printed.replace("\n", "").isprintable()
    model = shutil.copyfile(demo.tokenizer_path, folder / "x.model")
    cli._tell(DataPaths(folder, model))
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed.isprintable()
    shell = subprocess.run(["bash", "-c", f"{printed} printenv DATA_PATH"], capture_output=True, timeout=20)
    assert os.fsdecode(shell.stdout).rstrip("\n") == str(folder)


def test_the_help_names_every_suffix(capsys):
    with pytest.raises(SystemExit):
        run("tokenize", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{suffix}" in printed for suffix in TEXT_SUFFIXES + JSONL_SUFFIXES)
    assert f"{{{','.join(FORMATS)}}}" in printed


def test_inspect_as_json_and_with_problems(tmp_path, capsys):
    write_shard(tmp_path / "x_train_000000.bin", [1, 5, 6])
    assert run("inspect", tmp_path, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["problems"] == [f"{tmp_path}: no val shards"]
    assert facts["splits"]["train"]["tokens"] == 3
    assert run("inspect", tmp_path) == 1
    printed = capsys.readouterr().out
    assert f"problem: {tmp_path}: no val shards" in printed
    assert "name it with --tokenizer" in printed
    with pytest.raises(DataError):
        run("inspect", tmp_path / "none")


def test_download_passes_what_was_asked_for(demo, monkeypatch, capsys):
    asked = []

    def download(variant, root, train_shards):
        asked.append((variant, root, train_shards))
        return DataPaths(demo.data_path, demo.tokenizer_path)

    monkeypatch.setattr("pgolf.data.download.download", download)
    assert list(FINEWEB) == list(VARIANTS), "what the command offers is what can be fetched"
    assert run("download", "--variant", "caseops", "--train-shards", "3", "--root", "x") == 0
    assert run("download") == 0
    assert asked == [("caseops", "x", 3), ("sp1024", "data", 80)]


@pytest.mark.parametrize("words", [[], ["tokenize", "a.txt"], ["download", "--variant", "sp4097"], ["inspect"]])
def test_wrong_commands_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
