"""The command line: `hf-mixup`, and what the scripts share."""
