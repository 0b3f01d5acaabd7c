"""The score of an evaluator equals the score of its predictions, over series, patients and processes."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.transforms import Activationsd, Compose

from trauma_monai.handlers import StudyBatch, TraumaScore, TruthBatch
from trauma_monai.inferers import StudyInferer
from trauma_monai.labels import StudyTruthd
from trauma_monai.losses import InjuryLoss
from trauma_monai.metrics import Score, best_constant, trauma_score
from trauma_monai.pooling import PoolSlicesd, SubmissionColumns
from trauma_monai.targets import GROUPS, SUBMISSION_COLUMNS, TARGETS

BLEEDING = ["extravasation_injury", "bowel_injury"]


def label(*injuries: str) -> dict[str, int]:
    return {name: int(name in injuries) for name in TARGETS}


def item(patient: str, series: str, probabilities: list[float], *injuries: str, **more: Any) -> dict[str, Any]:
    """What validation leaves of one series: batch and output of the engine in one."""
    return {
        "patient_id": patient,
        "series_id": series,
        "pred": torch.tensor(probabilities),
        "truth": torch.tensor([float(value) for value in label(*injuries).values()]),
        **more,
    }


# Patient 1 bleeds and shows it in its second series, patient 2 has a bowel injury, patient 3 nothing.
ITEMS = [
    item("1", "10", [0.2, 0.1], "extravasation_injury", aortic_hu=150.0),
    item("1", "11", [0.9, 0.3], "extravasation_injury", aortic_hu=300.0),
    item("2", "20", [0.1, 0.6], "bowel_injury", aortic_hu=None),
    item("3", "30", [0.4, 0.2]),
]


def scored(metric: TraumaScore, items: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of an engine that yields these items, two in a batch."""

    def step(engine: Engine, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        engine.state.batch = [{k: v for k, v in one.items() if k != "pred"} for one in batch]
        return [{"pred": one["pred"]} for one in batch]

    engine = Engine(step)
    metric.attach(engine, "trauma_score")
    return engine.run([items[i : i + 2] for i in range(0, len(items), 2)]).metrics


def expected_score(probabilities: dict[str, list[float]]) -> Score:
    """The score of these three patients' pooled predictions, by way of the tables of the competition."""
    columns = SubmissionColumns()({name: np.array(values) for name, values in probabilities.items()})
    index = pd.Index(["1", "2", "3"], name="patient_id")
    return trauma_score(solution(), pd.DataFrame(columns, index=index))


def solution() -> pd.DataFrame:
    truth = pd.DataFrame(0, index=pd.Index(["1", "2", "3"], name="patient_id"), columns=list(SUBMISSION_COLUMNS))
    for columns in GROUPS.values():
        truth[columns[0]] = 1
    truth.loc["1", ["extravasation_healthy", "extravasation_injury"]] = [0, 1]
    truth.loc["2", ["bowel_healthy", "bowel_injury"]] = [0, 1]
    return truth


def test_score_is_that_of_the_patients_with_the_series_pooled_by_max():
    metrics = scored(TraumaScore(BLEEDING), ITEMS)
    expected = expected_score({"extravasation_injury": [0.9, 0.1, 0.4], "bowel_injury": [0.3, 0.6, 0.2]})
    assert metrics["trauma_score"] == pytest.approx(expected.score, abs=1e-7)
    assert {name: metrics[name] for name in expected.parts} == pytest.approx(expected.parts, abs=1e-6)
    assert metrics["best_constant"] == pytest.approx(best_constant(solution()).score)
    assert metrics["auc_extravasation_injury"] == metrics["auc_bowel_injury"] == metrics["auc"] == 1.0


def test_series_may_be_pooled_by_the_late_phase():
    metrics = scored(TraumaScore(BLEEDING, series_mode="lowest_aortic_hu"), ITEMS)
    expected = expected_score({"extravasation_injury": [0.2, 0.1, 0.4], "bowel_injury": [0.1, 0.6, 0.2]})
    assert metrics["trauma_score"] == pytest.approx(expected.score, abs=1e-7)
    assert metrics["auc_extravasation_injury"] == 0.5  # patient 1 ranks above 2 and below 3


def test_series_seen_twice_counts_once():
    """DistributedSampler repeats items to give every process as many."""
    metrics = scored(TraumaScore(BLEEDING, series_mode="mean"), [*ITEMS, ITEMS[1], ITEMS[1]])
    assert metrics["trauma_score"] == scored(TraumaScore(BLEEDING, series_mode="mean"), ITEMS)["trauma_score"]


def test_organ_model_is_scored_on_all_targets():
    sure = [float(value) for value in label("liver_injury", "liver_low").values()]
    items = [item("1", "1", sure, "liver_injury", "liver_low"), item("2", "2", [0.0] * 11)]
    metrics = scored(TraumaScore(list(TARGETS), columns=SubmissionColumns(extravasation_prior=None)), items)
    assert metrics["trauma_score"] == pytest.approx(0, abs=1e-5)
    assert metrics["auc_liver_low"] == 1.0
    assert np.isnan(metrics["auc_spleen_low"])  # nobody has it
    assert metrics["auc"] == 1.0


def test_groups_without_targets_are_said_to_be_constants(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        TraumaScore(BLEEDING)
    assert "Not assessed by this model, scored as constants: kidney, liver, spleen" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        TraumaScore(list(TARGETS))
    assert not caplog.text


def test_each_epoch_starts_afresh():
    metric = TraumaScore(BLEEDING)
    scored(metric, ITEMS[:3])
    metric.reset()
    metric.update(ITEMS)
    assert metric.compute() == scored(TraumaScore(BLEEDING), ITEMS)["trauma_score"]


def test_predictions_are_written_one_row_per_series(tmp_path: Path):
    path = tmp_path / "eval" / "predictions.csv"
    scored(TraumaScore(BLEEDING, predictions_path=path), [*ITEMS[::-1], ITEMS[0]])
    table = pd.read_csv(path, dtype={"patient_id": str, "series_id": str})
    assert list(table.columns) == ["patient_id", "series_id", "aortic_hu", *BLEEDING]
    assert list(table["series_id"]) == ["10", "11", "20", "30"]
    np.testing.assert_allclose(table["extravasation_injury"], [0.2, 0.9, 0.1, 0.4], rtol=1e-6)
    assert table["aortic_hu"].isna().tolist() == [False, False, True, True]
    assert [file.name for file in path.parent.iterdir()] == ["predictions.csv"]


def test_validation_that_cannot_be_scored_is_refused():
    metric = TraumaScore(BLEEDING)
    with pytest.raises(NotComputableError, match="the validation set is empty"):
        metric.compute()
    with pytest.raises(KeyError, match="a validation item has no 'series_id'; it has patient_id, pred, truth"):
        metric.update([{key: value for key, value in ITEMS[0].items() if key not in ("series_id", "aortic_hu")}])
    with pytest.raises(ValueError, match=r"'pred' \(add PoolSlicesd\) has shape \(4, 2\); expected \(2,\)"):
        metric.update([{**ITEMS[0], "pred": torch.zeros(4, 2)}])
    with pytest.raises(ValueError, match=r"'truth' .all targets of StudyTruthd. has shape \(2,\); expected \(11,\)"):
        metric.update([{**ITEMS[0], "truth": torch.zeros(2)}])
    with pytest.raises(ValueError, match="series of patient 1 have different labels"):
        scored(metric, [ITEMS[0], item("1", "11", [0.1, 0.1])])
    with pytest.raises(ValueError, match="cover liver in part"):
        TraumaScore(["liver_injury"])


def test_batches_that_are_not_decollated_are_refused():
    engine = Engine(lambda engine, batch: {"pred": batch})
    TraumaScore(BLEEDING).attach(engine, "trauma_score")
    with pytest.raises(ValueError, match="the evaluator needs decollate true"):
        engine.run([torch.zeros(1, 2)])


class Brightness(torch.nn.Module):
    """Slice logits: the mean of each slice group, for both targets, the second negated."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        mean = self.scale * image.mean((2, 3, 4))
        return torch.stack([mean, -mean], dim=-1)


def studies() -> list[dict[str, Any]]:
    """Series of one or two windows of 2 slice groups; the brightest group decides."""
    found = []
    for number, (brightness, injuries) in enumerate([([-1, 2], ["extravasation_injury"]), ([-3], ["bowel_injury"])]):
        image = torch.zeros(len(brightness), 2, 3, 4, 4)
        image[:, 1] += torch.tensor(brightness).view(-1, 1, 1, 1)
        found.append(
            {
                "image": MetaTensor(image),
                "label": label(*injuries),
                "patient_id": f"p{number}",
                "series_id": f"s{number}",
                "aortic_hu": float("nan"),
            }
        )
    return found


def test_evaluator_of_monai_scores_studies_of_different_length_and_keeps_the_best():
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(studies(), StudyTruthd()), batch_size=1),
        network=Brightness(),
        prepare_batch=TruthBatch(),
        inferer=StudyInferer(windows_per_batch=1),
        postprocessing=Compose([Activationsd("pred", sigmoid=True), PoolSlicesd()]),
        key_val_metric={"trauma_score": TraumaScore(BLEEDING)},
        metric_cmp_fn=operator.lt,
    )
    evaluator.run()

    def sigmoid(x: float) -> float:
        return 1 / (1 + np.exp(-x))

    expected = SubmissionColumns()(
        {
            "extravasation_injury": np.array([sigmoid(2), sigmoid(0)]),
            "bowel_injury": np.array([sigmoid(1), sigmoid(3)]),
        }
    )
    truth = solution().iloc[:2]
    score = trauma_score(truth, pd.DataFrame(expected, index=truth.index))
    assert evaluator.state.metrics["trauma_score"] == pytest.approx(score.score)
    assert evaluator.state.metrics["bowel"] == pytest.approx(score.parts["bowel"])
    assert evaluator.state.best_metric == evaluator.state.metrics["trauma_score"]
    assert evaluator.state.output[0]["slice_probabilities"].shape == (1, 2, 2)


class WithMasks(Brightness):
    """The same, and a mask head of four organs."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return super().forward(image), [image[:, :, :1].expand(-1, -1, 4, -1, -1) * self.scale]


@pytest.mark.parametrize("decollate", [False, True])
def test_trainer_of_monai_learns_from_study_batches(decollate: bool):
    windows = [
        {
            "image": MetaTensor(torch.rand(1, 2, 3, 4, 4)),
            "label": torch.rand(1, 2, 2),
            "organs": torch.randint(0, 5, (1, 2, 4, 4), dtype=torch.uint8),
        }
        for _ in range(4)
    ]
    network = WithMasks()
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=DataLoader(Dataset(windows), batch_size=2),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=InjuryLoss(mask_weight=0.25),
        prepare_batch=StudyBatch(),
        inferer=StudyInferer(),
        decollate=decollate,
    )
    trainer.run()
    assert network.scale.item() != 1


def test_study_batch_gives_plain_tensors_and_leaves_out_masks_that_are_not_there():
    batch = {"image": MetaTensor(torch.zeros(1, 1, 2, 3, 4, 4)), "label": torch.zeros(1, 1, 2, 5)}
    image, target = StudyBatch()(batch)
    assert not isinstance(image, MetaTensor)
    assert set(target) == {"label"}
    with pytest.raises(KeyError, match="the batch has no 'truth'; it has image, label"):
        TruthBatch()(batch)


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    # Three series for one process; for the other two, the last of them padding.
    items = [ITEMS[0], ITEMS[2], ITEMS[3]] if rank == 0 else [ITEMS[1], ITEMS[0]]
    path = Path(folder) / "predictions.csv"
    metrics = scored(TraumaScore(BLEEDING, predictions_path=path), items)
    pd.Series(metrics).to_json(Path(folder) / f"{rank}.json", double_precision=15)
    torch.distributed.destroy_process_group()


def test_two_processes_score_like_one(tmp_path: Path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    one = scored(TraumaScore(BLEEDING), ITEMS)
    for rank in range(2):
        two = pd.read_json(tmp_path / f"{rank}.json", typ="series").to_dict()
        assert two == pytest.approx(one, abs=1e-12)
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 4
