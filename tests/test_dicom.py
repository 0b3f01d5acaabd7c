"""Stage 1: real DICOM files are written, read back, and compared by numbers worked out by hand."""

from __future__ import annotations

import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from conftest import SHARED_DATA
from trauma_monai import dicom
from trauma_monai.dicom import DicomError, discover_series, read_series

needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason="the real CT files of ../shared/data are absent"
)

ROWS, COLUMNS, SLICES = 6, 8, 5
AXIAL = [1, 0, 0, 0, 1, 0]
LOSSLESS = {
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.5",
}


def expected_hu() -> np.ndarray:
    """HU of a small volume (Z, Y, X): air at the border, and 1000 z + 100 y + x - 1000 inside, at most 3000."""
    z, y, x = np.meshgrid(np.arange(SLICES), np.arange(ROWS), np.arange(COLUMNS), indexing="ij")
    hu = np.minimum(1000 * z + 100 * y + x - 1000, 3000)
    hu[:, [0, -1], :] = -1000
    hu[:, :, [0, -1]] = -1000
    return hu.astype(np.int16)


def write_series(
    folder: Path,
    hu: np.ndarray | None = None,
    *,
    bits: int = 16,
    signed: bool = True,
    intercept: int = -1024,
    spacing_mm: float = 2.0,
    syntax: str = ExplicitVRLittleEndian,
    **tags: object,
) -> list[Path]:
    """Write one file per slice, from feet to head, InstanceNumber falling; ``tags`` go into each header."""
    hu = expected_hu() if hu is None else hu
    folder.mkdir(parents=True, exist_ok=True)
    series_uid, paths = generate_uid(), []
    for index, pixels in enumerate(hu):
        header = Dataset()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CTImageStorage
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        header.PatientName, header.PatientID = "DOE^JANE", "4711"
        header.StudyInstanceUID, header.SeriesInstanceUID, header.Modality = "1.2.3", series_uid, "CT"
        header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        header.InstanceNumber = 100 - index
        header.ImageOrientationPatient = AXIAL
        header.ImagePositionPatient = [-50, -60, -300 + spacing_mm * index]
        header.PixelSpacing = [0.5, 0.25]
        header.Rows, header.Columns = pixels.shape
        header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, bits, bits - 1
        header.PixelRepresentation = int(signed)
        header.RescaleSlope, header.RescaleIntercept = 1, intercept
        header.KVP = 120
        stored = (pixels.astype(np.int32) - intercept) & (2**bits - 1)
        header.PixelData = stored.astype("<u2").tobytes()
        header["PixelData"].VR = "OW"
        for tag, value in tags.items():
            setattr(header, tag, value)
        if syntax != ExplicitVRLittleEndian:
            header.compress(syntax)
        paths.append(folder / f"{index:03d}.dcm")
        header.save_as(paths[-1], enforce_file_format=True)
    return paths


def edit(path: Path, **tags: object) -> None:
    header = pydicom.dcmread(path)
    for tag, value in tags.items():
        setattr(header, tag, value)
    header.save_as(path)


def as_zyx(folder: Path) -> np.ndarray:
    return read_series(folder).array.transpose(2, 1, 0)


@pytest.mark.parametrize(
    ("bits", "signed", "intercept"),
    [(12, False, -1024), (16, True, -1024), (16, True, 0), (13, True, 0), (16, False, -8192), (16, False, -32768)],
)
def test_every_header_of_the_competition_gives_the_same_hu(
    tmp_path: Path, bits: int, signed: bool, intercept: int
) -> None:
    """13 bits, signed: the bits above the 13th are 0 in negative numbers too, so that the sign has to be extended."""
    write_series(tmp_path, bits=bits, signed=signed, intercept=intercept)
    np.testing.assert_array_equal(as_zyx(tmp_path), expected_hu())


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=lambda uid: uid.keyword)
def test_compressed_pixels_are_exact(tmp_path: Path, syntax: str) -> None:
    hu = np.tile(expected_hu(), (1, 8, 8))  # OpenJPEG needs some pixels to start with
    write_series(tmp_path, hu, syntax=syntax)
    np.testing.assert_array_equal(as_zyx(tmp_path), hu)


def test_numbers_that_are_sign_extended_already_stay(tmp_path: Path) -> None:
    for path, pixels in zip(write_series(tmp_path, bits=13, intercept=0), expected_hu(), strict=True):
        edit(path, PixelData=pixels.astype("<i2").tobytes())
    np.testing.assert_array_equal(as_zyx(tmp_path), expected_hu())


def test_slices_are_ordered_by_position_not_by_instance_number_or_name(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    for path, name in zip(paths, ["d", "a", "e", "c", "b"], strict=True):
        path.rename(tmp_path / f"{name}.dcm")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array.transpose(2, 1, 0), expected_hu())
    assert [number for _, number, _ in volume.instances] == [100, 99, 98, 97, 96]


def test_the_affine_leads_from_voxels_to_the_patient(tmp_path: Path) -> None:
    """DICOM counts to the left and to the back, the affine to the right and to the front."""
    write_series(tmp_path)
    affine = read_series(tmp_path).affine
    np.testing.assert_allclose(affine @ [0, 0, 0, 1], [50, 60, -300, 1])
    # column 7 of 0.25 mm, row 5 of 0.5 mm, slice 4 of 2 mm: LPS (-48.25, -57.5, -292)
    np.testing.assert_allclose(affine @ [7, 5, 4, 1], [48.25, 57.5, -292, 1])


def test_oblique_slices_are_stacked_along_their_normal(tmp_path: Path) -> None:
    """Slices turned by 30 degrees about the x axis: rows run along (0, cos, sin), the normal is (0, -sin, cos)."""
    cosine, sine = np.sqrt(3) / 2, 0.5
    for index, path in enumerate(write_series(tmp_path)):
        edit(
            path,
            ImageOrientationPatient=[1, 0, 0, 0, cosine, sine],
            ImagePositionPatient=[0, -2 * sine * index, 2 * cosine * index],
        )
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array.transpose(2, 1, 0), expected_hu())
    np.testing.assert_allclose(volume.affine[:3, 2], [0, 2 * sine, 2 * cosine], atol=1e-9)


def test_padding_becomes_air(tmp_path: Path) -> None:
    hu = expected_hu()
    hu[:, 0, 0] = -2000
    write_series(tmp_path, hu, PixelPaddingValue=-976)  # stored: -2000 + 1024
    assert set(as_zyx(tmp_path)[:, 0, 0]) == {-1024}


def test_a_padding_value_that_may_be_tissue_is_left_alone(tmp_path: Path) -> None:
    write_series(tmp_path, PixelPaddingValue=1024 + 201)  # 201 HU: a pixel of the second slice has it too
    np.testing.assert_array_equal(as_zyx(tmp_path), expected_hu())


def test_monochrome1_leaves_hu_as_they_are(tmp_path: Path) -> None:
    """PS3.3 C.7.6.3.1.2: it says how to display, not what is stored."""
    write_series(tmp_path, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(as_zyx(tmp_path), expected_hu())


def test_inverted_pixels_under_monochrome1_are_turned_back(tmp_path: Path) -> None:
    inverted = 4095 - 2048 - expected_hu().astype(np.int32)  # so that 4095 - stored is the stored value of the original
    write_series(tmp_path, inverted, bits=12, signed=False, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(as_zyx(tmp_path), expected_hu())
    assert read_series(tmp_path).facts["slices_stored_inverted"] == SLICES


def test_a_fractional_slope_is_rounded_to_whole_hu(tmp_path: Path) -> None:
    hu = np.full((3, 4, 4), 101, dtype=np.int16)
    write_series(tmp_path, hu, intercept=0, RescaleSlope=0.5)
    assert set(as_zyx(tmp_path).ravel()) == {50}  # 50.5, to the even number


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_missing_slice_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path)[2].unlink()
    with pytest.raises(DicomError, match=r"about 1 slice\(s\) missing: 4.00 mm between the slices at -298 and -294"):
        read_series(tmp_path)


def test_two_slices_at_one_position_are_refused(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    edit(paths[2], ImagePositionPatient=[-50, -60, -298])
    with pytest.raises(DicomError, match="different pixels at position -298 mm"):
        read_series(tmp_path)


def test_a_repeated_file_counts_once_and_is_reported(tmp_path: Path) -> None:
    shutil.copy(write_series(tmp_path)[1], tmp_path / "copy.dcm")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array.transpose(2, 1, 0), expected_hu())
    assert volume.facts["repeated_slices_dropped"] == 1


def test_a_tilted_gantry_is_refused(tmp_path: Path) -> None:
    for index, path in enumerate(write_series(tmp_path)):
        edit(path, ImagePositionPatient=[-50, -60 + 0.5 * index, -300 + 2 * index])
    with pytest.raises(DicomError, match=r"14.0 degrees off their normal \(gantry tilt\)"):
        read_series(tmp_path)


def test_a_slice_shifted_within_its_plane_is_refused(tmp_path: Path) -> None:
    edit(write_series(tmp_path)[2], ImagePositionPatient=[-10, -60, -296])
    with pytest.raises(DicomError, match=r"slice 2 from the feet lies 160.0 voxels off the grid"):
        read_series(tmp_path)


def test_positions_rounded_to_tenths_are_even(tmp_path: Path) -> None:
    """0.625 mm apart: 0, 0.6, 1.2, 1.9, 2.5."""
    for index, path in enumerate(write_series(tmp_path)):
        edit(path, ImagePositionPatient=[0, 0, float(np.round(0.625 * index, 1))])
    assert read_series(tmp_path).affine[2, 2] == 0.625


def test_uneven_slices_are_refused(tmp_path: Path) -> None:
    edit(write_series(tmp_path)[4], ImagePositionPatient=[-50, -60, -291.5])
    with pytest.raises(DicomError, match=r"slice distances from 2.00 to 2.50 mm mixed"):
        read_series(tmp_path)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"PixelSpacing": [0.6, 0.25]}, "pixel spacings"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}, "different orientation"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER "]}, "localizer"),
        ({"RescaleIntercept": None}, "without them stored values are not HU"),
        ({"RescaleType": "US"}, "RescaleType US; expected HU"),
        ({"PixelSpacing": None}, "no PixelSpacing"),
    ],
    ids=["spacing", "orientation", "localizer", "rescale", "rescale type", "geometry"],
)
def test_a_slice_that_does_not_belong_is_refused(tmp_path: Path, tags: dict[str, object], reason: str) -> None:
    paths = write_series(tmp_path)
    edit(paths[3], **tags)
    with pytest.raises(DicomError, match=reason):
        read_series(paths)


def test_two_slices_make_no_volume(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match=r"2 slice\(s\); a volume needs at least 3"):
        read_series(write_series(tmp_path)[:2])


def test_values_that_no_ct_has_are_refused(tmp_path: Path) -> None:
    hu = expected_hu().astype(np.int32)
    hu[2, 3, 3] = 31000
    write_series(tmp_path, hu)
    with pytest.raises(DicomError, match=r"002.dcm: values from -1000 to 31000 HU, beyond"):
        read_series(tmp_path)


def test_noise_is_refused(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-9000, 20000, size=(3, 32, 32))
    write_series(tmp_path, hu, intercept=0)
    with pytest.raises(DicomError, match="of the values lie outside -2048 to 4095 HU: damaged pixel data"):
        read_series(tmp_path)


def test_a_private_transfer_syntax_is_named(tmp_path: Path) -> None:
    for path in write_series(tmp_path):
        header = pydicom.dcmread(path)
        header.file_meta.TransferSyntaxUID = "1.2.840.113619.5.2"
        header.save_as(path, implicit_vr=False, little_endian=True)
    with pytest.raises(
        DicomError, match=r"transfer syntax 1\.2\.840\.113619\.5\.2; expected one of the DICOM standard"
    ):
        read_series(tmp_path)


def test_damaged_rle_is_refused(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, size=(3, 32, 32))
    for path in write_series(tmp_path, hu, syntax=RLELossless):
        header = pydicom.dcmread(path)
        stream = bytearray(next(pydicom.encaps.generate_frames(header.PixelData, number_of_frames=1)))
        stream[64:200] = bytes(136)
        header.PixelData = pydicom.encaps.encapsulate([bytes(stream)])
        header.save_as(path)
    with pytest.raises(DicomError, match=r"000.dcm: pixels \(RLE Lossless\) cannot be decoded"):
        read_series(tmp_path)


@pytest.mark.filterwarnings("ignore")  # pydicom names what it finds odd
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_a_folder_of_damaged_headers_is_listed_to_its_end(tmp_path: Path, syntax: str) -> None:
    whole = write_series(tmp_path / "whole", expected_hu()[:1])[0]
    header = pydicom.dcmread(whole)
    header.file_meta.TransferSyntaxUID = syntax
    header.save_as(tmp_path / "source.dcm", little_endian=True, implicit_vr=False)
    content = (tmp_path / "source.dcm").read_bytes()
    (tmp_path / "source.dcm").unlink()
    rng = np.random.default_rng(0)
    for number in range(300):
        damaged = bytearray(content)
        for place in rng.integers(132, min(len(content), 900), size=4):
            damaged[place] = rng.integers(256)
        (tmp_path / f"{number}.dcm").write_bytes(damaged)
    found, rejected = discover_series(tmp_path)
    assert sum(len(series.files) for series in found) + len(rejected) == 301
    assert any("damaged" in item.reason for item in rejected)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31, "PixelData": bytes(4 * 7 * 9)}, "BitsStored 32"),
        ({"RescaleIntercept": "nan"}, "expected finite numbers"),
        ({"BitsStored": None}, "a header value is missing or malformed"),
        ({"PixelSpacing": [1]}, "a header value is missing or malformed"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, tags: dict[str, object], reason: str) -> None:
    for path in write_series(tmp_path):
        edit(path, **tags)
    with pytest.raises(DicomError, match=reason):
        read_series(tmp_path)


def test_a_damaged_value_representation_is_refused(tmp_path: Path) -> None:
    path = write_series(tmp_path)[1]
    path.write_bytes(path.read_bytes().replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00UJ"))
    with pytest.raises(DicomError, match="malformed: Unknown Value Representation 'UJ'"):
        read_series(tmp_path)


def test_a_value_that_is_only_shown_refuses_no_series(tmp_path: Path) -> None:
    for path in write_series(tmp_path):
        path.write_bytes(re.sub(rb"(\x18\x00\x60\x00DS..)120", rb"\1abc", path.read_bytes(), flags=re.DOTALL))
        assert b"abc" in path.read_bytes()
    assert "kVp" not in read_series(tmp_path).facts


def test_reconstructions_with_two_kernels_are_no_volume(tmp_path: Path) -> None:
    for path, kernel in zip(write_series(tmp_path), ("B30f", "B70f") * 9, strict=False):
        edit(path, ConvolutionKernel=kernel)
    with pytest.raises(DicomError, match="slices of the kernels B30f and B70f mixed"):
        read_series(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no DICOM any more"])
def test_a_slice_at_the_end_that_is_no_dicom_any_more_is_not_lost_in_silence(tmp_path: Path, content: bytes) -> None:
    write_series(tmp_path)[-1].write_bytes(content)
    (tmp_path / "notes.txt").write_text("no slice")
    with pytest.raises(DicomError, match="not a DICOM file"):
        read_series(tmp_path)


@pytest.mark.parametrize("with_meta", [True, False])
def test_files_without_a_preamble_are_read(tmp_path: Path, with_meta: bool) -> None:
    expected = as_zyx(write_series(tmp_path / "whole")[0].parent)
    for path in (tmp_path / "whole").iterdir():
        header = pydicom.dcmread(path)
        if not with_meta:
            header = Dataset({element.tag: element for element in header if element.tag.group != 2})
        target = tmp_path / "bare" / path.name
        target.parent.mkdir(exist_ok=True)
        if with_meta:
            target.write_bytes(path.read_bytes()[132:])
        else:
            header.save_as(target, implicit_vr=True, little_endian=True)
    (found,), _ = discover_series(tmp_path / "bare")
    assert np.array_equal(read_series(found).array.transpose(2, 1, 0), expected)


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    write_series(tmp_path / "elsewhere")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/patient").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")
    (found,), rejected = discover_series(tmp_path / "in")
    assert (len(found.files), rejected) == (SLICES, [])


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_series(tmp_path)[1]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DicomError, match=r"001.dcm"):
        read_series(tmp_path)


def test_a_file_that_vanishes_while_its_series_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_series(tmp_path, np.zeros((5, 64, 64)))

    def order_and_lose_one(headers: list) -> list:
        paths[2].unlink()
        return in_order(headers)

    in_order = dicom._sorted_by_position
    monkeypatch.setattr(dicom, "_sorted_by_position", order_and_lose_one)
    with pytest.raises(DicomError, match=r"002\.dcm: the file can no longer be read"):
        read_series(tmp_path)


def test_a_file_cut_off_within_compressed_pixels_is_damaged_not_of_another_series(tmp_path: Path) -> None:
    path = write_series(tmp_path, syntax=RLELossless)[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DicomError, match=rf"{path.name}: damaged DICOM file \(no pixels, or cut off within them\)"):
        read_series(tmp_path)


def test_a_cut_off_jpeg_stream_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hu = rng.integers(-1000, 1000, size=(3, 64, 64))
    for path in write_series(tmp_path, hu, syntax=JPEG2000Lossless):
        header = pydicom.dcmread(path)
        stream = next(pydicom.encaps.generate_frames(header.PixelData, number_of_frames=1))
        header.PixelData = pydicom.encaps.encapsulate([stream[: len(stream) // 2 * 2 - 600]])
        header.save_as(path)
    with pytest.raises(DicomError, match="truncated: the compressed pixels have no end marker"):
        read_series(tmp_path)


def test_a_folder_without_ct_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DicomError, match=r"no CT series in .*: not a DICOM file"):
        read_series(tmp_path)


def test_a_folder_with_two_series_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    write_series(tmp_path / "b")
    with pytest.raises(DicomError, match=r"belongs to another series than .*; expected one series"):
        read_series(tmp_path)


# --- discovery --------------------------------------------------------------------------------------------------------


def test_discovery_sorts_any_mix_into_series(tmp_path: Path) -> None:
    write_series(tmp_path / "one", PatientID="1")
    moved = write_series(tmp_path / "two", PatientID="2")
    (tmp_path / "elsewhere").mkdir()
    moved[0].rename(tmp_path / "elsewhere/first.dcm")
    write_series(tmp_path / "scout", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "capture", SOPClassUID=SecondaryCaptureImageStorage)
    (tmp_path / "readme.txt").write_text("hello")
    found, rejected = discover_series(tmp_path)
    assert [(series.patient_id, len(series.files)) for series in found] == [("1", 5), ("2", 5)]
    reasons = {item.path.parent.name: item.reason for item in rejected}
    assert reasons["scout"] == "localizer"
    assert reasons["capture"] == "not a CT image (Secondary Capture Image Storage)"
    assert reasons[tmp_path.name] == "not a DICOM file"
    assert len(rejected) == 11


def test_files_without_uids_are_a_series_by_their_folder(tmp_path: Path) -> None:
    for path in write_series(tmp_path / "scan"):
        edit(path, SOPClassUID="", SeriesInstanceUID="", StudyInstanceUID="", PatientID="")
    found, _ = discover_series(tmp_path)
    assert [(series.series_uid, len(series.files)) for series in found] == [("scan", 5)]
    np.testing.assert_array_equal(read_series(found[0]).array.transpose(2, 1, 0), expected_hu())


def test_folders_of_the_same_name_are_not_one_series(tmp_path: Path) -> None:
    for patient in ("a", "b"):
        for path in write_series(tmp_path / patient / "CT"):
            edit(path, SeriesInstanceUID="", StudyInstanceUID="", PatientID="")
    found, _ = discover_series(tmp_path)
    assert [len(series.files) for series in found] == [5, 5]


def test_no_message_and_no_fact_holds_a_name(tmp_path: Path) -> None:
    paths = write_series(tmp_path)
    assert "DOE" not in repr(read_series(tmp_path)) + repr(discover_series(tmp_path))
    paths[2].unlink()
    with pytest.raises(DicomError) as caught:
        read_series(tmp_path)
    assert "DOE" not in str(caught.value)


# --- real files -------------------------------------------------------------------------------------------------------


@needs_shared_data
@pytest.mark.parametrize("syntax", ["81", "91"])
def test_lossy_noise_in_the_fill_is_no_damage(tmp_path: Path, syntax: str) -> None:
    lossy, exact = (next((SHARED_DATA / "cornerstone").glob(f"CTImage.dcm_*{end}.dcm")) for end in (syntax, ".1.2.1"))
    for index in range(3):
        for source, folder in ((lossy, "lossy"), (exact, "exact")):
            header = pydicom.dcmread(source)
            header.ImagePositionPatient = [*header.ImagePositionPatient[:2], index]
            (tmp_path / folder).mkdir(exist_ok=True)
            header.save_as(tmp_path / folder / f"{index}.dcm")
    lossy_hu, exact_hu = (read_series(tmp_path / folder).array.astype(int) for folder in ("lossy", "exact"))
    assert 0 < np.abs(lossy_hu - exact_hu).max() <= 5


@needs_shared_data
def test_every_lossless_transfer_syntax_is_pixel_exact(tmp_path: Path) -> None:
    """The same real slice in each; copies at other heights make a series of it."""
    volumes = {}
    for path in sorted((SHARED_DATA / "cornerstone").glob("CTImage*.dcm")):
        syntax = pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
        if syntax not in LOSSLESS:
            continue
        folder = tmp_path / path.name
        folder.mkdir()
        for index in range(3):
            header = pydicom.dcmread(path)
            header.ImagePositionPatient = [*header.ImagePositionPatient[:2], index]
            header.save_as(folder / f"{index}.dcm")
        volumes[syntax] = read_series(folder).array
    assert set(volumes) == LOSSLESS
    reference = volumes["1.2.840.10008.1.2.1"]
    assert (reference.min(), reference.max()) == (-3024, 1378)
    for array in volumes.values():
        np.testing.assert_array_equal(array, reference)


@needs_shared_data
def test_a_real_series_without_uids_is_read(tmp_path: Path) -> None:
    volume = read_series(SHARED_DATA / "totalsegmentator/example_ct_dicom")
    assert volume.array.shape == (512, 512, 20)
    mask = nib.load(SHARED_DATA / "totalsegmentator/derived/example_dicom_rsna5.nii.gz")
    assert np.isclose(np.abs(np.linalg.det(volume.affine)), np.abs(np.linalg.det(mask.affine)), rtol=1e-3)


@needs_shared_data
def test_real_broken_series_are_refused_with_their_reasons(tmp_path: Path) -> None:
    with tarfile.open(SHARED_DATA / "dicom2nifti/failing.tar.xz") as archive:
        archive.extractall(tmp_path / "failing", filter="data")
    with zipfile.ZipFile(SHARED_DATA / "dicom-numpy/dupe-positions.zip") as archive:
        archive.extractall(tmp_path / "duplicates")
    reasons = []
    for series in discover_series(tmp_path)[0]:
        with pytest.raises(DicomError) as caught:
            read_series(series)
        reasons.append(str(caught.value))
    assert len(reasons) == 5
    for word, count in (("gantry tilt", 2), ("missing", 2), ("different pixels at position", 1)):
        assert sum(word in reason for reason in reasons) == count, reasons
