"""Trains a small network, saving at every step and saying so; `train_small.py FOLDER NETWORK [resume]`."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from transformers import TrainerCallback

from small import NETWORKS, Images, trainer, vit, weights


class Say(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)


def main():
    folder, network = Path(sys.argv[1]), sys.argv[2]
    model = vit(dropout=0.1) if network == "vit" else NETWORKS[network]()
    run = trainer(folder, model, Images(40), max_steps=8, save_strategy="steps", save_steps=1, callbacks=[Say()])
    run.train(resume_from_checkpoint=len(sys.argv) > 3)
    torch.save(weights(run.model), folder / "weights.pt")


main()
