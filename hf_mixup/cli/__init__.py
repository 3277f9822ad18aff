"""The command line: `hf-mixup`, and the common code of the scripts."""
