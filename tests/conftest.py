"""What several test modules share: the bundles, and a tiny data set made once per test process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from competition import Competition

PROJECT = Path(__file__).parents[1]
BUNDLES = PROJECT / "bundles"
SHARED_DATA = PROJECT.parent / "shared" / "data"


@pytest.fixture
def competition(tmp_path: Path) -> Competition:
    """Two patients: 10 is healthy and has one series, 20 has two and an injured kidney and bowel."""
    from competition import Competition

    made = Competition(tmp_path / "rsna")
    made.patient("10")
    made.patient("20", kidney_high=1, bowel_injury=1)
    made.add_series("10", "1")
    made.add_series("20", "2")
    made.add_series("20", "3", head_first=False)
    made.write_tables()
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


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
