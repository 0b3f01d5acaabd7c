"""Volumes for MONAI: DICOM series and NIfTI files, loaded by MONAI's own transforms."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImage, LoadImaged, Orientationd

from test_dicom import expected_hu, write_series
from trauma_monai.dicom import DicomError, read_series
from trauma_monai.volume_reader import VolumeReader


def test_a_series_goes_through_monai_and_back_to_its_grid(tmp_path: Path) -> None:
    write_series(tmp_path)
    transforms = Compose(
        [
            LoadImaged("image", reader=VolumeReader(), dtype=None, ensure_channel_first=False),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="SPL", labels=None),
        ]
    )
    sample = transforms({"image": str(tmp_path)})
    np.testing.assert_array_equal(sample["image"][0].numpy(), expected_hu())
    back = Invertd("image", transforms, nearest_interp=False, to_tensor=False)({**sample, "image": sample["image"]})
    np.testing.assert_array_equal(back["image"][0].numpy(), read_series(tmp_path).array)


def test_an_uncompressed_nifti_is_a_view_that_is_read_when_used(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii"
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nib.save(nib.Nifti1Image(data, np.diag([-1.0, -1.0, 2.0, 1.0])), path)
    image = LoadImage(reader=VolumeReader(), dtype=None)(path)
    offset = nib.load(path).dataobj.offset
    with path.open("r+b") as file:  # after loading, before use
        file.seek(offset)
        file.write(np.int16(99).tobytes())
    assert image[0, 0, 0] == 99
    image[1, 0, 0] = 5
    assert nib.load(path).get_fdata()[1, 0, 0] == 12  # what is written to the view stays out of the file


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_a_scaled_nifti_with_whole_hu_becomes_int16(tmp_path: Path, name: str) -> None:
    image = nib.Nifti1Image(np.array([[[0, 1000, 2000]]], dtype=np.int16), np.eye(4))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / name)
    loaded = LoadImage(reader=VolumeReader(), dtype=None)(tmp_path / name)
    assert str(loaded.dtype) == "torch.int16"
    assert loaded.flatten().tolist() == nib.load(tmp_path / name).get_fdata().ravel().tolist()


def test_other_files_are_answered_with_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "ct.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"neither a NIfTI file \(.nii, .nii.gz\) nor a folder of DICOM files"):
        LoadImage(reader=VolumeReader(), dtype=None)(tmp_path / "ct.txt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LoadImage(reader=VolumeReader(), dtype=None)(tmp_path / "nothing.nii")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 2), dtype=np.int16), np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(ValueError, match="expected a volume with three axes"):
        LoadImage(reader=VolumeReader(), dtype=None)(tmp_path / "four.nii")


def test_monai_reads_no_series_that_is_refused(tmp_path: Path) -> None:
    """LoadImage goes on to the next reader when one fails to open a file, and ITK opens nearly everything."""
    write_series(tmp_path)[2].unlink()
    with pytest.raises(DicomError, match="missing"):
        LoadImage(reader=VolumeReader(), dtype=None)(tmp_path)


def test_a_nifti_that_hides_its_orientation_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((2, 2, 2), dtype=np.int16), None)
    nib.save(image, tmp_path / "ct.nii")
    with pytest.raises(ValueError, match="left and right cannot be told"):
        LoadImage(reader=VolumeReader(), dtype=None)(tmp_path / "ct.nii")


def test_a_fourth_axis_of_length_one_is_no_axis(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((2, 3, 4, 1), dtype=np.int16), np.eye(4)), tmp_path / "ct.nii.gz")
    assert LoadImage(reader=VolumeReader(), dtype=None)(tmp_path / "ct.nii.gz").shape == (2, 3, 4)
