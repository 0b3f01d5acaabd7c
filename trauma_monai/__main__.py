"""``python -m trauma_monai``: the same as ``trauma-monai``."""

from trauma_monai.cli import main

if __name__ == "__main__":
    main()
