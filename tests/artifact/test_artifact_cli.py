"""`pgolf artifact`: what show, verify and compare print, and one line for what they cannot read."""

import json
import stat
import sys

import pytest
import torch
from hostile_artifacts import GOOD, S, W, sign

from pgolf.artifact import StoredTensor, read_artifact, write_artifact
from pgolf.artifact.compressors import CODECS
from pgolf.cli import main

ROWS = 24  # of the bank's matrices


@pytest.fixture
def path(tmp_path):
    generator = torch.Generator().manual_seed(0)
    bank = (torch.randn(2, ROWS, 40, generator=generator) * 2.4).round().to(torch.int8)
    path = (torch.randn(ROWS, 40, generator=generator) * 2.4).round().to(torch.int8)
    tensors = [
        StoredTensor("bank", "mlp", (2, ROWS, 40), bank, torch.rand(2, ROWS, generator=generator).half(), 6),
        StoredTensor("path", "mlp", (ROWS, 40), path, torch.rand(ROWS, generator=generator).half(), 6,
                     torch.randint(0, 4, (40,), generator=generator).to(torch.int8), 8),
        StoredTensor("gain", "control", (30,), torch.rand(30, generator=generator).half(), None, 16),
    ]  # fmt: skip
    write_artifact(tmp_path / "model.pgolf", tensors, {"note": "made up"})
    return tmp_path / "model.pgolf"


def test_show_adds_up(path, capsys):
    assert main(["artifact", "show", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    streams = {row["stream"]: row for row in result["streams"]}
    assert list(streams) == ["bank:values", "path:values", "mlp:scales", "mlp:orders", "control:floats"]
    assert sum(row["bytes"] for row in streams.values()) + result["container_bytes"] == path.stat().st_size
    assert {name: (row["values"], row["bits"]) for name, row in streams.items()} == {
        "bank:values": (2 * ROWS * 40, 6),
        "path:values": (ROWS * 40, 6),
        "mlp:scales": (3 * ROWS, 16),
        "mlp:orders": (40, 2),
        "control:floats": (30, 16),
    }
    assert result["weights"] == 3 * ROWS * 40 + 30
    assert streams["bank:values"]["bits_per_value"] == 8 * streams["bank:values"]["bytes"] / (2 * ROWS * 40)
    assert main(["artifact", "show", str(path.parent)]) == 0  # a run's folder
    text = capsys.readouterr().out
    for word in ("bank:values", "mlp:orders", "2x24x40", "container", "100.00%", f"{path.stat().st_size:,}", "trellis"):
        assert word in text


def test_verify_tells_a_sound_file_from_others(path, capsys):
    assert main(["artifact", "verify", str(path)]) == 0
    assert "sound: version 3" in capsys.readouterr().out
    assert main(["artifact", "verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] == 3
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    model_of_nothing = path.with_name("model_of_nothing.pgolf")
    model_of_nothing.write_bytes(sign({**GOOD, "metadata": {"model": {}}}, (W, S)))
    old = path.with_name("old.pgolf")
    old.write_bytes(sign(GOOD, (W, S), version=2))
    for wrong, said in (
        (path, "checksum of stream control:floats"),
        (model_of_nothing, "does not describe a model"),
        (old, "version 2; this build reads version 3"),
        (path.with_name("missing"), "no artifact there"),
    ):
        assert main(["artifact", "verify", str(wrong)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("pgolf: ")
        assert error.count("\n") == 1
        assert said in error


FAKE_LRZIP = """#!{python}
import sys, zlib
arguments = sys.argv[1:]
source, target = open(arguments[-1], "rb").read(), arguments[arguments.index("-o") + 1]
open(target, "wb").write(zlib.decompress(source) if "-d" in arguments else zlib.compress(source))
"""


def test_compare_names_every_compressor(path, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["artifact", "compare", str(path)]) == 0
    text = capsys.readouterr().out
    for name in ("pgolf mix", "pgolf static", *CODECS, "lrzip is not installed"):
        assert name in text
    program = tmp_path / "lrzip"
    program.write_text(FAKE_LRZIP.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert main(["artifact", "compare", str(path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["missing"] is None
    rows = {row["compressor"]: row for row in result["results"]}
    assert set(rows) == {"pgolf mix", "pgolf static", *CODECS, "record: rows sorted, lrzip -z"}
    assert all(row["bits_per_weight"] == 8 * row["bytes"] / result["weights"] for row in rows.values())
    assert abs(rows["pgolf mix"]["bytes"] - path.stat().st_size) < 30  # the note
    program.write_text(f"#!{sys.executable}\nraise SystemExit('broken')\n")
    assert main(["artifact", "compare", str(path)]) == 2
    assert "lrzip" in capsys.readouterr().err


def test_nothing_can_be_shown_and_compared(tmp_path, capsys):
    path = tmp_path / "empty.pgolf"
    write_artifact(path, [], {})
    assert read_artifact(path).tensors == {}
    for command in ("show", "verify", "compare"):
        assert main(["artifact", command, str(path)]) == 0
    assert "nan" not in capsys.readouterr().out
