"""Dropout of a CPU: its share, its factor, its gradient and what it draws from."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from efficientad.ops.dropout import dropout

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_each_element_is_dropped_with_the_rate_and_independently(rate):
    torch.manual_seed(1)
    gone = dropout(torch.ones(400_003), rate, True) == 0
    assert stats.binomtest(int(gone.sum()), len(gone), rate).pvalue > 1e-3
    for distance in (1, 2, 3, 4, 5):  # four elements share a draw
        both = int((gone[distance:] & gone[:-distance]).sum())
        assert stats.binomtest(both, len(gone) - distance, rate**2).pvalue > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_kept_and_its_gradient_are_divided_by_the_share_that_is_kept(dtype):
    torch.manual_seed(1)
    x = torch.randn(3, 5, 7, 2, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.2, True)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(y[kept], (1.25 * x)[kept])
    assert torch.equal(gradient, 1.25 * kept.to(dtype))
    assert y.dtype == dtype


def test_the_seed_decides():
    def drawn(seed):
        torch.manual_seed(seed)
        return dropout(torch.ones(1001), 0.2, True), dropout(torch.ones(1001), 0.2, True)

    first, second = drawn(3)
    again, _ = drawn(3)
    other, _ = drawn(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


def test_elements_are_drawn_in_the_order_of_memory():
    x = torch.randn(2, 6, 5, 4)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(3)
    found = dropout(last, 0.5, True)
    torch.manual_seed(3)
    flat = dropout(last.permute(0, 2, 3, 1).flatten(), 0.5, True)
    assert found.stride() == last.stride()
    assert torch.equal(found.permute(0, 2, 3, 1).flatten(), flat)
    part = x[:, ::2]  # elements that do not lie side by side
    assert set((dropout(part, 0.5, True) / part).unique().tolist()) == {0.0, 2.0}


def test_a_nan_stays_one():
    assert dropout(torch.full((64,), torch.nan), 0.5, True).isnan().all()


def test_nothing_is_drawn_without_training_or_rate():
    x = torch.ones(9)
    state = torch.get_rng_state()
    assert dropout(x, 0.2, False) is x
    assert dropout(x, 0.0, True) is x
    assert torch.equal(torch.get_rng_state(), state)
