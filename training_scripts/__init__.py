"""The scripts, installed as `hf_mixup.scripts`."""
