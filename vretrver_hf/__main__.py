"""`python -m vretrver_hf` is `vretrver`."""

from __future__ import annotations

from .cli import main


if __name__ == "__main__":
    main()
