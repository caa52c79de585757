"""Whole runs of train_gpt.py: what they leave behind, alone and in two processes, interrupted and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pgolf.artifact import read_artifact
from pgolf.artifact.model import model_from_artifact
from pgolf.data.dataset import validation_split
from pgolf.data.tokenizer import Tokenizer, train_tokenizer
from pgolf.errors import Interrupted
from pgolf.evaluation.scoring import evaluate
from pgolf.model import Execution
from pgolf.run.record import SUMMARY_FIELDS, Run
from pgolf.runtime.ranks import Ranks
from pgolf.settings import load_settings

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_gpt.py"


def command(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable, str(SCRIPT)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", str(SCRIPT)]


def run_script(folder: Path, environ: dict[str, str], processes: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(processes),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OUT_DIR": str(folder), **environ},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_environ):
    """(folder, output) of one whole run."""
    folder = tmp_path_factory.mktemp("runs")
    result = run_script(folder, {**tiny_environ, "RUN_ID": "whole"})
    assert result.returncode == 0, result.stderr
    return folder / "whole", result.stdout


def test_summary_is_complete_and_adds_up(finished):
    folder, _ = finished
    summary = summary_of(folder)
    assert list(summary) == SUMMARY_FIELDS
    assert [name for name, value in summary.items() if value is None and name != "commit"] == []
    assert datetime.fromisoformat(summary["started_at"]).tzinfo is not None
    assert "train_gpt.py" in summary["command"]
    assert summary["threads"] == 1
    assert summary["cpu_level"].keys() == {"torch", "pgolf"}
    assert summary["checkpoints"] == 1  # at the end; it took no minute
    assert summary["artifact_bytes"] == (folder / "model.pgolf").stat().st_size
    assert summary["total_bytes"] == summary["artifact_bytes"] + summary["code_bytes"]
    assert sum(summary["bytes_by_role"].values()) == summary["budget_bytes"] == 16_000_000
    assert summary["fits_budget"] is True
    assert (summary["steps"], summary["tokens_seen"], summary["interrupted"]) == (6, 6 * 256, False)
    assert summary["wallclock_used_seconds"] >= summary["train_seconds"] > 0
    assert set(summary["compressors_bpb"]) == {"xz -9e", "brotli -11"}
    assert abs(summary["val_bpb_quantized"] - summary["val_bpb_float"]) < 0.05
    operations = {"trellis_quantize", "trellis_dequantize", "newton_schulz", "leaky_relu2_mlp"}
    assert operations <= summary["backends"].keys()


def test_the_size_is_known_when_the_rate_begins_to_fall(finished):
    folder, output = finished
    summary = summary_of(folder)
    # Of 16 kB; what does not grow with the model weighs most here.
    assert abs(summary["projected_artifact_bytes"] / summary["artifact_bytes"] - 1) < 0.05
    assert f"projected artifact:{summary['projected_artifact_bytes']} with code:" in output
    assert f"projected:{summary['projected_artifact_bytes']}, size prediction error " in output
    assert summary["code_bytes"] < summary["code_bytes_raw"] / 3


def test_a_run_over_budget_takes_larger_steps(finished, tmp_path, tiny_environ):
    plain = summary_of(finished[0])
    target = round(0.9 * plain["artifact_bytes"])
    budget = target + plain["code_bytes"]
    result = run_script(tmp_path, {**tiny_environ, "RUN_ID": "tight", "QUANTIZER": "gptq", "BUDGET_BYTES": str(budget)})
    assert result.returncode == 0, result.stderr
    summary = summary_of(tmp_path / "tight")
    assert 0.98 * target <= summary["artifact_bytes"] <= target  # 16 kB: a step's change moves more than 0.1% of it
    assert summary["fits_budget"] is True
    assert {"gptq", "unpack_dequantize"} <= summary["backends"].keys()
    assert "larger steps will be chosen" in result.stdout
    assert f"of {target} bytes: " in result.stdout
    assert " bytes over budget at the settings' steps; steps x" in result.stdout
    assert "nats a token by the model" in result.stdout


def test_every_promised_file_is_there_and_valid(finished):
    folder, output = finished
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["model_dim"] == 32
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert "step:6/6 train_loss:" in log
    assert "final_artifact_roundtrip_exact val_loss:" in output
    HTMLParser().feed((folder / "report.html").read_text(encoding="utf-8"))
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*"))


def test_the_artifact_holds_no_pickle_and_names_its_model(finished):
    folder, _ = finished
    artifact = read_artifact(folder / "model.pgolf")
    assert artifact.metadata["model"]["model_dim"] == 32
    content = (folder / "model.pgolf").read_bytes()
    for trace in (b"\x80\x02}", b"\x80\x04\x95", b"torch._utils", b"PK\x03\x04"):
        assert trace not in content


def test_a_stranger_gets_the_same_score(finished):
    folder, _ = finished
    result = subprocess.run(
        [sys.executable, "-m", "pgolf", "eval", str(folder), "--json", "--ngram", "adaptive"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    # The run scored in float32; `eval` takes what the machine is fastest at.
    again, summary = json.loads(result.stdout), summary_of(folder)
    assert again["val_bpb"] == pytest.approx(summary["val_bpb_quantized"], abs=2e-3)
    assert again["val_bpb_ngram"] == pytest.approx(summary["val_bpb_ngram"], abs=2e-3)


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory, tiny_environ):
    """The folders of one run by `torchrun --nnodes=2`, the first rank's first: two agents on this machine, which share
    no folder but the data's."""
    tmp_path = tmp_path_factory.mktemp("machines")
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # for a free port
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{server.port}"]
    options += ["--rdzv_conf=is_host=0", "--local_addr=127.0.0.1"]
    nodes = [tmp_path / name for name in ("a", "b")]
    processes = []
    for node in nodes:
        node.mkdir()
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT)],
                env={**os.environ, "PYTHONPATH": str(ROOT), **tiny_environ, "RUN_ID": "two", "EVAL_STRIDE": "32"},
                cwd=node,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return sorted((node / "runs" / "two" for node in nodes), key=lambda f: len(list(f.iterdir())), reverse=True)


def test_two_machines_give_the_score_of_one_process(finished, two_machines):
    first, other = two_machines
    assert [path.name for path in other.iterdir()] == ["model.pgolf"]  # sent to be scored
    assert (other / "model.pgolf").read_bytes() == (first / "model.pgolf").read_bytes()
    one, two = summary_of(finished[0]), summary_of(first)
    assert two["world_size"] == 2
    for name in ("val_bpb_float", "val_bpb_quantized", "val_bpb_ngram"):
        assert two[name] == pytest.approx(one[name], abs=1e-3)
    assert (two["val_tokens"], two["val_bytes"]) == (one["val_tokens"], one["val_bytes"])


def test_two_processes_score_an_artifact_as_one_does(two_machines, tiny_environ):
    artifact = read_artifact(two_machines[0] / "model.pgolf")
    tokenizer = Tokenizer(tiny_environ["TOKENIZER_PATH"])
    split = validation_split(tiny_environ["DATA_PATH"], tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there; the order of sums in a matrix product depends on it
    cpu = torch.device("cpu")
    model = model_from_artifact(artifact, Execution(), cpu)
    score = evaluate(model, *split, batch_tokens=256, ranks=Ranks(0, 1, cpu), **artifact.metadata["scoring"])
    torch.set_num_threads(threads)
    assert score.bpb == pytest.approx(summary_of(two_machines[0])["val_bpb_quantized"], abs=1e-9)


def test_a_run_that_begins_badly_ends_with_a_line_and_a_summary(tmp_path, tiny_environ, monkeypatch, capsys):
    folder = tmp_path / "runs" / "bad"
    environ = {"OUT_DIR": str(tmp_path / "runs"), "RUN_ID": "bad", "ABORT_STEP": "2", "ABORT_BPB": "0.5"}
    with pytest.raises(SystemExit) as end:
        run_here({**tiny_environ, **environ}, tmp_path, monkeypatch)
    assert end.value.code == 3
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"aborted: step 2: val_bpb \d\.\d{4} is above ABORT_BPB=0\.5", lines[-1])
    summary = summary_of(folder)
    assert (summary["aborted"], summary["steps"], summary["val_bpb_quantized"]) == (True, 2, None)
    assert summary["val_bpb_float"] > 0.5
    assert (folder / "report.html").exists()


def interrupt(folder: Path, environ: dict[str, str], number: int, after: str) -> tuple[int, str]:
    """Start a run in `folder`, signal it once its log has a line with `after`; exit status and output."""
    process = subprocess.Popen(
        command(1),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OUT_DIR": str(folder), **environ},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "cut" / "train.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and after in log.read_text(encoding="utf-8")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_can_be_resumed(tmp_path, tiny_environ, number):
    environ = {**tiny_environ, "RUN_ID": "cut", "ITERATIONS": "3000", "TRAIN_LOG_EVERY": "1"}
    status, output = interrupt(tmp_path, environ, number, after="step:3/")
    folder = tmp_path / "cut"
    assert status == 128 + number
    assert f"RESUME={folder}" in output
    summary = summary_of(folder)
    assert summary["interrupted"] is True
    assert summary["val_bpb_quantized"] is None
    assert (folder / "report.html").exists()

    changed = run_script(tmp_path, {"RESUME": str(folder), "SEED": "5"})
    assert (changed.returncode, changed.stderr.count("\n")) == (2, 1)
    assert "SEED=5" in changed.stderr

    # Its end is 3000 steps away: the second sitting is cut as well, some steps later than the first.
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(rows[-1])["step"]
    status, output = interrupt(tmp_path, {"RESUME": "cut", "OMP_NUM_THREADS": "1"}, number, after=f"step:{last + 3}/")
    assert status == 128 + number
    assert f"resumed: step:{last} " in output
    steps = [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_resuming_gives_what_an_uninterrupted_run_gives(finished, tmp_path, tiny_environ):
    """A run that was killed after its last step has its checkpoint; scoring again from there gives the same."""
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    (folder / "model.pgolf").unlink()
    (folder / "checkpoint.pt").rename(folder / "checkpoint.previous.pt")  # killed while it took its name, too
    result = run_script(tmp_path, {"RESUME": str(folder), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    before, after = summary_of(finished[0]), summary_of(folder)
    assert after["val_bpb_quantized"] == before["val_bpb_quantized"]
    assert (folder / "model.pgolf").read_bytes() == (finished[0] / "model.pgolf").read_bytes()
    for name in ("seconds", "train_seconds", "step_ms", "peak_memory_bytes", "started_at", "wallclock_used_seconds"):
        assert after[name] == before[name], name


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, tiny_environ):
    often = {"CHECKPOINT_MINUTES": "0.0005", "TRAIN_LOG_EVERY": "1", "ITERATIONS": "3000"}
    status, _ = interrupt(tmp_path, {**tiny_environ, "RUN_ID": "cut", **often}, signal.SIGKILL, after="checkpoint: ")
    assert status == -signal.SIGKILL
    folder = tmp_path / "cut"
    json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert not (folder / "model.pgolf").exists()
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)
    (folder / ".checkpoint.pt.cut.tmp").write_bytes(b"torn")
    status, output = interrupt(tmp_path, {"RESUME": "cut", "OMP_NUM_THREADS": "1"}, signal.SIGINT, after="resumed: ")
    assert status == 128 + signal.SIGINT
    assert int(output.partition("resumed: step:")[2].split()[0]) > 0
    assert not list(folder.glob(".*"))


BAD_INPUT = {
    "unknown preset": ({"PRESET": "huge"}, "PRESET=huge"),
    "not a number": ({"MODEL_DIM": "abc"}, "MODEL_DIM=abc"),
    "near name": ({"SEDD": "1"}, "SEDD=1"),
    "no such data": ({"DATA_PATH": "nowhere"}, "DATA_PATH=nowhere"),
    "wrong vocabulary": ({"VOCAB_SIZE": "1024"}, "VOCAB_SIZE=1024"),
    "no such tokenizer": ({"TOKENIZER_PATH": "nothing.model"}, "nothing.model"),
    "unwritable output": ({"OUT_DIR": "/proc/runs"}, "/proc/runs"),
    "no time": ({"MAX_WALLCLOCK_SECONDS": "0.00001", "GPTQ_RESERVE_SECONDS": "0"}, "MAX_WALLCLOCK_SECONDS=1e-05"),
    "nothing to resume": ({"RESUME": "nothing"}, "RESUME=nothing"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_status_two(case, tmp_path, tiny_environ, monkeypatch, capsys):
    environ, named = BAD_INPUT[case]
    assert_refused({**tiny_environ, "OUT_DIR": str(tmp_path / "runs"), **environ}, named, tmp_path, monkeypatch, capsys)
    assert not (tmp_path / "runs").exists(), "a refused run leaves no folder"


def test_bad_data_is_one_line_and_status_two(tmp_path, tiny_data, tiny_environ, monkeypatch, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused({**tiny_environ, "DATA_PATH": str(empty)}, "no *_train_*.bin", tmp_path, monkeypatch, capsys)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_data[0], broken)
    shard = next(broken.glob("*_train_*.bin"))
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    assert_refused({**tiny_environ, "DATA_PATH": str(broken)}, shard.name, tmp_path, monkeypatch, capsys)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(tmp_path, made_up_text, tiny_environ, monkeypatch, capsys):
    for pieces, named in ((320, "made with another tokenizer"), (330, "VOCAB_SIZE=320")):
        train_tokenizer(made_up_text(60, seed=1), pieces, tmp_path / "other.model")
        environ = {**tiny_environ, "TOKENIZER_PATH": str(tmp_path / "other.model")}
        assert_refused(environ, named, tmp_path, monkeypatch, capsys)


def test_a_run_id_is_not_used_twice(finished, tmp_path, tiny_environ, monkeypatch, capsys):
    environ = {**tiny_environ, "OUT_DIR": str(finished[0].parent), "RUN_ID": "whole"}
    assert_refused(environ, "RUN_ID=whole", tmp_path, monkeypatch, capsys)
    assert summary_of(finished[0])["interrupted"] is False


def test_a_signal_in_the_last_step_is_not_forgotten(tmp_path):
    run = Run(load_settings({"PRESET": "demo", "OUT_DIR": str(tmp_path)}), Ranks(0, 1, torch.device("cpu")))
    with pytest.raises(Interrupted), run.deferring_signals():
        run._on_signal(signal.SIGTERM, None)
    assert run.signal == signal.SIGTERM


def run_here(environ: dict[str, str], folder: Path, monkeypatch) -> int:
    """Run the script's main in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    import train_gpt

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train_gpt.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def assert_refused(environ: dict[str, str], named: str, folder: Path, monkeypatch, capsys) -> None:
    assert run_here(environ, folder, monkeypatch) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert message.startswith("train_gpt.py: ")
    assert named in message


def test_torchrun_passes_the_line_on(tmp_path, tiny_environ):
    result = run_script(tmp_path, {**tiny_environ, "MODEL_DIM": "abc"}, processes=2)
    assert result.returncode != 0
    assert "train_gpt.py: MODEL_DIM=abc: must be a valid integer" in result.stderr
