"""Exact streaming quantiles against numpy.quantile and torch.quantile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from efficientad.utils.quantiles import ExactQuantiles, float_keys, key_values, streaming_quantiles

LEVELS = (0.0, 0.1, 0.5, 0.9, 0.995, 1.0)


def stream(values: np.ndarray, parts: int = 3):
    return lambda: np.array_split(values, parts)


def samples(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    values = {
        "normal": lambda: rng.standard_normal(n),
        "duplicates": lambda: rng.integers(-3, 4, n) / 4,
        "narrow": lambda: 0.5 + 1e-4 * rng.random(n),
        "denormal": lambda: rng.integers(-9, 10, n) * 1e-45,
        "zeros": lambda: rng.choice([-0.0, 0.0], n),
        "huge": lambda: rng.choice([-1, 1], n) * np.exp(rng.uniform(-80, 80, n)),
    }[kind]()
    return values.astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 11, 1001, 50_000])
@pytest.mark.parametrize("kind", ["normal", "duplicates", "narrow", "denormal", "zeros", "huge"])
def test_equal_to_numpy(kind: str, n: int) -> None:
    values = samples(kind, n)
    expected = np.quantile(values.astype(np.float64), LEVELS)
    assert streaming_quantiles(stream(values), LEVELS) == expected.tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1001])
def test_close_to_torch(n: int) -> None:
    values = samples("normal", n)
    expected = torch.quantile(
        torch.from_numpy(values).double(), torch.tensor(LEVELS, dtype=torch.float64)
    )
    np.testing.assert_allclose(streaming_quantiles(stream(values), LEVELS), expected, rtol=1e-15)


def test_order_and_chunks_do_not_matter() -> None:
    values = samples("normal", 10_007)
    shuffled = np.random.default_rng(1).permutation(values)
    passes = iter([np.array_split(values, 5), np.array_split(shuffled[::-1], 40)])
    expected = streaming_quantiles(stream(values, 1), LEVELS)
    assert streaming_quantiles(lambda: next(passes), LEVELS) == expected
    grid = values[:10_000].reshape(100, 100)[::2, ::2]  # not contiguous
    assert (
        streaming_quantiles(lambda: [grid], LEVELS)
        == np.quantile(grid.astype(np.float64), LEVELS).tolist()
    )


def test_half_precision_and_tensors() -> None:
    values = samples("normal", 999).astype(np.float16)
    expected = np.quantile(values.astype(np.float64), LEVELS).tolist()
    assert streaming_quantiles(lambda: [values], LEVELS) == expected
    assert streaming_quantiles(lambda: [torch.from_numpy(values)], LEVELS) == expected


def test_more_values_than_torch_takes() -> None:
    size, repeats = 1 << 20, 17  # 17.8 million values, more than 2**24
    base = (np.arange(size, dtype=np.float32) / size - 0.5).reshape(1024, 1024)

    def chunks():
        for _ in range(repeats):
            yield base

    with pytest.raises(RuntimeError):
        torch.quantile(torch.zeros((1 << 24) + 1), 0.5)
    levels = (0.9, 0.995)
    result = streaming_quantiles(chunks, levels)
    for level, value in zip(levels, result, strict=True):
        rank = level * (size * repeats - 1)
        below, above = int(rank) // repeats, min(int(rank) + 1, size * repeats - 1) // repeats
        flat = base.ravel().astype(np.float64)
        assert value == pytest.approx(np.interp(rank % 1, (0, 1), flat[[below, above]]), abs=1e-15)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="NaN"):
        streaming_quantiles(lambda: [np.array([1, np.nan], np.float32)], [0.5])
    with pytest.raises(ValueError, match="at least one"):
        streaming_quantiles(list, [0.5])
    with pytest.raises(ValueError, match="float64"):
        streaming_quantiles(lambda: [np.zeros(3)], [0.5])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        streaming_quantiles(list, [1.5])
    passes = iter([[np.ones(3, np.float32)], [np.zeros(3, np.float32)]])
    with pytest.raises(ValueError, match="again"):
        streaming_quantiles(lambda: next(passes), [0.5])
    quantiles = ExactQuantiles([0.5])
    quantiles.first(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="again"):
        quantiles.result()
    quantiles.second(np.ones(3, np.float32))
    with pytest.raises(ValueError, match="overlap"):
        quantiles.first(np.ones(3, np.float32))


def test_keys_sort_as_values_and_invert() -> None:
    special = [-np.inf, -3e38, -1, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1, 3e38, np.inf]
    values = np.array(special, np.float32)
    keys = float_keys(values)
    assert keys[4] == keys[5]
    assert (np.diff(np.delete(keys, 4).astype(np.int64)) > 0).all()
    assert key_values(keys).tolist() == values.tolist()
