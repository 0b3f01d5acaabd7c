"""networks/masks.py: organ masks learned along with the injuries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trauma_monai.networks import ConvMaskHeads, SliceSequenceNet, UNetMaskDecoder, WithOrganMasks

SIZE = 64


def training_net(decoder: str, encoder: str = "test_resnet", num_organs: int = 4) -> WithOrganMasks:
    torch.manual_seed(0)
    net = SliceSequenceNet(encoder, num_targets=3, hidden_size=8, image_size=SIZE, dropout=0.0)
    return WithOrganMasks(net, decoder, num_organs)


def stack() -> torch.Tensor:
    return torch.rand(2, 3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("decoder", "encoder", "num_masks"),
    [
        ("none", "test_resnet", 0),
        ("heads", "test_resnet", 2),
        ("heads", "coat_lite_tiny", 2),
        ("unet", "coat_lite_tiny", 1),
        ("effnet_unet", "test_efficientnet", 1),
    ],
)
def test_training_gives_masks_at_the_size_of_the_image(decoder: str, encoder: str, num_masks: int):
    net = training_net(decoder, encoder, num_organs=3).train()
    logits, masks = net(stack())
    assert logits.shape == (2, 3, 3)
    assert [tuple(mask.shape) for mask in masks] == [(2, 3, 3, SIZE, SIZE)] * num_masks
    (logits.sum() + sum(mask.sum() for mask in masks)).backward()
    # Distributed training stops at parameters that no loss reaches.
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_evaluating_gives_what_the_deployed_network_gives():
    net = training_net("heads").eval()
    assert torch.equal(net(stack()), net.net(stack()))


@torch.no_grad()
def test_training_and_evaluating_score_alike():
    """Encoder maps are shared with the decoder in training: the same logits but for the batch statistics."""
    net = training_net("unet", "coat_lite_tiny").train()  # no batch normalisation in this pair
    logits, _ = net(stack())
    torch.testing.assert_close(logits, net.eval()(stack()))


@torch.no_grad()
def test_the_first_mask_comes_from_the_last_map():
    heads = ConvMaskHeads([8, 16, 32], num_organs=2).eval()
    maps = [torch.rand(1, width, 32 // width, 32 // width) for width in (8, 16, 32)]
    first, second = heads(maps, (8, 8))
    changed = [*maps[:2], torch.zeros_like(maps[2])]
    assert not torch.equal(heads(changed, (8, 8))[0], first)
    assert torch.equal(heads(changed, (8, 8))[1], second)


def test_the_pixel_shuffle_starts_as_nearest_neighbour():
    decoder = UNetMaskDecoder([8, 16, 32, 64])
    expand = decoder.dec4.shuffle[0]
    assert isinstance(expand, nn.Conv2d)
    kernels = expand.weight.unflatten(0, (-1, 4))
    assert torch.equal(kernels, kernels[:, :1].expand_as(kernels))


def test_an_unknown_decoder_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="decoder is 'fpn', expected one of heads, unet, effnet_unet, none"):
        training_net("fpn")


def test_a_decoder_that_does_not_fit_the_encoder_is_refused():
    with pytest.raises(ValueError, match=r"effnet_unet needs five feature maps .* the encoder has 4"):
        training_net("effnet_unet", "coat_lite_tiny")
