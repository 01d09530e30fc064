"""`python -m vretrver_hf.evaluation`, and `accelerate launch -m vretrver_hf.evaluation`: `vretrver evaluate`."""

import sys

from ..cli import main


if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
