"""networks/unet3d.py: a 2D U-Net made 3D."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from trauma_monai.networks import InflatedUNet, inflate


def small_net(**options: object) -> InflatedUNet:
    torch.manual_seed(0)
    return InflatedUNet("resnet10t", (32, 16, 8, 8), **options).eval()


def volume(z: int = 16, y: int = 32, x: int = 48) -> torch.Tensor:
    return torch.rand(2, 1, z, y, x, generator=torch.Generator().manual_seed(1))


def test_kernels_are_repeated_along_the_last_axis_and_not_divided():
    flat = nn.Conv2d(1, 1, kernel_size=3)
    deep = inflate(flat)
    assert deep.weight.shape == (1, 1, 3, 3, 3)
    for index in range(3):
        assert torch.equal(deep.weight[..., index], flat.weight)
    assert torch.equal(deep.bias, flat.bias)


@torch.no_grad()
def test_a_convolution_over_identical_planes_is_three_times_the_flat_one():
    flat = nn.Conv2d(2, 4, kernel_size=3, stride=2, bias=False)
    image = torch.rand(1, 2, 9, 9)
    deep = inflate(flat)(image[..., None].expand(-1, -1, -1, -1, 3))
    torch.testing.assert_close(deep[..., 0], 3 * flat(image))


@torch.no_grad()
def test_batch_statistics_are_kept():
    flat = nn.BatchNorm2d(2, eps=0.5).eval()
    flat.running_mean.copy_(torch.tensor([1.0, 2.0]))
    image = torch.rand(1, 2, 4, 4)
    torch.testing.assert_close(inflate(flat)(image[..., None])[..., 0], flat(image))


def test_layers_without_a_3d_form_are_refused():
    with pytest.raises(ValueError, match="layer ConvTranspose2d has no 3D form"):
        inflate(nn.Sequential(nn.ConvTranspose2d(1, 1, kernel_size=2)))
    with pytest.raises(ValueError, match="layer SEModule has no 3D form"):
        InflatedUNet("seresnet18")
    with pytest.raises(ValueError, match="encoder 'coat_lite_tiny' has no 3D form"):
        InflatedUNet("coat_lite_tiny")


def test_a_misspelt_encoder_is_named():
    with pytest.raises(ValueError, match="'resnet18e' is no model of timm"):
        InflatedUNet("resnet18e")


@torch.no_grad()
def test_one_logit_per_voxel_and_class():
    assert small_net(num_classes=5)(volume()).shape == (2, 5, 16, 32, 48)


def test_a_volume_that_does_not_fit_the_stride_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        small_net()(volume(z=20))


@torch.no_grad()
def test_the_encoder_stage_that_nothing_reads_is_not_built():
    whole = inflate(timm.create_model("resnet10t", features_only=True)).eval()
    net = small_net()
    whole.load_state_dict(net.encoder.state_dict(), strict=False)
    images = volume(z=32).expand(-1, 3, -1, -1, -1)
    assert len(whole(images)) == 5
    assert all(torch.equal(a, b) for a, b in zip(net.encoder(images), whole(images)[:4], strict=True))


def test_the_published_network_has_14_8_million_parameters():
    net = InflatedUNet()
    assert sum(parameter.numel() for parameter in net.parameters()) == 14_818_437


@torch.no_grad()
def test_scripted_traced_and_exported_networks_answer_the_same():
    net, image = small_net(), volume()
    expected = net(image)
    torch.testing.assert_close(torch.jit.script(net)(image), expected)
    torch.testing.assert_close(torch.jit.trace(net, image)(image), expected)
    torch.testing.assert_close(torch.export.export(net, (image,)).module()(image), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_works_on_a_cpu(dtype):
    assert small_net().to(dtype)(volume(y=16, x=16).to(dtype)).dtype == dtype


@torch.no_grad()
def test_dropout_alone_makes_the_answer_vary():
    """MONAI Label's epistemic scoring sets ``dropout`` and compares answers."""
    net, image = small_net(dropout=0.5), volume()
    assert torch.equal(net(image), net(image))
    net.dropout.train()
    assert not torch.equal(net(image), net(image))


def test_every_parameter_learns():
    net = small_net().train()
    net(volume()).sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []
