"""The traffic of whole operations that the static report lists."""

import pytest

pytest.importorskip("triton")
from bench.kernels import traffic


def test_the_promised_ratios():
    mlp, loss_twice, loss_floor, head, *glue = traffic.schemes()
    assert mlp.bytes_moved == pytest.approx(3.435e9, rel=1e-3)
    assert mlp.other_bytes == pytest.approx(3.838e9, rel=1e-3)
    assert mlp.ratio <= 0.90
    assert mlp.saved_ratio <= 0.56
    assert loss_twice.ratio < 0.68
    assert 1 <= loss_floor.ratio <= 1.05
    assert head.ratio < 0.05
    x = traffic.X
    expected = [8, 10, 12, 15, 7.5, 9.2, 6.6, 20, 23, 26, 15, 5.08]
    assert [scheme.bytes_moved / x for scheme in glue] == pytest.approx(expected, rel=0.02)
    assert all(scheme.ratio < 0.9 and scheme.saved_ratio <= 1 for scheme in glue)
    lines = traffic.text_table()
    assert len({len(line.rstrip()) for line in lines}) == 1
    assert "0.895x" in lines[1]
