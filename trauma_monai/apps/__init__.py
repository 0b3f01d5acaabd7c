"""The bundles inside other tools: apps for MONAI Label and MONAI Deploy."""
