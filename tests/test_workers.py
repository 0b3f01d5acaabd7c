"""Processes that do independent jobs; that none is lost and none done twice is tested with `prepare`."""

from __future__ import annotations

import os

import pytest

from trauma_monai.workers import run_jobs


def test_workers_keep_the_memory_that_the_next_slice_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask makes them return it at once, by this variable: two workers were as slow as one."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    names = ["MALLOC_TRIM_THRESHOLD_", "OMP_NUM_THREADS"]
    outcomes = dict(run_jobs(os.getenv, names, workers=2, scheduler=None, when_killed="killed"))
    assert outcomes == {0: None, 1: "1"}
