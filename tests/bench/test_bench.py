"""The benchmarks' machinery: results to pages, the static report. Speed itself is not tested."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

from bench.harness import results
from bench.kernels import static_report

ROOT = Path(__file__).parents[2]


def made_up(operation="pack_bits", case="6 bits", median_ms=1.5, **changes):
    return {
        "operation": operation,
        "case": case,
        "shape": "1000 values",
        "dtype": "int8",
        "backend": "native",
        "median_ms": median_ms,
        "bytes": 15_000_123,
        "flops": 0,
        "tokens": 0,
        "others": {"numpy": {"median_ms": 3.0, "times_faster": 2.0}},
        **changes,
    }


def raw(*rows, quick=False):
    """What pytest-benchmark writes, as far as it is read."""
    machine = {
        "name": "AMD EPYC, 2 cores",
        "slug": "amd-epyc-2-cores",
        "kind": "cpu",
        "detail": "family 1",
        "cores": 2,
        "date": "2026-11-20",
        "others_share": 0.1,
        "command": "pytest bench/",
        "quick": quick,
        "versions": {"torch": "2.13.0", "triton": "not installed"},
        "ceilings": {"copy_gb_per_s": 20.0, "float32_tflop_per_s": 0.1, "bfloat16_tflop_per_s": 0.2},
    }
    return {"pgolf": machine, "benchmarks": [{"name": "a", "stats": {}, "extra_info": row} for row in rows]}


@pytest.fixture
def project(tmp_path):
    """A project's folder with one collected result."""
    source = tmp_path / "new.json"
    source.write_text(json.dumps(raw(made_up(), made_up(backend="reference", median_ms=0.9))))
    folder = tmp_path / "bench" / "results"
    assert results.main(["collect", str(source), "--folder", str(folder)]) == 0
    return tmp_path


def test_collect_keeps_one_line_a_row(project):
    path = project / "bench" / "results" / "amd-epyc-2-cores.json"
    kept = json.loads(path.read_text())
    assert (kept["device"], kept["date"], kept["ceilings"]["copy_gb_per_s"]) == ("AMD EPYC, 2 cores", "2026-11-20", 20)
    assert [row["median_ms"] for row in kept["rows"]] == [1.5, 0.9]
    assert (kept["rows"][0]["rate"], kept["rows"][0]["rate_unit"]) == (10.0, "GB/s")
    assert sum('"operation"' in line for line in path.read_text().splitlines()) == 2


def test_collect_refuses_what_says_nothing(tmp_path, capsys):
    source = tmp_path / "new.json"
    for content, message in (
        ("not json", "no JSON"),
        (json.dumps({"benchmarks": []}), "was not written by"),
        (json.dumps(raw()), "holds no benchmark"),
        (json.dumps(raw({"operation": "x"})), "has no case"),
        (json.dumps(raw(made_up(), quick=True)), "PGOLF_BENCH_QUICK"),
    ):
        source.write_text(content)
        assert results.main(["collect", str(source), "--folder", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_render_writes_pages_and_check_sees_when_they_are_old(project, capsys):
    readme = project / "README.md"
    readme.write_text(f"# before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    render = ["render", "--root", str(project)]
    assert results.main([*render, "--check"]) == 1
    assert "old" in readme.read_text()
    assert results.main(render) == 0
    assert results.main([*render, "--check"]) == 0

    text = readme.read_text()
    assert text.startswith("# before\n")
    assert text.endswith("\nafter\n")
    assert "| pack int6 | 1000 values int8: 0.9 ms, 16.7 GB/s, 2x numpy |\n" in text  # the fastest backend
    assert "\n\nNot measured yet: NVIDIA H200.\n" in text
    assert "unpack int6" not in text
    assert "train_gpt.py" not in text
    page = (project / "bench" / "RESULTS.md").read_text()
    assert "## NVIDIA H200\n\nnot measured" in page
    assert "| pack_bits | 6 bits | 1000 values | int8 | native | 1.5 | 10 GB/s | 50% | 2x numpy |" in page
    assert "torch 2.13.0" in page
    assert "triton" not in page

    readme.write_text(text.replace("0.9 ms", "0.1 ms"))
    capsys.readouterr()
    assert results.main([*render, "--check"]) == 1
    assert "README.md is out of date" in capsys.readouterr().out


def test_the_readme_has_a_column_for_each_device_with_figures():
    assert results.readme_table([]) == "Not measured yet: AMD EPYC, 2 cores, NVIDIA H200."
    run = {
        "preset": "demo",
        "steps": 1234,
        "train_seconds": 60.0,
        "val_bpb_float": 1.5,
        "val_bpb_quantized": 1.6,
        "artifact_bytes": 2_000_000,
        "compressors_bpb": {"xz -9e": 2.2},
    }
    priced = results.priced(made_up(), {"copy_gb_per_s": 10.0})
    cpu = {"slug": "amd-epyc-2-cores", "rows": [priced]}
    gpu = {"slug": "nvidia-h200", "run": run, "rows": [{**priced, "operation": "unpack_bits"}]}
    stopped = {"slug": "nvidia-h200", "run": {"val_bpb_quantized": None}, "rows": []}
    cell = "1000 values int8: 1.5 ms, 10 GB/s, 2x numpy"
    table = results.readme_table([cpu, gpu]).splitlines()
    assert table[0] == "| operation | AMD EPYC, 2 cores | NVIDIA H200 |"
    assert table[2:5] == [
        "| whole run of `train_gpt.py` |  | `demo`, 1,234 steps in 60 s |",
        "| its score before quantisation |  | 1.5000 bpb |",
        "| its score from the artifact alone |  | **1.6000 bpb** in 2 MB |",
    ]
    assert table[5:] == [
        "| general compressors on the same text |  | xz -9e 2.200 bpb |",
        f"| pack int6 | {cell} |  |",
        f"| unpack int6 |  | {cell} |",
    ]
    assert results.readme_table([cpu, stopped]) == results.readme_table([cpu])


def test_render_says_when_the_readme_has_no_markers(project, capsys):
    for text in ("no markers", f"{results.END} {results.BEGIN}", f"{results.BEGIN} only the first"):
        (project / "README.md").write_text(text)
        assert results.main(["render", "--root", str(project)]) == 2
        assert "needs the markers" in capsys.readouterr().err
        assert (project / "README.md").read_text() == text


def test_the_pages_of_this_checkout_are_up_to_date():
    assert results.render(ROOT, check=True) == []
    assert results.read_results(ROOT / "bench" / "results"), "no result is committed"


def test_a_run_s_summary_stands_beside_the_rows(project, tmp_path):
    summary = tmp_path / "summary.json"
    summary.write_text('{"val_bpb_quantized": 2.0}')
    source, out = str(project / "new.json"), str(tmp_path / "out")
    assert results.main(["collect", source, "--run", str(summary), "--folder", out]) == 0
    kept = json.loads((tmp_path / "out" / "amd-epyc-2-cores.json").read_text())
    assert kept["run"] == {"val_bpb_quantized": 2.0}


def test_a_row_is_priced_by_what_it_cannot_avoid():
    ceilings = {"copy_gb_per_s": 10.0, "float32_tflop_per_s": 1.0}
    row = made_up(dtype="float32", median_ms=4.0, bytes=20_000_000, flops=1_000_000_000)
    found = results.priced(row, ceilings)  # 2 ms by bytes, 1 ms by FLOPs
    assert (found["rate"], found["rate_unit"], found["share_of_ceiling"]) == (pytest.approx(5.0), "GB/s", 0.5)
    found = results.priced({**row, "flops": 3_000_000_000}, ceilings)
    assert (found["rate"], found["rate_unit"], found["share_of_ceiling"]) == (pytest.approx(0.75), "TFLOP/s", 0.75)
    found = results.priced({**row, "tokens": 8}, ceilings)
    assert (found["rate"], found["rate_unit"]) == (pytest.approx(2000.0), "tokens/s")


def test_memory_is_a_column_where_it_is_known(tmp_path):
    others = {"eager": {"median_ms": 3.0, "times_faster": 2.0, "peak_mb": 1234.5678}, "peer": {"times_faster": 0.5}}
    rows = [made_up(), made_up(case="4 bits", peak_mb=0.25, others=others)]
    source = tmp_path / "new.json"
    source.write_text(json.dumps(raw(*rows)))
    kept = results.collect(source)["rows"]
    assert "peak_mb" not in kept[0]
    assert kept[1]["peak_mb"] == 0.25
    lines = results.table(kept, markdown=True)
    assert lines[0].endswith("| beside | peak MB |")
    assert lines[2].endswith("|  |")
    assert lines[3].endswith("| 0.25 (1,240 eager) |")
    assert "peak" not in results.table(kept[:1], markdown=True)[0]


def test_rates_take_a_unit_that_suits_them():
    shown = [results.rate({"rate": value, "rate_unit": unit}) for value, unit in ((0.0123, "GB/s"), (0.8, "TFLOP/s"))]
    assert shown == ["12.3 MB/s", "800 GFLOP/s"]
    assert results.rate({"rate": 0.5, "rate_unit": "tokens/s"}) == "0.5 tokens/s"


def test_numbers_have_three_digits():
    shown = [results.number(value) for value in (0.012345, 1.2345, 123.45, 12345.6, 2.0)]
    assert shown == ["0.0123", "1.23", "123", "12,300", "2"]


# Static report


PTXAS = """
ptxas info    : Compiling entry function '_ZN5pgolf7convertINS_4PackILi6EEEEEvPKhPhlb' for 'sm_90a'
ptxas info    : Function properties for _ZN5pgolf7convertINS_4PackILi6EEEEEvPKhPhlb
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 1024 bytes smem, 560 bytes cmem[0]
"""
PTX = ".visible .entry _ZN5pgolf7convertINS_4PackILi6EEEEEvPKhPhlb(\n)\n.maxntid 256\n{ wgmma.mma_async; }"


def test_ptxas_is_read():
    (report,) = static_report.read_ptxas(PTXAS, PTX)
    assert (report.registers, report.spills, report.shared_bytes, report.threads) == (40, 12, 1024, 256)
    assert (report.wgmma, report.tma) == (True, False)
    assert report.occupancy == 0.75  # 40 registers: 6 blocks of 8 warps
    if shutil.which("c++filt"):
        assert report.kernel == "convert<Pack<6>>"
        assert report.bytes_moved == 36_000_000 * 14 // 8
        assert report.roofline_us("h200") == pytest.approx(63e6 / 4.8e12 * 1e6)


def test_roofline_is_the_larger_of_bytes_and_flops():
    fields = dict.fromkeys(("registers", "spills", "shared_bytes", "threads", "occupancy", "tma"), 0)
    fields |= {"kernel": "k", "language": "triton", "wgmma": True}
    report = static_report.KernelReport(**fields, bytes_moved=4_800_000, flops=989_000_000 * 3)
    assert report.roofline_us("h200") == pytest.approx(3.0)
    assert report.roofline_us("h100") == pytest.approx(3.0)
    fields["wgmma"] = False
    report = static_report.KernelReport(**fields, bytes_moved=4_800_000, flops=67_000_000 * 4)
    assert report.roofline_us("h200") == pytest.approx(4.0)
    report = static_report.KernelReport(**fields, bytes_moved=4_800_000 * 5, flops=1)
    assert report.roofline_us("h200") == pytest.approx(5.0)


@pytest.mark.skipif(static_report.find_nvcc() is None, reason="nvcc is not on this machine")
def test_every_shipped_kernel_fits_without_spills():
    reports = static_report.cuda_reports()
    assert {"convert<Pack<6>>", "convert<Unpack<6, true>>", "round_block"} <= {report.kernel for report in reports}
    assert not [report.kernel for report in reports if report.spills]
    # round_block holds its columns on chip; the others stream and hide the memory's latency behind many warps
    assert all(report.occupancy > 0.5 for report in reports if report.kernel != "round_block")
    (rounding,) = (report for report in reports if report.kernel == "round_block")
    assert rounding.occupancy == 2 * 2 / 64, "two blocks of two warps, by their 96 KB"


def test_the_report_says_what_it_cannot_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(static_report, "find_nvcc", lambda: None)
    assert static_report.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "TRITON_INTERPRET" in report["triton"]["missing"]
    assert "nvcc" in report["cuda"]["missing"]
    assert report["triton"]["kernels"] == report["cuda"]["kernels"] == []


def test_every_program_of_the_folder_can_be_imported():
    """Benchmarks that need a GPU too: what they take from the package is there."""
    files = [path for path in (ROOT / "bench").rglob("*.py") if path.stem != "conftest"]
    assert len(files) > 40
    for path in files:
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
