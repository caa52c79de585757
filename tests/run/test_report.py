"""The report of a run: valid, self-contained and complete for whole, interrupted, oversized and hostile runs."""

import json
import math
import random
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pgolf.errors import UserError
from pgolf.run.report import headline, read_metrics, write_report
from pgolf.settings import load_settings

VOID = {"meta", "link", "br", "hr", "img", "input"}


def fake_summary(**changes) -> dict:
    """A whole demo run as a run records it."""
    roles = {
        "embedding": 253_120,
        "attention": 1_184_300,
        "mlp": 2_011_764,
        "control": 12_288,
        "container": 1_932,
        "code": 61_204,
    }
    used = sum(roles.values())
    summary = {
        "run_id": "20260131-101500-demo-s1337",
        "preset": "demo",
        "seed": 1337,
        "device": "cpu",
        "device_name": "AMD EPYC 9B14",
        "world_size": 1,
        "parameters": 4_598_272,
        "steps": 142,
        "tokens_seen": 1_163_264,
        "train_seconds": 141.37,
        "step_ms": 995.6,
        "val_loss_float": 3.1127,
        "val_bpb_float": 1.9876,
        "val_loss_quantized": 3.1391,
        "val_bpb_quantized": 2.0045,
        "val_tokens": 71_680,
        "val_bytes": 162_411,
        "artifact_bytes": used - roles["code"],
        "code_bytes": roles["code"],
        "total_bytes": used,
        "budget_bytes": 16_000_000,
        "fits_budget": True,
        "bytes_by_role": roles | {"left": 16_000_000 - used},
        "seconds": {"data": 4.2, "warmup": 3.1, "train": 141.4, "calibration": 6.3, "quantize": 8.9, "pack": 3.4,
                    "evaluate": 15.7, "total": 184.1},
        "max_wallclock_seconds": 150.0,
        "wallclock_used_seconds": 147.7,
        "within_wallclock": True,
        "compressors_bpb": {"xz -9e": 2.2931, "brotli -11": 2.1518},
        "backends": {"gptq": "reference", "leaky_relu2_mlp": "reference", "pack_bits": "native"},
        "fallbacks": [],
        "attention": "sdpa",
        "compile": False,
        "dtype": "bfloat16",
        "interrupted": False,
        "versions": {"pgolf": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu", "brotli": "1.2.1"},
    }  # fmt: skip
    return summary | changes


def fake_metrics(steps: int = 142, seed: int = 0) -> list[dict]:
    """Loss records that fall like a small model's, every step, with a validation every 25."""
    noise = random.Random(seed)
    records = []
    for step in range(1, steps + 1):
        loss = 3.0 + 3.93 * math.exp(-step / (steps / 7)) + noise.gauss(0, 0.06)
        seconds = step * 0.9956
        records.append({"kind": "train", "step": step, "train_loss": loss, "lr_scale": 1.0, "train_seconds": seconds,
                        "step_ms": 995.6, "tokens_seen": 8192 * step})  # fmt: skip
        if step % 25 == 0 or step == steps:
            value = 3.1 + 3.85 * math.exp(-step / (steps / 7))
            records.append(
                {"kind": "val", "step": step, "val_loss": value, "val_bpb": value * 0.6385, "train_seconds": seconds}
            )
    return records


def fake_settings(**changes) -> dict:
    settings = {
        "preset": "demo",
        "resume": "",
        "seed": 1337,
        "data_path": "data/datasets/demo_sp1024",
        "tokenizer_path": "data/tokenizers/demo_1024_bpe.model",
        "max_wallclock_seconds": 150.0,
        "adam_eps": 1e-8,
        "muon_coefficients": "quintic",
        "compile": False,
    }
    return settings | {f"setting_{number}": number * 0.25 for number in range(40)} | changes


def fake_run(
    folder: Path, summary: dict | None = None, metrics: list[dict] | None = None, settings: dict | None = None
) -> Path:
    """A run folder as a run leaves it, without artifact and log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(fake_summary() if summary is None else summary))
    (folder / "settings.json").write_text(json.dumps(fake_settings() if settings is None else settings))
    records = fake_metrics() if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def oversized_summary() -> dict:
    roles = {
        "embedding": 3_012_001,
        "attention": 5_200_450,
        "mlp": 8_400_900,
        "control": 40_210,
        "container": 2_400,
        "code": 88_040,
    }
    used = sum(roles.values())
    return fake_summary(bytes_by_role=roles | {"left": 16_000_000 - used}, total_bytes=used, fits_budget=False,
                        artifact_bytes=used - 88_040, code_bytes=88_040, within_wallclock=False,
                        wallclock_used_seconds=161.2, fallbacks=["pack_bits", "gptq"])  # fmt: skip


def interrupted_summary() -> dict:
    kept = {"run_id", "preset", "seed", "device", "world_size", "budget_bytes", "max_wallclock_seconds", "versions"}
    summary = {name: value if name in kept else None for name, value in fake_summary().items()}
    return summary | {"interrupted": True, "backends": {}, "fallbacks": [], "seconds": {"data": 4.2, "total": 31.0}}


class Page(HTMLParser):
    """The parsed report: checks that tags balance, collects text, attributes and SVG elements."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.pieces).split())
        self.svgs = re.findall(r"<svg.*?</svg>", html, re.DOTALL)

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> out of order"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)


def check(html: str) -> Page:
    """What holds for every report: balanced, self-contained, well-formed drawings, unique identifiers."""
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    for tag, name, value in page.attributes:
        assert tag not in ("script", "link", "iframe", "img", "object"), tag
        assert name != "src"
        assert not name.startswith("on"), name
        if name in ("href", "xlink:href"):
            assert value.startswith("#")
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    for svg in page.svgs:
        root = ElementTree.fromstring(svg)
        assert root.attrib["viewBox"].startswith("0 0 ")
        assert "#0f0f" not in svg, "a colour that no style sheet replaces"
        for reference in re.findall(r'(?:href="|url\()#([^")]+)', svg):
            assert f'id="{reference}"' in svg
    return page


def test_complete_run_shows_every_number(run_folder):
    summary = fake_summary()
    path = write_report(fake_run(run_folder, summary))
    assert path == run_folder / "report.html"
    page = check(path.read_text())
    assert len(page.svgs) == 10  # five drawings in two widths
    text = page.text
    for name in ("val_bpb_quantized", "val_bpb_float", "val_loss_float", "val_loss_quantized"):
        assert f"{summary[name]:.4f}" in text, name
    assert "1.9876 before quantisation (+0.0169)" in text
    for name in (
        "parameters",
        "tokens_seen",
        "val_tokens",
        "val_bytes",
        "artifact_bytes",
        "code_bytes",
        "total_bytes",
        "budget_bytes",
    ):
        assert f"{summary[name]:,}" in text, name
    for size in summary["bytes_by_role"].values():
        assert f"{size:,}" in text
    for seconds in summary["seconds"].values():
        assert f"{seconds:.1f} s" in text
    for name in (
        "run_id",
        "preset",
        "seed",
        "device",
        "device_name",
        "steps",
        "train_seconds",
        "step_ms",
        "attention",
        "dtype",
    ):
        assert str(summary[name]) in text, name
    for bpb in summary["compressors_bpb"].values():
        assert f"{bpb:.4f}" in text
    assert "147.7 s" in text
    assert "fits: 12,475,392 left of 16,000,000" in text
    for name, value in {**summary["backends"], **summary["versions"]}.items():
        assert f"{name} {value}" in text
    for name in fake_settings():
        assert name in text
    assert "notice" not in {value for _, name, value in page.attributes if name == "class"}


def test_numbers_of_fields_unknown_here_are_shown_too(run_folder):
    text = check(
        write_report(fake_run(run_folder, fake_summary(within_eval=True, something_new=98.7654))).read_text()
    ).text
    assert "something_new 98.7654" in text
    assert "within_eval yes" in text


def test_same_run_same_bytes(run_folder):
    first = write_report(fake_run(run_folder)).read_bytes()
    time.sleep(1.1)  # a date in the page would now differ
    assert write_report(run_folder).read_bytes() == first


def test_interrupted_run(run_folder):
    page = check(write_report(fake_run(run_folder, interrupted_summary(), fake_metrics(1))).read_text())
    assert "This run was interrupted" in page.text
    assert "missing" in page.text
    assert "Nothing was scored." in page.text
    assert "No artifact was written." in page.text
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


def test_float_score_alone(run_folder):
    summary = interrupted_summary() | {"val_bpb_float": 1.9876}
    text = check(write_report(fake_run(run_folder, summary)).read_text()).text
    assert "1.9876 before quantisation; not scored from the artifact" in text


def test_over_budget_is_said_and_drawn(run_folder):
    page = check(write_report(fake_run(run_folder, oversized_summary())).read_text())
    assert "does not fit: 744,001 over 16,000,000" in page.text
    assert "budget 16,000,000, exceeded by 744,001" in page.text  # in the drawing
    assert "over the limit" in page.text
    assert "Fell back to plain PyTorch on a GPU: pack_bits, gptq" in page.text
    assert "-744,001" in page.text


@pytest.mark.parametrize("content", [None, "", "\n\n", "not json\n", '{"kind": "train", "step": null}\n', "[1, 2]\n"])
def test_metrics_without_a_point(run_folder, content):
    fake_run(run_folder)
    if content is None:
        (run_folder / "metrics.jsonl").unlink()
    else:
        (run_folder / "metrics.jsonl").write_text(content)
    page = check(write_report(run_folder).read_text())
    assert "No loss was recorded." in page.text
    assert ("unreadable line" in page.text) == bool(content and content.strip())


def test_torn_last_line_and_resumed_steps(run_folder):
    records = fake_metrics(10)
    again = {"kind": "train", "step": 10, "train_loss": 9.5, "train_seconds": 11.0}
    fake_run(run_folder, metrics=[*records, again])
    with open(run_folder / "metrics.jsonl", "ab") as file:
        file.write('{"kind": "val", "step": 11, "note": "é'.encode()[:-1])  # in the middle of a letter
    train, validation, trouble = read_metrics(run_folder / "metrics.jsonl")
    assert [record["step"] for record in train] == list(range(1, 11))
    assert train[-1] == again
    assert [record["step"] for record in validation] == [10]
    assert trouble == ["metrics.jsonl: 1 unreadable line left out."]
    assert trouble[0] in check(write_report(run_folder).read_text()).text


def test_diverged_and_wrongly_typed_values(run_folder):
    """JSON's NaN, numbers beyond measure, and fields of other types than agreed still give a page."""
    nan = float("nan")
    metrics = [
        {"kind": "train", "step": step, "train_loss": nan if step == 2 else 5.0, "train_seconds": None}
        for step in (1, 2, 3)
    ]
    metrics += [{"kind": "val", "step": 3, "val_loss": 10**400, "val_bpb": float("inf")}]
    summary = fake_summary(val_bpb_quantized=nan, seconds=[1], bytes_by_role={"mlp": "many", "other role": 12},
                           backends=None, total_bytes="x", compressors_bpb={"xz -9e": None}, versions=7,
                           fallbacks="no")  # fmt: skip
    page = check(write_report(fake_run(run_folder, summary, metrics)).read_text())
    assert "step" in page.text
    assert "No times were recorded." in page.text


def test_hostile_strings_are_escaped(run_folder):
    evil = '<script>alert("x")</script>'
    summary = fake_summary(run_id=evil, device_name="a\" onload=\"b", versions={evil: evil}, backends={"x": evil},
                           dtype="\ud800", seconds={"$\\frac{" + evil: 3.0, "a\x01b": 2.0},
                           compressors_bpb={evil + "$$": 2.0},
                           bytes_by_role={evil: 15_000_000, "left": 1_000_000})  # fmt: skip
    html = write_report(
        fake_run(run_folder, summary, settings=fake_settings(data_path=evil, note="</dd></dl>"))
    ).read_text()
    page = check(html)
    assert "<script" not in html
    assert page.text.count(evil) >= 6
    assert "</dd></dl>" in page.text


def test_settings_missing_or_damaged(run_folder):
    fake_run(run_folder)
    (run_folder / "settings.json").write_text('{"seed": ')
    assert "settings.json is damaged" in check(write_report(run_folder).read_text()).text
    (run_folder / "settings.json").unlink()
    assert "settings.json is missing" in check(write_report(run_folder).read_text()).text


def test_no_summary_is_a_user_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"no summary\.json in .*nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_headline_of_exact_fit():
    tiles = headline(fake_summary(total_bytes=16_000_000))
    assert tiles[1]["note"] == "fits: 0 left of 16,000,000"
    assert tiles[1]["state"] == "good"


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, pgolf.run.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_settings_that_differ_from_the_preset_come_first_and_are_marked(run_folder):
    settings = load_settings({"PRESET": "demo", "MATRIX_LR": "0.0123", "LN_SCALE": "1"}).model_dump()
    settings |= {"run_id": "one", "a_setting_of_old": 3}
    preset = load_settings({"PRESET": "demo"}).model_dump()
    page = check(write_report(fake_run(run_folder, settings=settings)).read_text())
    assert "2 settings differ from the preset; they come first." in page.text
    changed = [index for index, (_, name, value) in enumerate(page.attributes) if (name, value) == ("class", "changed")]
    assert len(changed) == 2
    first = page.text.partition("they come first.")[2].split()
    assert first[:4] == ["ln_scale", "yes", "(preset:", "no)"]
    assert f"matrix_lr 0.0123 (preset: {preset['matrix_lr']:g})" in page.text
    assert "a_setting_of_old 3" in page.text


def test_measurements_have_units(run_folder):
    summary = fake_summary(peak_memory_bytes=936_329_216, cpu_level={"torch": "AVX2", "pgolf": "avx2"})
    text = check(write_report(fake_run(run_folder, summary)).read_text()).text
    assert "peak_memory_bytes 936 MB" in text
    assert "train_seconds 141.37 s" in text
    assert "step_ms 995.6 ms" in text
    assert "cpu_level torch AVX2, pgolf avx2" in text
    big = fake_summary(peak_memory_bytes=61_234_567_890)
    assert "61.2 GB" in check(write_report(fake_run(run_folder, big)).read_text()).text


def test_how_a_run_ended_is_told(run_folder):
    for name in ("interrupted", "aborted", "diverged"):
        text = check(write_report(fake_run(run_folder, fake_summary(**{name: True}))).read_text()).text
        assert {"interrupted": "was interrupted", "aborted": "ABORT_BPB", "diverged": "run diverged"}[name] in text
