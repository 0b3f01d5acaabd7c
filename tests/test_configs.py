"""Every bundle config and variant: parses, has MONAI's properties, sets known names only, and runs one forward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from conftest import BUNDLES
from trauma_monai.bundle_metadata import find_metadata_problems
from trauma_monai.zoo_checks import OWN_OF_EACH_WORKFLOW

NAMES = ("organ_ct_segmentation", "trauma_ct_classification")
VARIANTS = [path for name in NAMES for path in sorted((BUNDLES / name / "configs/variants").glob("*.yaml"))]
SYSTEMS = [(name, []) for name in NAMES] + [(path.parents[2].name, [path]) for path in VARIANTS]
SYSTEM_IDS = [f"{name}-{files[0].stem if files else 'base'}" for name, files in SYSTEMS]

# The full networks on small pictures, without a download, and a fold that the small data set has.
SMALL: dict[str, dict[str, Any]] = {
    "organ_ct_segmentation": {},
    "trauma_ct_classification": {"image_size": 64, "fold": 0, "pretrained": False},
}


def configs(name: str) -> Path:
    return BUNDLES / name / "configs"


def parsed(name: str, *files: str | Path, **overrides: Any) -> ConfigParser:
    parser = ConfigParser(ConfigParser.load_config_files([configs(name) / file for file in files]))
    parser.update({"bundle_root": str(BUNDLES / name), "device": "cpu", **overrides})
    return parser


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: f"{path.parents[2].name}-{path.stem}")
def test_a_variant_sets_known_names_to_new_values(path: Path) -> None:
    """The merge takes a misspelt name in silence, and a restated default hides what the variant changes."""
    base = ConfigParser.load_config_files([configs(path.parents[2].name) / f for f in ("inference.yaml", "train.yaml")])
    variant = ConfigParser.load_config_file(path)
    assert set(variant) <= set(base)
    assert {name for name in variant if variant[name] == base[name]} == set()


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: f"{path.parents[2].name}-{path.stem}")
def test_a_variant_sets_flat_names_or_whole_components(path: Path) -> None:
    assert [name for name in ConfigParser.load_config_file(path) if "::" in name or name.startswith("+")] == []


@pytest.mark.parametrize(("name", "files"), SYSTEMS, ids=SYSTEM_IDS)
@pytest.mark.parametrize(
    ("workflow_type", "job", "overlays"),
    [("train", "train.yaml", []), ("train", "train.yaml", ["evaluate.yaml"]), ("infer", "inference.yaml", [])],
    ids=["train", "evaluate", "inference"],
)
def test_monai_finds_every_property_it_asks_for(
    name: str,
    files: list[Path],
    workflow_type: str,
    job: str,
    overlays: list[str],
    dataset_dir: Path,
    tmp_path: Path,
) -> None:
    """MONAI builds each property that it checks: networks, data sets and engines."""
    paths = [configs(name) / job, *files, *(configs(name) / overlay for overlay in overlays)]
    weights_at = {} if workflow_type == "infer" else {"ckpt_dir": str(tmp_path)}
    workflow = ConfigWorkflow(
        config_file=[str(path) for path in paths],
        meta_file=str(configs(name) / "metadata.json"),
        logging_file=False,
        workflow_type=workflow_type,
        dataset_dir=str(dataset_dir),
        output_dir=str(tmp_path),
        num_workers=0,
        **weights_at,
        **SMALL[name],
    )
    workflow.initialize()
    assert not workflow.check_properties()


@pytest.mark.parametrize("name", NAMES)
def test_training_and_inference_agree_on_what_they_share(name: str) -> None:
    train, inference = (ConfigParser.load_config_file(configs(name) / f) for f in ("train.yaml", "inference.yaml"))
    shared = set(train) & set(inference) - OWN_OF_EACH_WORKFLOW
    assert {"network_def", "flow", "window"} <= shared
    assert {key: train[key] for key in shared} == {key: inference[key] for key in shared}


@pytest.mark.parametrize(("name", "files"), SYSTEMS, ids=SYSTEM_IDS)
def test_the_network_of_every_variant_gives_what_the_metadata_says(name: str, files: list[Path]) -> None:
    parser = parsed(name, "inference.yaml", *files, **SMALL[name])
    network = parser.get_parsed_content("network_def").eval()
    if name == "trauma_ct_classification":
        groups, channels = 2, parser.get_parsed_content("channels")
        image, expected = torch.rand(1, groups, channels, 64, 64), (1, groups, len(parser["targets"]))
    else:
        image, expected = torch.rand(1, 1, 16, 64, 64), (1, 5, 16, 64, 64)
    with torch.no_grad():
        pred = network(image)
    assert isinstance(pred, torch.Tensor)
    assert tuple(pred.shape) == expected


@pytest.mark.parametrize("name", NAMES)
def test_metadata_agrees_with_the_configs_and_its_own_changelog(name: str) -> None:
    metadata = ConfigParser.load_config_file(configs(name) / "metadata.json")
    assert metadata["version"] in metadata["changelog"]
    inference = ConfigParser.load_config_file(configs(name) / "inference.yaml")
    assert list(find_metadata_problems(metadata, inference)) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_page_on_the_flow_has_the_steps_in_the_order_of_the_config(name: str) -> None:
    steps = parsed(name, "inference.yaml").get_parsed_content("preprocessing").flatten().transforms
    in_config = list(dict.fromkeys(type(step).__name__ for step in steps))
    page = (BUNDLES.parent / "docs/flow.md").read_text()
    _, organ_table, trauma_table = re.split(r"^## The organ bundle|^## The trauma bundle", page, flags=re.MULTILINE)
    table = {"organ_ct_segmentation": organ_table, "trauma_ct_classification": trauma_table}[name]
    first_column = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    on_page = [step for cell in first_column for step in re.findall(r"`(\w+)`", cell) if step in in_config]
    assert on_page == [step for step in in_config if step != "ScaleIntensityRanged"], "of which nobody asks the shape"


@pytest.mark.parametrize("overlay", ["multi_gpu_train.yaml", "multi_gpu_evaluate.yaml"])
def test_both_bundles_go_parallel_in_the_same_way(overlay: str) -> None:
    organ, trauma = (ConfigParser.load_config_file(configs(name) / overlay) for name in NAMES)
    shared = organ.keys() & trauma.keys() - {"network"}
    assert {"imports", "device", "backend", "rank", "world_size", "initialize", "finalize"} <= shared
    for key in shared:
        own, others = (
            [line for line in config[key] if "check_switches" not in str(line)] if key == "initialize" else config[key]
            for config in (organ, trauma)
        )
        assert own == others, key


@pytest.mark.parametrize(
    "path", sorted(BUNDLES.glob("*/configs/**/*.yaml")), ids=lambda p: f"{p.parents[1].name}-{p.stem}"
)
def test_no_number_is_written_in_a_way_that_yaml_reads_as_text(path: Path) -> None:
    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        if isinstance(value, list):
            return [text for item in value for text in texts(item)]
        return [value] if isinstance(value, str) else []

    def is_number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    assert [text for text in texts(ConfigParser.load_config_file(path)) if is_number(text)] == []
