"""`python -m hf_mixup` is the command `hf-mixup`."""

import sys

from hf_mixup.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
