"""MONAI Label app, a folder for its ``--app``: see docs/label.md."""
