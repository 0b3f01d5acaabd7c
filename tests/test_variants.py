"""The twelve variants of the published system: each one's numbers, worked out by hand, from its own file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from conftest import BUNDLES, PROJECT
from trauma_monai.stacks import slice_windows

BUNDLE = BUNDLES / "trauma_ct_classification"
CONFIGS = BUNDLE / "configs"
ENSEMBLE = CONFIGS / "ensembles/first_place_2023.yaml"
REFERENCE = "# reference: train_"
PUBLISHED = [path for path in sorted((CONFIGS / "variants").glob("*.yaml")) if path.read_text().startswith(REFERENCE)]
NAMES = [path.stem for path in PUBLISHED]

TEN = (
    *("liver_injury", "spleen_injury", "kidney_injury", "liver_low", "liver_high"),
    *("spleen_low", "spleen_high", "kidney_low", "kidney_high", "bowel_injury"),
)


def parsed(name: str, **overrides: Any) -> ConfigParser:
    files = [CONFIGS / "train.yaml", CONFIGS / f"variants/{name}.yaml"]
    parser = ConfigParser(ConfigParser.load_config_files(files))
    parser.update({"bundle_root": str(BUNDLE), "device": "cpu", **overrides})
    return parser


def reference_of(name: str) -> str:
    first = (CONFIGS / f"variants/{name}.yaml").read_text().splitlines()[0]
    return first.removeprefix("# reference: ")


def test_the_twelve_scripts_of_the_first_place_have_a_variant_each() -> None:
    assert len(PUBLISHED) == 12
    assert len({reference_of(name) for name in NAMES}) == 12


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_systems_says_which_script_a_variant_is(name: str) -> None:
    rows = (PROJECT / "docs/systems.md").read_text().splitlines()
    assert any(row.startswith(f"| `{reference_of(name)}` | `{name}` |") for row in rows)


def test_the_ensemble_lists_the_twenty_five_checkpoints_by_the_naming_rule() -> None:
    members = ConfigParser.load_config_file(ENSEMBLE)["members"]
    assert len(members) == 25
    assert {member["variant"] for member in members} == set(NAMES)
    for member in members:
        where = "all" if member["fold"] == -1 else f"fold{member['fold']}"
        assert member["checkpoint"] == f"{member['variant']}_{where}_seed{member['seed']}.pt"


@pytest.mark.parametrize("name", NAMES)
def test_the_ensemble_names_the_fold_and_seed_that_a_variant_trains_with(name: str) -> None:
    parser = parsed(name)
    own = [member for member in ConfigParser.load_config_file(ENSEMBLE)["members"] if member["variant"] == name]
    assert parser["fold"] in {member["fold"] for member in own}
    if len({member["seed"] for member in own}) == 1:
        assert own[0]["seed"] == parser["seed"]


@pytest.mark.parametrize("name", NAMES)
def test_windows_are_those_of_the_published_code(name: str) -> None:
    select = parsed(name).get_parsed_content("flow::1")
    counts = [
        len(slice_windows(slices, select.mode, select.length, select.window, select.max_slices))
        for slices in (99, 100, 101, 250, 400, 401, 650)
    ]
    assert counts == [1, 1, 2, 3, 4, 3, 4]
    assert select.length == 96


@pytest.mark.parametrize("name", NAMES)
def test_only_organ_models_crop(name: str) -> None:
    sample = {"image": torch.zeros(1, 1, 1, 8, 8), "organs": torch.zeros(1, 1, 8, 8), "study_box": [1, 5, 2, 8]}
    cropped = parsed(name).get_parsed_content("flow::4")(sample)["image"]
    assert tuple(cropped.shape[-2:]) == ((4, 6) if name.startswith("organs") else (8, 8))


def expected_soft_labels(name: str) -> tuple[tuple[str, ...], list[list[float]]]:
    """What two slice groups get; bowel is marked in both, which the CoaT models multiply by .8 and .4."""
    bowel = [1.0, 1.0] if "effnet" in name else [0.8, 0.4]
    if name.startswith("organs"):
        # liver high x .5, 0; kidney low x .25, 1; no spleen injury
        first = [0.5, 0.0, 0.25, 0.0, 0.5, 0.0, 0.0, 0.25, 0.0, bowel[0]]
        second = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, bowel[1]]
        return TEN, [first, second]
    if name == "bleed_effnet_s":
        return ("extravasation_injury", "bowel_injury"), [[0.0, bowel[0]], [1.0, bowel[1]]]
    return ("bowel_injury", "extravasation_injury"), [[bowel[0], 0.0], [bowel[1], 1.0]]


@pytest.mark.parametrize("name", NAMES)
def test_soft_labels_are_those_of_the_published_code(name: str) -> None:
    injured = ("liver_injury", "liver_high", "kidney_injury", "kidney_low", "bowel_injury", "extravasation_injury")
    sample = {
        "label": {target: float(target in injured) for target in (*TEN, "extravasation_injury")},
        # columns liver, spleen, kidney, bowel
        "visibility": torch.tensor([[[0.5, 1.0, 0.25, 0.8], [0.0, 0.5, 1.0, 0.4]]]),
        # columns bowel, extravasation
        "frame_labels": torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]),
    }
    targets, expected = expected_soft_labels(name)
    parser = parsed(name)
    assert tuple(parser["targets"]) == targets
    labels = parser.get_parsed_content("train::supervision::0")(sample)["label"]
    torch.testing.assert_close(labels, torch.tensor([expected]))


# Five batches are 3 optimizer steps. The cosine from lr to 0 takes 3 x epochs x factor steps, whole or not.
SCHEDULES = {
    # 3 x 12 x 1 = 36: at a quarter (1 + cos 45 deg) / 2 = .8535534 of 9e-5, half, and nothing at the end
    "organs_coat_m_unet_gru256_mask15": {0: 9e-5, 9: 7.6819806e-5, 18: 4.5e-5, 36: 0.0},
    # 3 x 12 x 1.2 = 43.2: the training ends at step 36, before the cosine does
    "organs_coat_m_heads": {0: 1e-4, 36: 1e-4 * (1 + math.cos(math.pi * 36 / 43.2)) / 2},
    # 3 x 10 x 1.05 = 31.5
    "bleed_effnet_s": {0: 2e-4, 30: 2e-4 * (1 + math.cos(math.pi * 30 / 31.5)) / 2},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_falls_as_published(name: str) -> None:
    network = {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}
    parser = parsed(name, network=network, **{"train::dataloader": [0, 1, 2, 3, 4]})
    optimizer, schedule = (parser.get_parsed_content(part) for part in ("optimizer", "lr_scheduler"))
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in SCHEDULES[name].items():
        assert rates[step] == pytest.approx(rate, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_lowers_the_loss_and_masks_have_the_size_of_the_image(name: str) -> None:
    torch.manual_seed(0)
    parser = parsed(name, image_size=64, dropout=0.0, pretrained=False)
    image = torch.rand(1, 1, 2, 3, 64, 64)
    labels = torch.randint(0, 2, (1, 1, 2, len(parser["targets"]))).float()
    target = {"label": labels, "organs": torch.randint(0, 5, (1, 1, 2, 64, 64), dtype=torch.uint8)}
    network, loss, optimizer, inferer = (
        parser.get_parsed_content(part) for part in ("network", "loss", "optimizer", "train::inferer")
    )
    network.train()
    pred = inferer(image, network)
    heads = 2 if parser["mask_decoder"] == "heads" else 1
    organs = 3 if name.startswith("organs_effnet") else 4
    assert [tuple(mask.shape) for mask in pred[1]] == [(1, 1, 2, organs, 64, 64)] * heads
    before = loss(pred, target)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = loss(inferer(image, network), target)
    assert after < before


def test_the_path_of_the_ensemble_exists_from_the_file_on() -> None:
    folder = ConfigParser.load_config_file(ENSEMBLE)["folder"]
    assert (ENSEMBLE.parent / folder).resolve() == (Path(BUNDLE) / "models").resolve()
