"""What TensorBoard shows of a training batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trauma_monai.sample_pictures import SamplePictures, draw_sample

LIVER = [0xE6, 0x9F, 0x00]


def volume_sample() -> dict:
    """Two slices of 2 x 2 pixels: grey 0 and 1; liver (code 1) lies at the top left, the network sees it."""
    image = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).expand(1, 2, 2, 2).clone()
    label = torch.zeros(1, 2, 2, 2)
    label[0, :, 0, 0] = 1
    logits = torch.full((5, 2, 2, 2), -1.0)
    logits[0, :, 0, 0] = 1.0
    return {"image": image, "label": label, "pred": logits}


def stack_sample(masks: bool = True) -> dict:
    image = torch.rand(1, 4, 3, 8, 8)
    organs = torch.zeros(1, 4, 8, 8, dtype=torch.uint8)
    logits = torch.zeros(1, 4, 11)
    pred = (logits, [torch.randn(1, 4, 4, 8, 8), torch.randn(1, 4, 4, 8, 8)]) if masks else logits
    return {"image": image, "label": {"label": logits, "organs": organs}, "pred": pred}


def test_masks_are_drawn_above_and_predicted_ones_below():
    picture = draw_sample(volume_sample(), slices=2)
    assert picture.shape == (4, 4, 3)
    for row, column in ((0, 0), (0, 2), (2, 0), (2, 2)):
        # Black tissue under 45 % of the liver's colour.
        assert picture[row, column].tolist() == pytest.approx([0.45 * value for value in LIVER], abs=1)
    assert picture[0, 1].tolist() == [255, 255, 255]
    assert picture[1, 1].tolist() == [0, 0, 0]


def test_a_stack_shows_the_middle_slice_of_its_groups():
    sample = stack_sample()
    sample["image"][:] = 0.0
    sample["image"][:, :, 1, 0, 0] = 1.0
    assert draw_sample(sample, slices=4)[0, ::8].tolist() == [[255, 255, 255]] * 4


def test_a_network_without_mask_heads_has_one_row():
    sample = stack_sample(masks=False)
    assert draw_sample(sample, slices=2).shape == (8, 16, 3)
    assert draw_sample({**sample, "pred": (sample["pred"], None)}, slices=2).shape == (8, 16, 3)
    assert draw_sample(stack_sample(), slices=2).shape == (16, 16, 3)


def test_each_epoch_leaves_a_picture_in_the_log(tmp_path: Path):
    engine = Engine(lambda engine, batch: [volume_sample()])
    SamplePictures(tmp_path).attach(engine)
    engine.run([0], max_epochs=2)
    assert len(list(tmp_path.iterdir())) == 1
    log = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    tags = log.Tags()["images"]
    assert tags == ["sample (masks above, predicted below)"]
    assert [event.step for event in log.Images(tags[0])] == [1, 2]
