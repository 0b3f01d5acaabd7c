"""Phantoms: synthetic abdominal trauma CTs to test, teach and demonstrate with.

:mod:`anatomy` draws a patient from the solids of :mod:`shapes`, :mod:`injuries` harms it, :mod:`rendering` scans it,
:mod:`storage` writes the series and :mod:`dataset` a whole data set in the layout of the RSNA 2023 competition.
No phantom resembles any real patient.
"""

from trauma_monai.phantom.dataset import write_phantoms

__all__ = ["write_phantoms"]
