"""Real CT goes through the whole flow; runs where ../shared/data stands beside the checkout.

The networks are untrained, but for a bias that decides what is found: these tests are about reading, grids and reports.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from conftest import SHARED_DATA
from trauma_monai.bundle_files import ORGAN_BUNDLE, TRAUMA_BUNDLE, config_files, find_bundle
from trauma_monai.dicom import read_series
from trauma_monai.pipeline import predict

pytestmark = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no real CT files in ../shared/data")

DICOM_SERIES = SHARED_DATA / "totalsegmentator/example_ct_dicom"
CERVICAL_SPINE = SHARED_DATA / "totalsegmentator2d/sample_s0521.nii.gz"


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Path]:
    """Weights of the demo variants; the organ network finds nothing anywhere."""
    paths = {}
    for argument, bundle in (("organ_weights", ORGAN_BUNDLE), ("trauma_weights", TRAUMA_BUNDLE)):
        root = find_bundle(bundle)
        parser = ConfigParser(ConfigParser.load_config_files(config_files(root, "demo")))
        parser["bundle_root"] = str(root)
        state = parser.get_parsed_content("network_def").state_dict()
        if bundle == ORGAN_BUNDLE:
            last_bias = [name for name in state if name.endswith("bias")][-1]
            state[last_bias] = torch.full_like(state[last_bias], -100.0)
        paths[argument] = tmp_path / f"{bundle}.pt"
        torch.save(state, paths[argument])
    return paths


def test_a_real_jpeg_2000_series_with_empty_uids_is_predicted(weights: dict[str, Path], tmp_path: Path) -> None:
    done = predict(DICOM_SERIES, tmp_path / "out", variant="demo", **weights)
    assert [report.is_file() for report in done.reports] == [True]
    masks = nib.load(done.reports[0].parent / "organs.nii.gz")
    volume = read_series(DICOM_SERIES)
    assert masks.shape == volume.array.shape == (512, 512, 20)
    np.testing.assert_allclose(masks.affine, volume.affine, atol=1e-3)


def test_a_real_cervical_spine_is_said_to_show_no_organ(weights: dict[str, Path], tmp_path: Path) -> None:
    done = predict(CERVICAL_SPINE, tmp_path / "out", variant="demo", **weights)
    record = json.loads((done.reports[0].parent / "probabilities.json").read_text())
    assert record["organs_found"] == []
    assert any("organ" in warning for warning in record["warnings"])
    assert "no organ" in done.reports[0].read_text().lower()
