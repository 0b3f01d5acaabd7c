"""Windows of all studies go through the network as one batch, and come back sorted by study."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from trauma_monai.inferers import StudyInferer


def study(studies: int, windows: int) -> torch.Tensor:
    """(B, W, S, C, H, H) where all pixels of a slice group hold the number of that group."""
    numbers = torch.arange(studies * windows * 4.0).view(studies, windows, 4, 1, 1, 1)
    return numbers.expand(studies, windows, 4, 3, 2, 2)


class Network(torch.nn.Module):
    """Means per slice group as the only target; remembers how many windows it saw at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.ndim == 5
        assert not isinstance(image, MetaTensor)
        self.batches.append(len(image))
        return image.mean((2, 3, 4)).unsqueeze(-1)


@pytest.mark.parametrize(("windows_per_batch", "batches"), [(None, [6]), (1, [1] * 6), (4, [4, 2]), (9, [6])])
def test_windows_come_back_in_order_whatever_the_batches(windows_per_batch: int | None, batches: list[int]):
    network = Network()
    output = StudyInferer(windows_per_batch)(study(2, 3), network)
    torch.testing.assert_close(output, torch.arange(24.0).view(2, 3, 4, 1))
    assert network.batches == batches


@pytest.mark.parametrize("windows_per_batch", [None, 2])
def test_masks_beside_the_logits_are_sorted_too(windows_per_batch: int | None):
    def network(image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return image.mean((2, 3, 4)), [image[:, :, 0], image[:, :, :2]]

    image = study(1, 3)
    logits, masks = StudyInferer(windows_per_batch)(image, network)
    assert logits.shape == (1, 3, 4)
    torch.testing.assert_close(masks[0], image[:, :, :, 0])
    torch.testing.assert_close(masks[1], image[:, :, :, :2])


def test_meta_tensors_arrive_as_plain_tensors():
    assert StudyInferer()(MetaTensor(study(1, 1)), Network()).shape == (1, 1, 4, 1)


def test_dictionaries_and_network_arguments_pass_through():
    output = StudyInferer(1)(study(1, 2), lambda image, factor: {"scaled": image * factor}, 2.0)
    torch.testing.assert_close(output["scaled"], 2 * study(1, 2))


def test_gradients_flow_through_all_windows():
    image = study(1, 2).clone().requires_grad_()
    StudyInferer()(image, Network()).sum().backward()
    torch.testing.assert_close(image.grad, torch.full_like(image, 1 / 12))


def test_input_that_is_no_study_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 4, 3, 2, 2\); expected \(studies, windows, slice groups"):
        StudyInferer()(study(1, 2)[0], Network())
    with pytest.raises(ValueError, match="at least one window"):
        StudyInferer()(study(1, 0), Network())
    with pytest.raises(ValueError, match="windows_per_batch is 0; expected 1 or more"):
        StudyInferer(0)
    with pytest.raises(TypeError, match="returned a str"):
        StudyInferer()(study(1, 1), lambda image: "logits")
