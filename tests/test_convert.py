"""convert.py: the published names, written down independently, become ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from trauma_monai.cli import app
from trauma_monai.convert import convert_checkpoint
from trauma_monai.networks import InflatedUNet, SliceSequenceNet, load_weights

Weights = dict[str, torch.Tensor]


def coat_net() -> SliceSequenceNet:
    return SliceSequenceNet("coat_lite_tiny", num_targets=2, hidden_size=4, image_size=32)


def published_coat(net: SliceSequenceNet) -> Weights:
    """Names of the published CoaT models; stages count from 1, and cpe and crpe also stand outside of the blocks."""
    published = {}
    for name, tensor in net.state_dict().items():
        if match := re.match(r"encoder\.stages\.(\d)\.(.+)", name):
            stage, rest = int(match[1]) + 1, match[2]
            rest = re.sub(r"^projection\.", f"patch_embed{stage}.proj.", rest)
            rest = re.sub(r"^norm\.", f"patch_embed{stage}.norm.", rest)
            rest = re.sub(r"^class_token", f"cls_token{stage}", rest)
            rest = re.sub(r"^blocks\.", f"serial_blocks{stage}.", rest)
            published[f"enc.{rest}"] = tensor
            if match := re.match(r"serial_blocks\d\.0\.(?:factoratt_crpe\.)?(c[r]?pe)\.(.+)", rest):
                published[f"enc.{match[1]}{stage}.{match[2]}"] = tensor
        elif name.startswith("rnn."):
            published[name.replace("rnn.", "lstm2.")] = tensor
        else:
            published[name.replace("classifier.", "head.1.")] = tensor
    unused = ["lstm.0.lstm.weight_ih_l0", "lstm.1.lstm.bias_hh_l0", "dec4.shuf.0.weight", "dec3.bn.weight"]
    unused += ["dec2.conv1.0.bias", "fpn.convs.0.0.weight", "final_conv.0.conv.3.bias", "mask_head_3.0.weight"]
    return published | {name: torch.zeros(1) for name in unused}


def effnet_net() -> SliceSequenceNet:
    return SliceSequenceNet("test_efficientnet", num_targets=2, rnn="lstm", hidden_size=4)


def published_effnet(net: SliceSequenceNet) -> Weights:
    """Names of the published EfficientNet models: the encoder without its head is inside a U-Net's encoder."""
    published = {}
    for name, tensor in net.state_dict().items():
        new = name.replace("encoder.head.", "").replace("rnn.", "lstm.").replace("classifier.", "head.1.")
        published[re.sub(r"^encoder\.", "encoder.model.", new)] = tensor
    unused = ["decoder.blocks.0.conv1.0.weight", "segmentation_head.0.bias", "mask_head_4.6.weight"]
    return published | {name: torch.zeros(1) for name in unused}


def organ_net() -> InflatedUNet:
    return InflatedUNet("resnet10t", (16, 8, 8, 8))


def published_organ(net: InflatedUNet) -> Weights:
    """Names of the published segmentation: ours, and the stage whose output nothing reads."""
    return net.state_dict() | {"encoder.layer4.0.conv1.weight": torch.zeros(1)}


SYSTEMS = {
    "coat": (coat_net, published_coat),
    "effnet": (effnet_net, published_effnet),
    "organs": (organ_net, published_organ),
}


def save(weights: object, folder: Path) -> Path:
    path = folder / "published.pth"
    torch.save(weights, path)
    return path


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "distributed"])
def test_every_tensor_lands(system: str, prefix: str, tmp_path: Path):
    build, publish = SYSTEMS[system]
    trained = build()
    published = {prefix + name: tensor for name, tensor in publish(trained).items()}
    conversion = convert_checkpoint(save(published, tmp_path), build(), tmp_path / "new" / "model.pt")
    loaded = load_weights(build(), tmp_path / "new" / "model.pt")
    expected = trained.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert conversion.dropped
    assert 0 < conversion.used < len(published)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.pt"]


def test_dropped_parts_come_with_the_reason(tmp_path: Path):
    net = organ_net()
    conversion = convert_checkpoint(save(published_organ(net), tmp_path), organ_net(), tmp_path / "model.pt")
    assert conversion.system == "1st place 2023, organ segmentation"
    assert conversion.used == len(net.state_dict())
    assert conversion.dropped == {"encoder.layer4.": "stage of the encoder whose output the decoder does not take"}


def test_weights_inside_a_training_state_are_found(tmp_path: Path):
    net = effnet_net()
    state = {"model": published_effnet(net), "epoch": 3}
    convert_checkpoint(save(state, tmp_path), effnet_net(), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").is_file()


def test_a_missing_tensor_is_named_and_nothing_is_written(tmp_path: Path):
    published = published_coat(coat_net())
    del published["enc.cls_token3"], published["lstm2.bias_hh_l0"]
    there = r"encoder\.stages\.2\.class_token \(there enc\.cls_token3\), rnn\.bias_hh_l0 \(there lstm2\.bias_hh_l0\)\."
    with pytest.raises(ValueError, match=rf"missing: {there}"):
        convert_checkpoint(save(published, tmp_path), coat_net(), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


def test_a_tensor_of_another_shape_is_named(tmp_path: Path):
    published = published_coat(coat_net())
    published["head.1.weight"] = torch.zeros(10, 8)
    with pytest.raises(ValueError, match=r"wrong shape: classifier\.weight \(10, 8\), expected \(2, 8\)"):
        convert_checkpoint(save(published, tmp_path), coat_net(), tmp_path / "model.pt")


def test_a_tensor_that_nobody_knows_is_named(tmp_path: Path):
    published = published_coat(coat_net()) | {"attention.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"tensors without a place: attention\.weight"):
        convert_checkpoint(save(published, tmp_path), coat_net(), tmp_path / "model.pt")


def test_shared_layers_that_differ_are_refused(tmp_path: Path):
    published = published_coat(coat_net())
    published["enc.cpe2.proj.bias"] = published["enc.cpe2.proj.bias"] + 1
    with pytest.raises(ValueError, match=r"two different tensors for encoder\.stages\.1\.blocks\.0\.cpe\.proj\.bias"):
        convert_checkpoint(save(published, tmp_path), coat_net(), tmp_path / "model.pt")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path):
    published = published_coat(coat_net())
    published["module.head.1.bias"] = published["head.1.bias"] + 1
    with pytest.raises(ValueError, match="both with and without the prefix"):
        convert_checkpoint(save(published, tmp_path), coat_net(), tmp_path / "model.pt")


def test_the_checkpoint_of_another_system_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"is of no known system.*It holds fc\.weight"):
        convert_checkpoint(save({"fc.weight": torch.zeros(1)}, tmp_path), coat_net(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="does not fit InflatedUNet"):
        convert_checkpoint(save(published_coat(coat_net()), tmp_path), organ_net(), tmp_path / "model.pt")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="is damaged, or holds other things than tensors"):
        convert_checkpoint(save({"enc.": Path}, tmp_path), coat_net(), tmp_path / "model.pt")


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no weights at .*gone\.pth"):
        convert_checkpoint(tmp_path / "gone.pth", coat_net(), tmp_path / "model.pt")


def test_the_command_line_converts_for_a_bundle(tmp_path: Path):
    """The organ bundle as it stands is the published segmentation network."""
    network = InflatedUNet()
    out = tmp_path / "models/model.pt"
    arguments = [
        "convert",
        str(save(published_organ(network), tmp_path)),
        str(out),
        "--bundle",
        "organ_ct_segmentation",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "tensors in" in result.output
    converted = torch.load(out, weights_only=True)
    assert converted.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in network.state_dict().items())
