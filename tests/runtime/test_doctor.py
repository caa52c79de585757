"""`pgolf doctor`: complete on this machine, and for every simulated failure one line with the command that mends it."""

import argparse
import copy
import json
import re
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.cli import doctor as cli_doctor
from pgolf.data.shards import write_shard
from pgolf.runtime import doctor, probes
from pgolf.runtime.tried import TRIED, release, untried

SECTIONS = [
    "python", "torch", "triton", "native", "operations", "gpu", "attention", "compilers", "packages", "codecs",
    "machine", "data",
]  # fmt: skip


@pytest.fixture(scope="module")
def this_machine():
    return probes.look()


@pytest.fixture
def healthy(this_machine):
    """This machine's facts, with whatever it may lack filled in: no GPU, all else in order."""
    found = copy.deepcopy(this_machine)
    found["torch"] = {"version": "2.13.0+cpu", "build": "CPU", "cuda": False, "cuda_error": ""}
    found["triton"] = {"version": "3.9.0", "interpreting": False}
    found["native"] = {
        "version": "0.1.0", "compiler": "GNU 12.2.0", "build_type": "Release", "cpu_features": ["avx2"],
        "cpu_level": "portable", "cuda": False, "cuda_version": "", "cuda_archs": [],
        "cuda_reason": "nvcc is not in PATH", "cuda_devices": 0,
    }  # fmt: skip
    found["gpu"] = {"devices": [], "driver": "", "seen_by_driver": [], "driver_error": "", "visible": None}
    found["compilers"] = dict.fromkeys(probes.COMPILERS, "12.2")
    found["packages"] = dict.fromkeys(probes.PACKAGES, "99.0") | {"numpy": "2.3.0"}
    found["codecs"] = {"brotli": "1.2.0", "zstandard": "0.25.0", "xz": ""}
    found["machine"] |= {"disk_free_bytes": 10**12, "folder_writable": True}
    found["operations"]["forced"] = ""
    found["data"] = {"folder": "data", "datasets": [dataset("fineweb10B_sp1024", variant="sp1024")]}
    return found


@pytest.fixture
def with_gpu(healthy):
    """A healthy machine with a Hopper GPU that everything reaches."""
    healthy["torch"] = {"version": "2.13.0+cu130", "build": "CUDA 13.0", "cuda": True, "cuda_error": ""}
    healthy["native"] |= {
        "cuda": True,
        "cuda_version": "13.0",
        "cuda_archs": ["90a"],
        "cuda_reason": "",
        "cuda_devices": 1,
    }
    healthy["gpu"] = {
        "devices": [{"name": "NVIDIA H100", "capability": "9.0", "memory_bytes": 80 * 2**30}],
        "driver": "580.65.06",
        "seen_by_driver": ["NVIDIA H100"],
        "driver_error": "",
        "visible": None,
    }
    return healthy


def dataset(name, train=80, val=1, variant=""):
    return {"name": name, "train_shards": train, "val_shards": val, "tokens": 10, "bytes": 20, "variant": variant}


def only(found):
    """The single problem of these facts."""
    problems = list(doctor.diagnose(found))
    assert len(problems) == 1, list(map(str, problems))
    assert "\n" not in str(problems[0])
    assert problems[0].mend
    return problems[0]


def report_of(found):
    """What `collect` would give for these facts."""
    problems = [vars(problem) for problem in doctor.diagnose(found)]
    return {**found, "problems": problems, "ok": all(problem["level"] != "problem" for problem in problems)}


def doctor_status(capsys, *arguments):
    parser = argparse.ArgumentParser()
    cli_doctor.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["doctor", *arguments])
    status = parsed.run(parsed)
    return status, capsys.readouterr().out


# -- this machine ------------------------------------------------------------------------------------------------------


def test_every_section_is_looked_at_here(this_machine):
    assert list(this_machine) == SECTIONS
    for name in ("python", "gpu", "attention", "compilers", "packages", "codecs", "machine", "data"):
        assert "error" not in this_machine[name], name
    assert this_machine["torch"]["version"] == __import__("torch").__version__
    assert this_machine["packages"]["numpy"] == np.__version__
    assert this_machine["machine"]["cores"] >= 1
    assert this_machine["machine"]["disk_free_bytes"] > 0
    assert this_machine["attention"]["torch.nn.attention.varlen"] == (release(torch.__version__) >= (2, 10))


def test_json_and_text_say_the_same(monkeypatch, this_machine, capsys):
    monkeypatch.setattr(doctor, "look", lambda: copy.deepcopy(this_machine))
    status, out = doctor_status(capsys, "--json")
    report = json.loads(out)
    assert list(report) == [*SECTIONS, "problems", "ok"]
    assert status == (0 if report["ok"] else 1)
    status_of_text, text = doctor_status(capsys)
    assert status_of_text == status
    for section in SECTIONS:
        assert re.search(rf"^{section} ", text, re.MULTILINE), section
    for problem in report["problems"]:
        assert problem["mend"]
        assert f"{problem['level']} ({problem['section']}): {problem['limits']}. Mend: {problem['mend']}\n" in text


def test_environment_is_not_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a-secret-of-the-user")
    assert "hf_a-secret" not in json.dumps(doctor.collect())


def test_oldest_versions_are_those_of_the_package_metadata():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    assert dict(re.findall(r'"(\w+)>=([\d.]+)', dependencies)) == probes.PACKAGES


# -- made-up machines --------------------------------------------------------------------------------------------------


def test_healthy_machines_have_no_problem(healthy):
    assert list(doctor.diagnose(healthy)) == []
    assert doctor.as_text(report_of(healthy)).endswith("\nReady.")


def test_healthy_gpu_machine_has_no_problem(with_gpu):
    assert list(doctor.diagnose(with_gpu)) == []
    text = doctor.as_text(report_of(with_gpu))
    assert "NVIDIA H100, compute 9.0, 80.0 GiB, driver 580.65.06" in text
    assert "CUDA 13.0 for 90a" in text


@pytest.mark.parametrize(
    ("section", "facts", "level", "mend"),
    [
        ("native", {"error": "ModuleNotFoundError: pgolf._native"}, "problem", "pip install -e "),
        ("triton", {"error": "ImportError: broken"}, "note", "pip install 'triton>=3.5'"),
        ("torch", {"error": "OSError: libcudart"}, "problem", "pip install --force-reinstall 'torch>=2.9'"),
        ("operations", {"error": "ImportError: x"}, "problem", "pip install -e "),
        ("packages", {"brotli": "1.1.0"}, "problem", "pip install --upgrade 'brotli>=1.2'"),
        ("packages", {"torch": "2.8.1+cu128"}, "problem", "pip install --upgrade 'torch>=2.9'"),
        ("packages", {"sentencepiece": None}, "problem", "pip install --upgrade 'sentencepiece>=0.2'"),
        ("codecs", {"zstandard": {"error": "ImportError"}}, "problem", "pip install --force-reinstall 'zstandard"),
        ("codecs", {"xz": {"error": "ImportError: _lzma"}}, "problem", "pyenv install --force"),
        ("machine", {"disk_free_bytes": 200_000_000}, "problem", "pip cache purge"),
        ("machine", {"folder_writable": False}, "problem", "mkdir -p"),
        ("gpu", {"driver_error": "version mismatch"}, "note", "modprobe nvidia"),
        ("compilers", {"c++": None, "g++": None, "clang++": None}, "note", "install"),
        ("data", {"datasets": []}, "note", "pgolf data download --variant sp1024"),
        ("machine", {"error": "OSError: gone"}, "note", "pip install"),
    ],
)  # fmt: skip
def test_each_failure_is_one_line_with_a_command(healthy, section, facts, level, mend):
    healthy[section] = facts if "error" in facts else healthy[section] | facts
    problem = only(healthy)
    assert (problem.level, problem.section) == (level, section)
    assert mend in problem.mend
    report = report_of(healthy)
    assert report["ok"] == (level == "note")
    assert str(problem) in doctor.as_text(report).splitlines()


def test_missing_native_without_a_compiler_installs_one_first(healthy):
    healthy["native"] = {"error": "missing"}
    healthy["compilers"] |= dict.fromkeys(("c++", "g++", "clang++"))
    mend = only(healthy).mend
    assert mend.index("&&") < mend.index("pip install -e ")


def test_old_triton_and_its_quarrel_with_numpy(healthy):
    healthy["triton"]["version"] = "3.4.0"
    assert "older than 3.5" in only(healthy).limits
    healthy["triton"]["version"] = "3.6.0"
    assert list(doctor.diagnose(healthy)) == []
    healthy["packages"]["numpy"] = "2.4.6"
    assert only(healthy).mend == "pip install 'numpy<2.4'"


@pytest.mark.parametrize(
    ("section", "facts", "mend"),
    [
        ("python", {"version": "3.99.1"}, f"python{TRIED['python'][1]} -m venv .venv"),
        ("torch", {"version": "2.99.0+cpu"}, f"pip install 'torch=={TRIED['torch'][1]}.*'"),
        ("triton", {"version": "3.99.0"}, f"pip install 'triton=={TRIED['triton'][1]}.*'"),
        ("packages", {"numpy": "2.99.0"}, f"pip install 'numpy=={TRIED['numpy'][1]}.*'"),
    ],
)
def test_what_was_not_tried_is_noted(healthy, section, facts, mend):
    healthy[section] |= facts
    problem = only(healthy)
    assert (problem.level, problem.section, problem.mend) == ("note", section, mend)
    name = "numpy" if section == "packages" else section
    version = facts.get("version") or facts["numpy"]
    oldest, newest = TRIED[name]
    assert f"{name} {version} was not tried, {oldest} to {newest} were" in problem.limits
    assert not any(untried(name, version) for version in (f"{oldest}.0", f"{newest}.7+cu130"))


def test_forced_backend_that_is_missing(healthy):
    answers = {"reference": {"ok": True, "reason": "", "mend": ""}, "native": {"ok": False, "reason": "", "mend": ""}}
    healthy["operations"] = {"forced": "reference", "backends": {"gptq": answers}}
    assert list(doctor.diagnose(healthy)) == []
    healthy["operations"]["forced"] = "native"
    assert only(healthy).mend == "unset PGOLF_BACKEND"
    assert "gptq" in only(healthy).limits


def test_incomplete_datasets(healthy):
    fineweb = healthy["data"]["datasets"]
    healthy["data"]["datasets"] = [dataset("fineweb10B_sp8192", val=0, variant="sp8192")]
    assert only(healthy).mend == "pgolf data download --variant sp8192"
    healthy["data"]["datasets"] = [*fineweb, dataset("demo_sp1024", train=0)]
    assert only(healthy).mend == "pgolf data demo"
    healthy["data"]["datasets"] = [*fineweb, dataset("my books", train=0)]
    assert "--out 'data/datasets/my books'" in only(healthy).mend


@pytest.mark.parametrize(
    ("torch", "gpu", "mend"),
    [
        ({"build": "CPU"}, {}, "pip install --force-reinstall torch --index-url .*cu130"),
        ({"build": "CPU"}, {"driver": "550.54"}, "pip install --force-reinstall torch --index-url .*cu126"),
        ({"build": "CUDA 13.0"}, {"driver": "550.54"}, "pip install --force-reinstall torch --index-url .*cu126"),
        ({"build": "CUDA 13.0"}, {"visible": ""}, "unset CUDA_VISIBLE_DEVICES"),
        ({"build": "CUDA 13.0"}, {"visible": "0"}, "sudo modprobe nvidia_uvm"),
    ],
)
def test_gpu_out_of_reach(with_gpu, torch, gpu, mend):
    with_gpu["torch"] |= {"cuda": False, **torch}
    with_gpu["gpu"] |= {"devices": [], **gpu}
    problem = only(with_gpu)
    assert problem.level == "problem"
    assert re.fullmatch(mend, problem.mend)
    assert "out of PyTorch's reach" in doctor.as_text(report_of(with_gpu))


@pytest.mark.parametrize(
    ("section", "facts", "level", "mend"),
    [
        ("native", {"cuda": False, "cuda_reason": "PGOLF_CUDA=off"}, "note", "PGOLF_CUDA=on pip install -e "),
        ("native", {"cuda_archs": ["80", "100a"]}, "note", "PGOLF_CUDA_ARCHS=90 pip install -e "),
        ("triton", {"error": "ImportError: broken"}, "problem", "pip install 'triton>=3.5'"),
        ("triton", {"version": "3.5.1"}, "note", "pip install 'torch>=2.10' 'triton>=3.6'"),
        ("compilers", {"cc": None}, "problem", "install -y gcc"),
        ("python", {"headers": False}, "problem", "install -y python3-dev"),
    ],
)
def test_what_only_a_gpu_machine_needs(monkeypatch, with_gpu, section, facts, level, mend):
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    with_gpu[section] = facts if "error" in facts else with_gpu[section] | facts
    problem = only(with_gpu)
    assert problem.level == level
    assert mend in problem.mend


# -- probes that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "section"),
    [("pgolf._native", "native"), ("triton", "triton"), ("pgolf.ops", "operations"), ("torch", "torch")],
)
def test_a_module_that_does_not_load_is_reported(monkeypatch, module, section, capsys):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    report = doctor.collect()
    assert module in report[section]["error"]
    assert any(problem["section"] == section and problem["mend"] for problem in report["problems"])
    assert re.search(rf"^{section} +not available: ", doctor.as_text(report), re.MULTILINE)


@pytest.mark.parametrize(("codec", "module"), [("brotli", "brotli"), ("zstandard", "zstandard"), ("xz", "lzma")])
def test_a_codec_that_does_not_load_is_reported(monkeypatch, codec, module):
    monkeypatch.setitem(sys.modules, module, None)
    found = probes.look()
    assert "error" in found["codecs"][codec]
    assert [problem.section for problem in doctor.diagnose(found) if codec in problem.limits] == ["codecs"]


def test_doctor_works_when_nothing_else_does():
    """The doctor imports nothing of ours that needs a package: with all of them broken it still says so."""
    code = """
import sys, types
package = types.ModuleType("pgolf")  # stands in for pgolf/__init__.py, which imports the operations
package.__path__ = [sys.argv[1]]
sys.modules["pgolf"] = package
for name in ("torch", "triton", "numpy", "brotli", "zstandard", "pydantic", "jinja2", "tqdm", "pgolf._native"):
    sys.modules[name] = None
from pgolf.runtime import doctor
print(doctor.as_text(doctor.collect()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(probes.__file__).parents[1])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for section in ("torch", "native", "codecs"):
        assert f"problem ({section}): " in done.stdout
    assert done.stdout.endswith("Not ready: see the problems above.\n")


def test_a_module_that_raises_while_loading_is_reported(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise RuntimeError('first line\\n' + 'x' * 1000)")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    error = probes.look()["triton"]["error"]
    assert error.startswith("RuntimeError: first line xxx")
    assert len(error) == 200


def test_small_disk_and_full_process_table(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(probes.shutil, "disk_usage", lambda path: usage(10**10, 10**10, 10**8))

    def no_process(*arguments, **options):
        raise OSError("no more processes")

    monkeypatch.setattr(probes.subprocess, "run", no_process)
    report = doctor.collect()
    assert any("0.1 GiB of disk free" in problem["limits"] for problem in report["problems"])
    assert not report["ok"]
    assert {"error"} != set(report["compilers"])


@pytest.mark.parametrize(("status", "output"), [(0, "NVIDIA H100 80GB HBM3, 580.65.06"), (9, "couldn't communicate")])
def test_nvidia_smi(monkeypatch, tmp_path, status, output):
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\necho "{output}"\nexit {status}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = probes.look()["gpu"]
    if status:
        assert gpu["driver_error"] == output
    else:
        assert (gpu["seen_by_driver"], gpu["driver"]) == (["NVIDIA H100 80GB HBM3"], "580.65.06")


def test_datasets_are_counted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "datasets" / "fineweb10B_sp1024"
    folder.mkdir(parents=True)
    for name in ("fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        write_shard(folder / name, np.arange(7))
    (tmp_path / "data" / "datasets" / "notes.txt").write_text("not a dataset")
    found = probes.look()
    assert found["data"]["datasets"] == [
        {
            "name": "fineweb10B_sp1024",
            "train_shards": 2,
            "val_shards": 1,
            "tokens": 21,
            "bytes": 3 * (1024 + 14),
            "variant": "sp1024",
        }
    ]
    assert not any(problem.section == "data" for problem in doctor.diagnose(found))
