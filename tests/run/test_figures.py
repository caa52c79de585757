"""The drawings of a report: to scale, readable in a narrow page, small for a long run."""

import re
import time
import xml.etree.ElementTree as ElementTree

import pytest
from test_report import check, fake_metrics, fake_run, fake_summary, oversized_summary

from pgolf.run.report import write_report


def test_the_byte_bar_is_to_scale(run_folder):
    """The widths of the drawn segments are in the proportion of their bytes."""
    roles = {"embedding": 1_000_000, "attention": 3_000_000, "mlp": 4_000_000}
    summary = fake_summary(bytes_by_role=roles | {"left": 8_000_000}, total_bytes=8_000_000)
    page = check(write_report(fake_run(run_folder, summary)).read_text())
    svg = next(svg for svg in page.svgs if "bytes used" in svg)
    widths = {}
    for path in ElementTree.fromstring(svg).iter("path"):
        if match := re.search(r"fill: var\(--(embedding|attention|mlp|track)\)", path.get("style", "")):
            x = [float(point) for point in re.findall(r"[ML] ([\d.]+) ", path.get("d"))]
            widths[match[1]] = max(x) - min(x)
    assert widths["attention"] / widths["embedding"] == pytest.approx(3, rel=1e-3)
    assert widths["mlp"] / widths["embedding"] == pytest.approx(4, rel=1e-3)
    assert widths["track"] / widths["mlp"] == pytest.approx(4, rel=1e-3)


def test_a_small_file_is_drawn_once_more_where_its_parts_can_be_read(run_folder):
    page = check(write_report(fake_run(run_folder)).read_text())
    bars = [svg for svg in page.svgs if "bytes used" in svg]
    assert len(bars) == 4
    assert all(">attention<" in svg and ">mlp<" in svg for svg in bars[2:])
    assert "4.54 times as wide" in page.text
    assert "times as wide" not in check(write_report(fake_run(run_folder, oversized_summary())).read_text()).text


def test_a_long_label_fits_a_narrow_page(run_folder):
    """It is wrapped: a line is at most as wide as what is left of the bars."""
    page = check(write_report(fake_run(run_folder, fake_summary(val_bpb_ngram=1.9))).read_text())
    wide, narrow = (svg for svg in page.svgs if "with n-gram cache 1.9" in svg)
    assert ">after quantisation, with n-gram cache<" in wide
    labels = re.findall(r"<(?:text|tspan)[^>]*>([^<]+)<", narrow)
    assert "after quantisation, with n-gram cache" not in labels
    assert max(len(label) for label in labels) * 6.7 < 0.5 * 340


def test_long_run_stays_small_and_quick(run_folder):
    fake_run(run_folder, metrics=fake_metrics(20_000))
    start = time.process_time()
    page = write_report(run_folder)
    assert time.process_time() - start < 3  # measured: 0.3 s after matplotlib is imported, which takes 0.5 s
    assert page.stat().st_size < 400_000
    check(page.read_text())
