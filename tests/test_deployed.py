"""Networks outside training: the same answers, or nearly the same ones faster."""

from __future__ import annotations

import pytest
import torch

from trauma_monai.networks import InflatedUNet, SliceSequenceNet, for_inference, load_weights
from trauma_monai.networks.deployed import accelerate, can_compile, gains_from_float16

VOLUME = torch.rand(1, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
STACK = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def organ_network() -> InflatedUNet:
    torch.manual_seed(0)
    return InflatedUNet("test_resnet", decoder_channels=[16, 8, 8, 8], num_classes=5).eval()


def slice_network() -> SliceSequenceNet:
    torch.manual_seed(0)
    return SliceSequenceNet("test_resnet", num_targets=3, image_size=32, hidden_size=8).eval()


@pytest.mark.parametrize(("build", "image"), [(organ_network, VOLUME), (slice_network, STACK)])
def test_the_default_is_exact(build, image):
    with torch.inference_mode():
        expected = build()(image)
        torch.testing.assert_close(for_inference(build(), "cpu")(image), expected)


@pytest.mark.parametrize(("build", "image"), [(organ_network, VOLUME), (slice_network, STACK)])
def test_float16_moves_the_answer_a_little_and_gives_it_in_float32(build, image):
    network = build()
    with torch.inference_mode():
        expected = network(image)
        accelerate(network, half=True, compiled=False)
        answer = network(image)
    assert answer.dtype == torch.float32
    assert not torch.equal(answer, expected)
    assert (answer - expected).abs().mean() < 0.002 * expected.std()


@pytest.mark.skipif(not can_compile("cpu"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_gives_the_same_answer_and_takes_other_weights():
    network, other = slice_network(), slice_network()
    torch.nn.init.constant_(other.classifier.bias, 2.0)
    accelerate(network, half=False, compiled=True)
    with torch.inference_mode():
        torch.testing.assert_close(network(STACK), slice_network()(STACK), rtol=1e-4, atol=1e-5)
        network.load_state_dict(other.state_dict())
        torch.testing.assert_close(network(STACK), other(STACK), rtol=1e-4, atol=1e-5)


def test_a_network_keeps_the_names_of_its_weights_when_it_is_accelerated(tmp_path):
    network = slice_network()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    load_weights(for_inference(network, "cpu", fast=True), tmp_path / "model.pt")


def test_the_layers_that_sum_over_slices_stay_in_float32():
    network, seen = slice_network(), []
    for layer in (network.encoder.get_submodule("features.conv1.0"), network.rnn, network.classifier):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    accelerate(network, half=True, compiled=False)
    with torch.inference_mode():
        network(STACK)
    convolved, (sequence, _), logits = seen
    assert (convolved.dtype, sequence.dtype, logits.dtype) == (torch.float16, torch.float32, torch.float32)


def test_float16_is_used_only_where_the_processor_has_it(monkeypatch):
    for flags, gains in (({"avx512_bf16": True}, False), ({"avx512_fp16": True}, True), ({"amx_fp16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert gains_from_float16("cpu") == gains
