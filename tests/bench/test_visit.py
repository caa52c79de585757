"""bench/gpu.sh: whatever fails, hangs or is killed, the facts of the rest come home. Nothing is measured here."""

import itertools
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bench.visit import correctness, facts, plan, report, wheels
from bench.visit.visit import ROOT, Visit, environment

GPU_SH = ROOT / "bench" / "gpu.sh"
TURN = """
import sys, time
from bench.visit import facts
from bench.visit.turns import turn
with turn():
    facts.add("begin", at=time.time()); time.sleep({seconds}); facts.add("end", at=time.time())
"""


def python(name: str, code: str, **limits) -> plan.Part:
    return plan.Part(name, ("-c", code), **{"turn_s": 30, **limits})


def visit(out: Path, parts: list[plan.Part], seconds: float = 60) -> tuple[dict[str, str], list[dict]]:
    """(how each part ended, all facts)."""
    (out / ".logs").mkdir(parents=True)
    begun = time.time()
    clock = Visit(out, parts, seconds, environment(out, begun, quick=True, cuda=False), begun, scale=1.0)
    clock.run()
    return clock.states, facts.read(out)


def test_whatever_happens_to_a_part_the_others_bring_their_facts(tmp_path):
    add = "from bench.visit import facts; facts.add('known', value=1)"
    states, found = visit(
        tmp_path / "out",
        [
            python("good", add),
            python("fails", f"{add}; raise SystemExit(3)"),
            python("dies", f"{add}; import os; os.kill(os.getpid(), 11)"),
            python("hangs", f"{add}; import time; time.sleep(60)", end=4),
            python("deaf", f"import signal, time; signal.signal(15, signal.SIG_IGN); {add}; time.sleep(60)", end=4),
            python("greedy", TURN.format(seconds=60), turn_s=1),
            python("late", add, start=50),
            python("last", TURN.format(seconds=0)),
        ],
        seconds=10,
    )
    expected = {"fails": "failed", "dies": "failed", "hangs": "timed out", "deaf": "timed out"}
    expected |= {"good": "ok", "greedy": "turn too long", "late": "not reached", "last": "ok"}
    assert states == expected
    known = {fact["part"] for fact in found if fact["fact"] == "known"}
    assert known == {"good", "fails", "dies", "hangs", "deaf"}
    ended = {fact["part"]: fact for fact in found if fact["fact"] == "ended"}
    assert {name: fact["state"] for name, fact in ended.items()} == expected
    assert ended["dies"]["status"] == -signal.SIGSEGV
    assert "SystemExit" not in (tmp_path / "out" / "log.txt").read_text()
    assert "== fails: failed" in (tmp_path / "out" / "log.txt").read_text()


def test_one_has_its_turn_at_a_time_and_the_first_of_the_plan_goes_first(tmp_path):
    holder = python("holder", TURN.format(seconds=3))
    _, found = visit(tmp_path / "out", [holder, *(python(name, TURN.format(seconds=0.2)) for name in "abcd")])
    turns: dict[str, dict[str, float]] = {}
    for fact in found:
        if fact["fact"] in ("begin", "end"):
            turns.setdefault(fact["part"], {})[fact["fact"]] = fact["at"]
    in_order = sorted(turns, key=lambda part: turns[part]["begin"])
    for one, next_one in itertools.pairwise(in_order):
        assert turns[one]["end"] <= turns[next_one]["begin"]
    waited = in_order[in_order.index("holder") + 1 :]
    assert len(waited) >= 2, "the holder's turn was long enough for others to ask meanwhile"
    assert waited == sorted(waited)


def test_a_visit_that_is_killed_leaves_whole_facts_and_nobody_behind(tmp_path):
    code = "import sys; from bench.visit import facts\nwhile True: facts.add('again', value='x' * 3000)"
    program = f"""
import os, time
from pathlib import Path
from bench.visit import plan
from bench.visit.visit import Visit, environment
out = Path({str(tmp_path)!r})
(out / ".logs").mkdir()
parts = [plan.Part(f"busy {{i}}", ("-c", {code!r}), turn_s=5) for i in range(3)]
Visit(out, parts, 60, environment(out, time.time(), True, False), time.time(), 1.0).run()
"""
    clock = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    path = tmp_path / "busy.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (path.exists() and path.stat().st_size > 100_000):
        time.sleep(0.05)
    time.sleep(random.random() / 4)
    clock.kill()
    clock.wait()
    time.sleep(0.5)
    size = path.stat().st_size
    time.sleep(0.5)
    assert path.stat().st_size == size, "somebody still writes"
    found = facts.read(tmp_path)
    assert len(found) > 30
    assert all(fact["value"] == "x" * 3000 for fact in found)
    assert len(path.read_text().splitlines()) - len(found) <= 3  # at most one torn line a writer


def test_a_torn_line_spoils_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv(facts.FOLDER, str(tmp_path))
    monkeypatch.setenv(facts.PART, "ceilings copy")
    facts.add("first", ms=1.23456789)
    path = tmp_path / "ceilings.jsonl"
    path.write_bytes(path.read_bytes() + b'{"part": "ceilings", "fa')
    facts.add("second", all_ms=[1, 2.5])
    path.write_bytes(path.read_bytes() + b'"torn\xff')
    first, second = facts.read(tmp_path)
    assert (first["part"], first["fact"], first["ms"]) == ("ceilings copy", "first", 1.2346)
    assert (second["fact"], second["all_ms"]) == ("second", [1, 2.5])


def test_parts_are_chosen_by_the_beginning_of_their_names_and_by_how_they_ended():
    parts = plan.plan(quick=False, cuda=True)
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert len({part.kind for part in parts}) + 2 <= 8, "files of facts, log.txt and the visit's own"
    by_itself = plan.chosen(parts, [], {})
    assert [part for part in parts if part not in by_itself] == [part for part in parts if part.asked_for]
    assert [part.name for part in plan.chosen(parts, ["step loop", "ceilings flash4"], {})] == [
        "step loop plain",
        "step loop fused",
        "step loop fused graphs",
        "ceilings flash4",
    ]
    states = {"ceilings": "ok", "correctness exact": "timed out", "sweeps mlp": "not reached"}
    assert [part.name for part in plan.chosen(parts, ["failed"], states)] == ["correctness exact", "sweeps mlp"]
    with pytest.raises(ValueError, match=r"'stpe' begins no part; accepted are .*: failed, ceilings, correctness"):
        plan.chosen(parts, ["stpe"], {})


def test_wheels_are_unpacked_whole_in_xz_or_in_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(facts.FOLDER, raising=False)
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    for name in ("one", "two", "three"):
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", f"NAME = {name!r}\n" * 100)
    two, three = (folder / f"{name}-1.0-py3-none-any.whl" for name in ("two", "three"))
    two.with_name(f"{two.name}.xz").write_bytes(lzma.compress(two.read_bytes()))
    data = three.read_bytes()
    three.with_name(f"{three.name}.00").write_bytes(data[:50])
    three.with_name(f"{three.name}.01").write_bytes(data[50:])
    two.unlink()
    three.unlink()
    (folder / "bad-1.0.whl").write_bytes(b"no zip")
    wheels.unpack(folder, site)
    for name in ("one", "two", "three"):
        assert (site / name / "__init__.py").exists()
    kept = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [fact["name"] for fact in kept if "error" in fact] == ["bad-1.0.whl"]
    (site / "one" / "__init__.py").write_text("changed")
    wheels.unpack(folder, site)
    assert (site / "one" / "__init__.py").read_text() == "changed", "what was unpacked is left"


POISON = """
import os, pytest
@pytest.mark.parametrize("i", range(6))
def test_it(i):
    if i == 2:
        os._exit(1 + 85)
    if i == 4:
        os.kill(os.getpid(), 9)
    assert i != 5
"""


def test_tests_go_on_in_a_new_process_after_one_that_ends_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(facts.FOLDER, str(tmp_path))
    monkeypatch.setenv(facts.PART, "correctness exact")
    file = tmp_path / "test_poison.py"
    file.write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(correctness, "ROOT", tmp_path)
    monkeypatch.setattr(correctness, "WITHOUT_A_GPU", (file.name,))
    monkeypatch.setattr(correctness, "has_cuda", lambda: False)
    names = correctness.collect("rest", quick=False)
    assert len(names) == 6
    assert correctness.run(names) != 0
    outcomes = {re.search(r"\[(\d)\]", fact["fact"])[1]: fact["outcome"] for fact in facts.read(tmp_path)}
    assert outcomes == {"0": "passed", "1": "passed", "2": "died", "3": "passed", "4": "died", "5": "failed"}


def made_up_facts() -> list[dict]:
    row = {"operation": "xsa_gate", "case": "with gate, forward", "shape": "8x64", "dtype": "bfloat16", "flops": 0}
    row |= {"backend": "triton", "median_ms": 0.5, "bytes": 1_000_000_000, "tokens": 0, "others": {}}
    return [
        {"part": "visit", "fact": "begun", "seconds": 540.0, "quick": False, "second": 0},
        {"part": "machine", "fact": "device", "name": "NVIDIA H200", "slug": "nvidia-h200", "kind": "cuda",
         "detail": "sm_90", "cores": 16, "date": "2026-12-01", "versions": {"torch": "2.11.0"}, "second": 1},
        {"part": "ceilings", "fact": "copy", "ms": 0.5, "tbytes_per_s": 4.0, "second": 2},
        {"part": "ceilings", "fact": "attention flash3", "error": "not here", "second": 3},
        {"part": "correctness exact", "fact": "tests/a.py::test_a", "outcome": "passed", "why": "", "second": 4},
        {"part": "correctness exact", "fact": "tests/a.py::test_b", "outcome": "failed", "why": "nan", "second": 4},
        {"part": "step loop fused", "fact": "step", "ms": 120.0, "second": 5},
        {"part": "step loop fused", "fact": "step", "ms": 110.0, "second": 6},
        {"part": "step loop fused", "fact": "profile", "classes": {"glue": {"ms": 26.0, "launches": 9}}, "second": 7},
        {"part": "operations xsa_gate", "fact": "row", **row, "second": 8},
        {"part": "sweeps glue", "fact": "ended", "state": "not reached", "status": None, "second": 9},
    ]  # fmt: skip


def test_facts_become_results_and_a_page(tmp_path, monkeypatch):
    from bench.harness import results

    out, out2, kept = tmp_path / "out", tmp_path / "again", tmp_path / "kept"
    out.mkdir()
    out2.mkdir()
    for fact in made_up_facts():
        facts.append(out / f"{fact['part'].split()[0]}.jsonl", json.dumps(fact))
    again = {"part": "sweeps glue", "fact": "ended", "state": "ok", "status": 0, "second": 1}
    facts.append(out2 / "visit.jsonl", json.dumps(again))
    monkeypatch.setattr(report, "predictions", lambda: {"step/loop fused": (125.0, "why"), "ceilings/copy": (0.1, "")})
    assert results.main(["collect", str(out), "--folder", str(kept)]) == 0
    found = json.loads((kept / "nvidia-h200.json").read_text())
    assert found["visit"]["figures"] == {
        "ceilings/copy": 0.5,
        "step/loop fused": 110.0,
        "step/loop fused/glue": 26.0,
        "operations/xsa_gate/with gate, forward": 0.5,
    }
    assert found["rows"][0]["share_of_ceiling"] == 0.5
    page = results.results_page([found])
    assert "1 passed, 1 failed" in page
    assert "not finished: sweeps glue (not reached)." in page
    assert "- tests/a.py::test_b: failed: nan" in page
    assert "- ceilings: attention flash3: not here" in page
    assert "| step/loop fused | 125 | 110 | 0.88 | why |" in page
    assert "| ceilings/copy | 0.1 | 0.5 | **5.00** |  |" in page
    assert results.main(["collect", str(out), str(out2), "--folder", str(kept)]) == 0
    assert "not finished: none." in results.results_page([json.loads((kept / "nvidia-h200.json").read_text())])


def test_without_a_device_s_name_there_are_no_results(tmp_path, capsys):
    from bench.harness import results

    assert results.main(["collect", str(tmp_path), "--folder", str(tmp_path / "kept")]) == 2
    assert "no fact tells the device" in capsys.readouterr().err


def test_gpu_sh_refuses_what_it_cannot_do_in_a_line(tmp_path):
    def run(*arguments: str) -> tuple[int, str]:
        environ = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([str(GPU_SH), *arguments], capture_output=True, text=True, timeout=60, env=environ)
        return done.returncode, done.stderr.strip().splitlines()[-1]

    out = str(tmp_path / "out")
    assert run() == (2, "bench/gpu.sh: error: the following arguments are required: OUT")
    assert run(out) == (2, "bench/gpu.sh: error: no CUDA device here; --quick proves the script without one")
    assert run(out, "--seconds", "0") == (2, "bench/gpu.sh: error: --seconds 0: must be above 0")
    assert "'all' begins no part" in run(out, "--parts", "all")[1]
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(GPU_SH)], check=True, timeout=30)


def test_a_part_of_the_quick_visit_from_end_to_end(tmp_path):
    environ = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(GPU_SH), str(tmp_path), "--quick", "--seconds", "100", "--parts", "ceilings"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    found = facts.read(tmp_path)
    assert {"copy", "product 256", "attention plain 4 heads backward"} <= {fact["fact"] for fact in found}
    assert {path.name for path in tmp_path.iterdir()} == {"visit.jsonl", "ceilings.jsonl", "log.txt"}
