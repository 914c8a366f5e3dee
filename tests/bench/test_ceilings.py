"""What a device can do at most: measured, and never by a product that is wrong."""

from __future__ import annotations

import pytest
import torch

from bench.kernels import ceilings
from bench.kernels.ceilings import Ceilings


def test_ceilings_on_a_cpu(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 16)
    rows = ceilings.measure("cpu", seconds=0, side=64)
    found = ceilings.from_rows(rows)
    assert set(found.tflops) == {"float32", "bfloat16"}
    product = rows[0]
    assert product["tflops"] == pytest.approx(2 * 64**3 / product["us"] / 1e6, rel=0.1)
    assert rows[-1]["gb_s"] == pytest.approx(2 * (1 << 16) / rows[-1]["us"] / 1e3, rel=0.02)
    with pytest.raises(ValueError, match="the rows hold 0 products"):
        ceilings.from_rows([])


def test_a_wrong_product_is_no_ceiling(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 16)
    genuine = ceilings.product
    monkeypatch.setattr(ceilings, "product", lambda a, b: genuine(a, b) * 1.1)
    rows = ceilings.measure("cpu", seconds=0, side=32)
    assert all(row["tflops"] is None and row["us"] is None for row in rows[:-1])
    assert "wrong" in rows[0]["no_time"]


def test_a_dtype_that_the_library_has_not_costs_only_itself(monkeypatch):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 16)
    genuine = ceilings.product

    def product(a, b):
        if a.dtype == torch.bfloat16:
            raise RuntimeError("not supported\nmore")
        return genuine(a, b)

    monkeypatch.setattr(ceilings, "product", product)
    rows = ceilings.measure("cpu", seconds=0, side=32)
    assert set(ceilings.from_rows(rows).tflops) == {"float32"}
    assert rows[1]["no_time"] == "not supported"


def test_the_longer_floor_sets_the_bound():
    limits = Ceilings({"float16": 800.0, "bfloat16": 790.0}, 4000.0)
    assert limits.floor_us(800e6, 4e3, "float16") == (pytest.approx(1.0), "tflops")
    assert limits.floor_us(800e6, 8e6, "float16") == (pytest.approx(2.0), "gb_s")
    assert limits.floor_us(800e6, 0, "float32")[0] == pytest.approx(1.0)
