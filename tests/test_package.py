"""What `import trauma_monai` promises to configs."""

from __future__ import annotations

import importlib

import pytest

import trauma_monai


@pytest.mark.parametrize("name", sorted(set(trauma_monai.__all__) - {"__version__"}))
def test_every_component_that_is_promised_is_there(name: str) -> None:
    module = importlib.import_module(f"trauma_monai.{trauma_monai._MODULE_OF[name]}")
    assert name in module.__all__
    assert getattr(trauma_monai, name) is getattr(module, name)


def test_an_unknown_component_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"has no component 'SliceNet'; it has .*SliceSequenceNet"):
        _ = trauma_monai.SliceNet
