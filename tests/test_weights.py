"""networks/weights.py: strict loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from trauma_monai.networks import load_weights


def test_weights_are_loaded_and_the_network_comes_back(tmp_path: Path):
    saved, network = nn.Linear(2, 1), nn.Linear(2, 1)
    torch.save(saved.state_dict(), tmp_path / "model.pt")
    assert load_weights(network, tmp_path / "model.pt") is network
    assert torch.equal(network.weight, saved.weight)


def test_every_mismatch_is_named_at_once(tmp_path: Path):
    torch.save({"weight": torch.zeros(3, 1), "scale": torch.zeros(1)}, tmp_path / "model.pt")
    expected = (
        r"does not fit Linear\. missing: bias\. unexpected: scale\. wrong shape: weight \(3, 1\), expected \(1, 2\)\."
    )
    with pytest.raises(ValueError, match=expected):
        load_weights(nn.Linear(2, 1), tmp_path / "model.pt")


def test_weights_of_a_training_that_diverged_are_refused(tmp_path: Path):
    saved = nn.Linear(2, 1).state_dict()
    saved["bias"][0] = float("nan")
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not finite: bias"):
        load_weights(nn.Linear(2, 1), tmp_path / "model.pt")


def test_long_lists_are_cut_short(tmp_path: Path):
    torch.save({f"extra{index}": torch.zeros(1) for index in range(8)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="extra4 and 3 more"):
        load_weights(nn.Identity(), tmp_path / "model.pt")


def test_nested_states_are_refused(tmp_path: Path):
    torch.save({"model": nn.Linear(2, 1).state_dict()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a flat state dict"):
        load_weights(nn.Linear(2, 1), tmp_path / "model.pt")


def test_a_missing_file_says_what_to_do(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="train the network, or copy its model"):
        load_weights(nn.Linear(2, 1), tmp_path / "model.pt")
