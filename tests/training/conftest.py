"""Trainings of tests compute with torch's number of threads: their bits are compared."""

from __future__ import annotations

import pytest
import torch

from efficientad.training import settings


@pytest.fixture(autouse=True)
def _threads_as_they_are(monkeypatch):
    monkeypatch.setattr(settings, "fastest_threads", lambda work: torch.get_num_threads())
