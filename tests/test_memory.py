"""Memory of freed tensors is used again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trauma_monai import memory

PAGE_FAULTS = """
import resource, sys
import numpy as np
from trauma_monai.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    np.ones(50_000_000, dtype=np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(50_000_000, dtype=np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not memory.keep_freed_memory(), reason="the C library is not glibc")
def test_large_blocks_are_not_fetched_from_the_system_again():
    """Ten arrays of 50 MB: by default each costs a fault per page (or per huge page)."""
    assert page_faults("keep") < 10
    assert page_faults("default") > 100


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_freed_memory()
