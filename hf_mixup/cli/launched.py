"""The code of every process of `hf-mixup train --num_processes N` runs."""

import sys

from hf_mixup.cli.main import script
from hf_mixup.cli.refusals import run

if __name__ == "__main__":
    name, *words = sys.argv[1:]
    sys.exit(run(lambda argv, prog: script(name).main(argv, f"hf-mixup {name}"), words, "hf-mixup"))
