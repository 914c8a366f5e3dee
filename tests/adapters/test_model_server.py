"""A predictor for a model that lives elsewhere: past the bound it serves no more."""

from __future__ import annotations

import types

import pytest
import torch

from efficientad.adapters.model_server import Server


def test_a_server_that_differs_serves_no_more():
    def server():
        made = object.__new__(Server)
        made.predictor = types.SimpleNamespace(dtype=torch.float32)
        return made

    maps = torch.rand(1, 1, 9, 9) - 0.5
    close = server()
    close.refuse_unless_equal([(maps + 4e-5, maps)], "x")
    assert close.predictor is not None
    for found in (maps + 2e-4, maps * torch.nan, maps[..., :5]):
        far = server()
        with pytest.warns(UserWarning, match="x keeps its own forward"):
            far.refuse_unless_equal([(maps, maps), (found, maps), (maps, maps)], "x")
        assert far.predictor is None
