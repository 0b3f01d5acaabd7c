"""networks/encoders.py: timm's layers, our forward pass."""

from __future__ import annotations

import pytest
import timm
import torch

from trauma_monai.networks import create_encoder

SIZE = 64
ENCODERS = ["test_resnet", "test_efficientnet", "coat_lite_tiny"]


@pytest.mark.parametrize("name", ENCODERS)
def test_maps_equal_those_of_timm(name: str):
    encoder = create_encoder(name, image_size=SIZE).eval()
    size = {"img_size": SIZE} if name.startswith("coat") else {}
    published = timm.create_model(name, num_classes=0, **size).eval()
    published.load_state_dict(as_timm_names(encoder.state_dict(), published.state_dict()), strict=False)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = published.forward_intermediates(images, intermediates_only=True)
        maps = encoder(images)
    assert [tuple(found.shape) for found in maps] == [tuple(timm_map.shape) for timm_map in expected]
    assert all(torch.equal(found, timm_map) for found, timm_map in zip(maps, expected, strict=True))
    assert encoder.channels == [found.shape[1] for found in maps]


def as_timm_names(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give our tensors timm's names, by their order: both list the layers as the image passes them."""
    renamed = {}
    for name, tensor in ours.items():
        new = name.removeprefix("features.").removeprefix("head.")
        if name.startswith("stages.") and "class_token" not in name:
            stage = int(name.split(".")[1])
            new = name.removeprefix(f"stages.{stage}.")
            new = new.replace("projection.", f"patch_embed{stage + 1}.proj.").replace(
                "blocks.", f"serial_blocks{stage + 1}."
            )
            new = f"patch_embed{stage + 1}.{new}" if new.startswith("norm.") else new
        elif "class_token" in name:
            new = f"cls_token{int(name.split('.')[1]) + 1}"
        assert new in theirs
        renamed[new] = tensor
    return renamed


def test_coat_takes_any_image_size():
    encoder = create_encoder("coat_lite_tiny", image_size=SIZE).eval()
    with torch.no_grad():
        maps = encoder(torch.rand(1, 3, 96, 32))
    assert [tuple(found.shape[2:]) for found in maps] == [(24, 8), (12, 4), (6, 2), (3, 1)]


def test_the_convolution_before_the_pooling_of_efficientnet_is_kept():
    encoder = create_encoder("tf_efficientnetv2_s")
    assert encoder.channels == [24, 48, 64, 160, 256]
    assert encoder.num_features == 1280
    assert encoder.head(torch.rand(1, 256, 2, 2)).shape == (1, 1280, 2, 2)


@pytest.mark.parametrize("name", ENCODERS)
def test_no_layer_is_left_without_a_gradient(name: str):
    encoder = create_encoder(name, image_size=SIZE)
    encoder.head(encoder(torch.rand(2, 3, SIZE, SIZE))[-1]).sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_images_may_have_another_number_of_channels():
    assert create_encoder("test_resnet", in_channels=5)(torch.rand(1, 5, SIZE, SIZE))[0].shape[0] == 1


def test_a_misspelt_encoder_is_named():
    with pytest.raises(ValueError, match="'coat_light' is no model of timm"):
        create_encoder("coat_light")


def test_coat_with_parallel_blocks_is_refused():
    with pytest.raises(ValueError, match="use one of coat_lite_"):
        create_encoder("coat_tiny", image_size=SIZE)


def test_missing_pretrained_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch):
    def offline(*_args: object, **_options: object) -> None:
        raise OSError("hub not reachable")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"hub not reachable.*set pretrained to false"):
        create_encoder("test_resnet", pretrained=True)
