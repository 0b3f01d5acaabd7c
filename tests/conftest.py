"""What several test modules share: the bundles, and a tiny data set made once per test process."""

from __future__ import annotations

from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
BUNDLES = PROJECT / "bundles"
SHARED_DATA = PROJECT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def rsna_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four synthetic patients in the competition's layout, 64x64 pixels, slices 12 mm apart."""
    from trauma_monai.phantom import write_phantoms

    out = tmp_path_factory.mktemp("phantom") / "rsna"
    write_phantoms(out, studies=4, seed=3, matrix=64, slice_thickness_mm=12.0, workers=1)
    return out


@pytest.fixture(scope="session")
def dataset_dir(rsna_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same patients after `trauma-monai prepare`."""
    from trauma_monai.prepare import prepare

    out = tmp_path_factory.mktemp("prepared") / "dataset"
    prepare(rsna_dir, out, workers=1, folds=2)
    return out


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundle -> its package, with the demo variant and random weights; the zip lies beside it."""
    from packages import NAMES, write_package

    return {name: write_package(name, tmp_path_factory.mktemp("packages")) for name in NAMES}
