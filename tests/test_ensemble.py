"""Several networks as one: averages worked out by hand, one network in memory, and what a list may not say."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.data import MetaTensor

from conftest import BUNDLES
from trauma_monai.bundle_files import ORGAN_BUNDLE, TRAUMA_BUNDLE
from trauma_monai.classifier import TraumaClassifier, TraumaFlow
from trauma_monai.ensemble import EnsembleClassifier, Member, read_ensemble
from trauma_monai.pipeline import predict
from trauma_monai.pooling import pool_study

CPU = torch.device("cpu")
TINY = {"encoder": "test_resnet", "image_size": 32, "hidden_size": 2, "num_groups": 2, "window_slices": 8}
ORGANS = {**TINY, "targets": ["liver_injury", "liver_low", "liver_high", "bowel_injury"]}
BLEED = {**TINY, "targets": ["extravasation_injury", "bowel_injury"], "region": "none"}


@pytest.fixture
def bundles_dir(tmp_path: Path) -> Path:
    """Both bundles; of trauma, two tiny variants."""
    folder = tmp_path / "bundles"
    shutil.copytree(BUNDLES / ORGAN_BUNDLE / "configs", folder / ORGAN_BUNDLE / "configs")
    configs = folder / TRAUMA_BUNDLE / "configs"
    (configs / "variants").mkdir(parents=True)
    shutil.copy(BUNDLES / TRAUMA_BUNDLE / "configs/inference.yaml", configs)
    for name, content in {"organs": ORGANS, "bleed": BLEED}.items():
        (configs / f"variants/{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def save_network(root: Path, variant: str, path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    torch.save(TraumaFlow(root, variant, CPU).build_network().state_dict(), path)
    return path


def save_constant_network(root: Path, variant: str, path: Path, probability: float) -> Path:
    """A network that says the same of every slice."""
    network = TraumaFlow(root, variant, CPU).build_network()
    torch.nn.init.zeros_(network.classifier.weight)
    torch.nn.init.constant_(network.classifier.bias, float(np.log(probability / (1 - probability))))
    torch.save(network.state_dict(), path)
    return path


def series() -> tuple[MetaTensor, MetaTensor]:
    """16 slices of noise with a liver in the middle: two windows of 8 slices, of which 6 are kept."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(-200, 300, (1, 24, 20, 16), generator=generator, dtype=torch.int16)
    organs = torch.zeros(1, 24, 20, 16, dtype=torch.uint8)
    organs[:, 6:18, 5:15, 4:12] = 1
    affine = torch.diag(torch.tensor([2.0, 2.0, 5.0, 1.0], dtype=torch.float64))
    return MetaTensor(image, affine=affine), MetaTensor(organs, affine=affine)


def slice_probabilities(root: Path, member: Member) -> np.ndarray:
    """What one network says of each slice group of each window, shape (W, S, T)."""
    single = TraumaClassifier(root, member.checkpoint, member.variant, CPU)
    return single.flow.run(single.network, single.flow.prepare(*series())).double().numpy()


def test_folds_are_averaged_slice_by_slice_before_the_maximum_and_variants_after_it(bundles_dir, tmp_path):
    root = bundles_dir / TRAUMA_BUNDLE
    members = [
        Member(variant, save_network(root, variant, tmp_path / f"{variant}{seed}.pt", seed))
        for variant in ("organs", "bleed")
        for seed in (1, 2)
    ]
    outputs, scores = EnsembleClassifier(root, members, CPU)(*series())
    pooled = pool_study([outputs])

    of_slices = [slice_probabilities(root, member) for member in members]
    organs = ((of_slices[0] + of_slices[1]) / 2).max(axis=(0, 1))
    bleed = ((of_slices[2] + of_slices[3]) / 2).max(axis=(0, 1))
    by_hand = {
        "liver_injury": organs[0],
        "liver_low": organs[1],
        "liver_high": organs[2],
        "bowel_injury": (organs[3] + bleed[1]) / 2,
        "extravasation_injury": bleed[0],
    }
    assert pooled == pytest.approx(by_hand, abs=1e-6)
    # The order matters: the mean of the maxima is another number.
    maxima = [one.max(axis=(0, 1)) for one in of_slices]
    of_maxima = np.concatenate([(maxima[0] + maxima[1]) / 2, (maxima[2] + maxima[3]) / 2])
    assert not np.allclose(np.concatenate([organs, bleed]), of_maxima, atol=1e-4)
    # Groups of slices 0-2, 3-5, 8-10 and 11-13 are judged by their middle ones.
    assert scores.z_index.tolist() == [1, 4, 9, 12]
    assert scores.targets == tuple(by_hand)
    liver = (of_slices[0] + of_slices[1])[..., 0].reshape(-1) / 2
    np.testing.assert_allclose(scores.probabilities[:, 0], liver, atol=1e-6)


def test_weights_count_among_the_folds_and_their_mean_among_the_variants(bundles_dir, tmp_path):
    root = bundles_dir / TRAUMA_BUNDLE
    members = [
        Member("organs", save_constant_network(root, "organs", tmp_path / "a.pt", 0.2), 1.0),
        Member("organs", save_constant_network(root, "organs", tmp_path / "b.pt", 0.6), 3.0),
        Member("bleed", save_constant_network(root, "bleed", tmp_path / "c.pt", 0.8), 1.0),
    ]
    pooled = pool_study([EnsembleClassifier(root, members, CPU)(*series())[0]])
    # organs: (.2 + 3 x .6) / 4 = .5, with a weight of 2; bowel: (2 x .5 + .8) / 3
    assert pooled["liver_injury"] == pytest.approx(0.5, abs=1e-6)
    assert pooled["bowel_injury"] == pytest.approx(0.6, abs=1e-6)
    assert pooled["extravasation_injury"] == pytest.approx(0.8, abs=1e-6)


def test_one_network_is_in_memory_at_a_time(bundles_dir, tmp_path, monkeypatch):
    root = bundles_dir / TRAUMA_BUNDLE
    paths = [save_network(root, name, tmp_path / f"{name}{i}.pt", i) for name in ("organs", "bleed") for i in (1, 2)]
    members = [Member(path.stem[:-1], path) for path in paths]
    build = TraumaFlow.build_network
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    counts = []

    def counted(flow: TraumaFlow) -> torch.nn.Module:
        network = build(flow)
        alive.add(network)
        counts.append(len(alive))
        return network

    monkeypatch.setattr(TraumaFlow, "build_network", counted)
    EnsembleClassifier(root, members, CPU)(*series())
    assert counts == [1, 1]  # two architectures, each built once for its two checkpoints


def write_list(folder: Path, members: Any, **entries: Any) -> Path:
    path = folder / "list.yaml"
    path.write_text(yaml.safe_dump({**entries, "members": members}))
    return path


def test_predict_runs_an_ensemble_with_its_scaling_factors(bundles_dir, tmp_path):
    root = bundles_dir / TRAUMA_BUNDLE
    for variant, probability in (("organs", 0.2), ("bleed", 0.5)):
        save_constant_network(root, variant, tmp_path / f"{variant}.pt", probability)
    (tmp_path / "oof.yaml").write_text(yaml.safe_dump({"scales": {"bowel_injury": 2.0}}))
    members = [{"variant": name, "fold": -1, "seed": 1, "checkpoint": f"{name}.pt"} for name in ("organs", "bleed")]
    ensemble = write_list(tmp_path, members, scales="oof.yaml")
    organ_weights = tmp_path / "organ.pt"
    save_organ_network(bundles_dir / ORGAN_BUNDLE, organ_weights)
    image, _ = series()
    nib.save(nib.Nifti1Image(image[0].numpy(), image.affine.numpy()), tmp_path / "scan.nii.gz")

    done = predict(
        *(tmp_path / "scan.nii.gz", tmp_path / "out", organ_weights),
        ensemble=ensemble,
        organ_variant="demo",
        device="cpu",
        bundles_dir=bundles_dir,
    )
    record = read_record(tmp_path / "out/scan/probabilities.json")
    assert len(done.reports) == 1
    # bowel (.2 + .5) / 2 = .35: twice that against .65
    assert record["probabilities"]["bowel_injury"] == pytest.approx(0.7 / (0.7 + 0.65), abs=1e-5)
    assert record["not_assessed"] == ["kidney", "spleen"]
    assert record["model"]["ensemble"].startswith("list.yaml, 2 networks (sha256 ")


def save_organ_network(root: Path, path: Path) -> None:
    from monai.bundle import ConfigParser

    from trauma_monai.bundle_files import config_files

    parser = ConfigParser(ConfigParser.load_config_files(config_files(root, "demo")))
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)


def read_record(path: Path) -> Mapping[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("options", [{}, {"ensemble": "a", "variant": "b"}, {"ensemble": "a", "trauma_weights": "b"}])
def test_an_ensemble_and_weights_exclude_each_other(options, tmp_path):
    with pytest.raises(ValueError, match="either trauma weights"):
        predict(tmp_path, tmp_path / "out", "organ.pt", **options)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"members": []}, "at least one member"),
        ({"members": [{"variant": "a"}]}, "expected variant and checkpoint"),
        ({"members": [{"variant": "a", "checkpoint": "a.pt", "wieght": 2}]}, "wieght"),
        ({"members": [{"variant": "a", "checkpoint": "a.pt", "weight": 0}]}, "weight 0; expected above 0"),
        ({"members": [{"variant": "a", "checkpoint": "a.pt"}] * 2}, "more than once"),
        ({"members": [{"variant": "a", "checkpoint": "a.pt"}], "scale": "b"}, "is no ensemble"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(entries, message, tmp_path):
    (tmp_path / "a.pt").touch()
    with pytest.raises(ValueError, match=message):
        read_ensemble(write_list(tmp_path, **entries))


def test_missing_checkpoints_are_counted_and_the_first_is_named():
    path = BUNDLES / TRAUMA_BUNDLE / "configs/ensembles/first_place_2023.yaml"
    with pytest.raises(FileNotFoundError, match=r"25 of 25 checkpoints .* organs_coat_m_unet_gru256_mask25_all"):
        read_ensemble(path)


def test_missing_scales_are_named(tmp_path):
    (tmp_path / "a.pt").touch()
    with pytest.raises(FileNotFoundError, match=r"no scales at .*oof\.yaml"):
        read_ensemble(write_list(tmp_path, [{"variant": "a", "checkpoint": "a.pt"}], scales="oof.yaml"))


def test_variants_that_pool_series_differently_are_refused(bundles_dir, tmp_path):
    root = bundles_dir / TRAUMA_BUNDLE
    (root / "configs/variants/mean.yaml").write_text(yaml.safe_dump({**BLEED, "series_mode": "mean"}))
    members = [Member("organs", tmp_path / "a.pt"), Member("mean", tmp_path / "b.pt")]
    with pytest.raises(ValueError, match="pool series by max and mean"):
        EnsembleClassifier(root, members, CPU)
