"""networks/sequence.py: 2.5D stack -> slice logits."""

from __future__ import annotations

import pytest
import torch

from trauma_monai.networks import SliceSequenceNet

SIZE = 32


def small_net(encoder: str = "test_resnet", **options: object) -> SliceSequenceNet:
    torch.manual_seed(0)
    return SliceSequenceNet(encoder, num_targets=3, hidden_size=8, image_size=SIZE, **options).eval()


def stack(batch: int = 2, groups: int = 5, channels: int = 3) -> torch.Tensor:
    return torch.rand(batch, groups, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_one_logit_per_slice_group_and_target():
    assert small_net(in_channels=1)(stack(channels=1)).shape == (2, 5, 3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("encoder", "rnn"),
    [("test_resnet", "gru"), ("test_resnet", "lstm"), ("test_efficientnet", "gru"), ("coat_lite_tiny", "gru")],
)
def test_scripted_traced_and_exported_networks_answer_the_same(encoder: str, rnn: str):
    net, image = small_net(encoder, rnn=rnn, chunk_size=4), stack()
    expected = net(image)
    torch.testing.assert_close(torch.jit.script(net)(image), expected)
    torch.testing.assert_close(torch.export.export(net, (image,)).module()(image), expected)
    traced = torch.jit.trace(net, image)
    torch.testing.assert_close(traced(image), expected)
    other = stack(batch=3, groups=7)  # the trace holds no loop over chunks, so other sizes pass
    torch.testing.assert_close(traced(other), net(other))


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_chunk_size_does_not_change_the_result(chunk_size: int):
    torch.testing.assert_close(small_net(chunk_size=chunk_size)(stack()), small_net(chunk_size=10)(stack()))


def test_the_encoder_sees_at_most_one_chunk_at_a_time():
    net, seen = small_net(chunk_size=4), []
    net.encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    net(stack())
    assert seen == [4, 4, 2]


def test_batch_statistics_are_taken_over_all_slices():
    net, seen = small_net(chunk_size=4).train(), []
    net.encoder.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    net(stack())
    assert seen == [10]


@torch.no_grad()
def test_a_slice_group_is_judged_in_the_light_of_the_others():
    net, image = small_net(), stack(batch=1)
    changed = image.clone()
    changed[:, -1] = 0
    assert not torch.allclose(net(image)[:, 0], net(changed)[:, 0])


@torch.no_grad()
def test_stacks_of_a_batch_do_not_touch_each_other():
    net, image = small_net(), stack(batch=2)
    torch.testing.assert_close(net(image)[:1], net(image[:1]))


@torch.no_grad()
def test_values_that_are_not_finite_count_as_zero():
    net, image = small_net(), stack()
    broken = image.clone()
    image[0, 0, 0, :3, 0] = 0
    broken[0, 0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    assert torch.equal(net(broken), net(image))


@torch.no_grad()
def test_a_network_that_has_diverged_does_not_answer_with_a_half():
    net = small_net()
    net.classifier.weight[0, 0] = float("nan")
    assert net(stack()).isnan().any()


def test_every_parameter_learns():
    net = small_net("coat_lite_tiny").train()
    net(stack()).sum().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("encoder", "options", "millions"),
    [
        # Weights of timm's encoder without its classifier, the recurrent layer, and the linear layer.
        ("coat_lite_medium_384", {"hidden_size": 512, "num_targets": 10}, 47.22),
        ("coat_lite_small", {"hidden_size": 256, "num_targets": 2}, 20.51),
        ("tf_efficientnetv2_s", {"hidden_size": 640, "num_targets": 10, "rnn": "lstm"}, 30.03),
    ],
)
def test_published_networks_have_their_size(encoder: str, options: dict, millions: float):
    with torch.device("meta"):
        net = SliceSequenceNet(encoder, **options)
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


def test_an_unknown_rnn_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="rnn is 'transformer', expected one of gru, lstm"):
        small_net(rnn="transformer")
