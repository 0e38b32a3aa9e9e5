"""``python -m azure_torch_ckpt.cli``."""

from __future__ import annotations

from azure_torch_ckpt.cli import main

if __name__ == "__main__":
    main()
