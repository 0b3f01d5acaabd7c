"""Stage 4 of 6: 2.5D stack -> slice logits. And the 3D network that finds the organs first.

=================  =============================================================================
encoders.py        2D image encoders from timm, with every feature map, in a form that scripts
sequence.py        SliceSequenceNet: encoder -> recurrent layer over the slice groups -> logits
masks.py           organ-mask decoders that a SliceSequenceNet learns along with (training only)
unet_decoder.py    the U-Net decoder that masks.py and unet3d.py share
unet3d.py          InflatedUNet: a 2D U-Net whose kernels are repeated into depth
weights.py         strict loading of saved weights
deployed.py        a network as it runs outside training: exact, or faster in float16 and compiled
=================  =============================================================================
"""

from trauma_monai.networks.deployed import for_inference
from trauma_monai.networks.encoders import Encoder, create_encoder
from trauma_monai.networks.masks import ConvMaskHeads, EffNetMaskDecoder, UNetMaskDecoder, WithOrganMasks
from trauma_monai.networks.sequence import SliceSequenceNet
from trauma_monai.networks.unet3d import InflatedUNet, inflate
from trauma_monai.networks.weights import load_weights

__all__ = [
    "ConvMaskHeads",
    "EffNetMaskDecoder",
    "Encoder",
    "InflatedUNet",
    "SliceSequenceNet",
    "UNetMaskDecoder",
    "WithOrganMasks",
    "create_encoder",
    "for_inference",
    "inflate",
    "load_weights",
]
