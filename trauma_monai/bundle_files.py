"""Where the bundles lie, and which of their config files make a network."""

from __future__ import annotations

from pathlib import Path

__all__ = ["ORGAN_BUNDLE", "TRAUMA_BUNDLE", "config_files", "find_bundle", "find_bundles"]

ORGAN_BUNDLE = "organ_ct_segmentation"
TRAUMA_BUNDLE = "trauma_ct_classification"


def find_bundle(name: str, bundles_dir: Path | None = None) -> Path:
    """Find a bundle in ``bundles_dir``, else inside the installed package, else beside it in a checkout.

    Raises:
        ValueError: when it is in none of these.
    """
    package = Path(__file__).resolve().parent
    places = [Path(bundles_dir)] if bundles_dir is not None else [package / "bundles", package.parent / "bundles"]
    for place in places:
        if (place / name / "configs").is_dir():
            return place / name
    raise ValueError(f"no bundle {name!r} in {' or '.join(map(str, places))}; expected its folder with configs/ there.")


def config_files(bundle_root: Path, variant: str | None) -> list[Path]:
    """Return the bundle's inference config and, over it, that of a variant.

    Raises:
        ValueError: for a folder without configs, and for a variant that the bundle does not have.
    """
    configs = bundle_root / "configs"
    base = _config_file(configs, "inference")
    if base is None:
        raise ValueError(f"{configs} holds no inference.yaml or inference.json; expected a bundle's configs.")
    if variant is None:
        return [base]
    overlay = _config_file(configs / "variants", variant)
    if overlay is None:
        known = sorted(path.stem for path in (configs / "variants").glob("*"))
        raise ValueError(f"{bundle_root.name} has no variant {variant!r}; it has {', '.join(known) or 'none'}.")
    return [base, overlay]


def _config_file(folder: Path, stem: str) -> Path | None:
    # A packaged bundle is JSON, as the model zoo has it.
    return next((path for kind in ("yaml", "json") if (path := folder / f"{stem}.{kind}").is_file()), None)


def find_bundles(bundles_dir: Path | str | None) -> tuple[Path, Path]:
    """Find both bundles, organ and trauma; see :func:`find_bundle`."""
    place = None if bundles_dir is None else Path(bundles_dir)
    return find_bundle(ORGAN_BUNDLE, place), find_bundle(TRAUMA_BUNDLE, place)
