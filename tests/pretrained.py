"""Small pre-trainings for tests."""

from dataclasses import fields

import torch

from hf_mixup import MixupPreTrainer, PreTrainingArguments
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.pretraining.pretexts import BASES
from small import Images, vit


class TwoViews(torch.utils.data.Dataset):
    """An image, and it mirrored with noise."""

    def __init__(self, count=64):
        self.images = Images(count)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        image = self.images[row]["pixel_values"]
        noise = 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(row))
        return {"pixel_values": torch.stack([image, image.flip(-1) + noise]), "labels": -100}


def trainer(
    folder, base="moco", mix=("imix",), base_args=None, data=None, evaluate=True, network=None, callbacks=None, **changes
) -> MixupPreTrainer:
    torch.manual_seed(0)
    known = {field.name for field in fields(BASES[base])}
    small = {"projector": [16, 8], "predictor": [16, 8], "queue_size": 20}
    settings = {
        "output_dir": str(folder), "mix": list(mix), "base": base, "base_args": {**{k: v for k, v in small.items() if k in known}, **(base_args or {})},
        "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 0.01, "optim": "sgd", "optim_args": "momentum=0.9",
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    return MixupPreTrainer(
        from_scratch("cifar_resnet20", 2, 16) if network is None else network, PreTrainingArguments(**{**settings, **changes}),
        train_dataset=TwoViews() if data is None else data,
        eval_dataset=Images(16, seed=1) if evaluate else None, bank_dataset=Images() if evaluate else None,
        callbacks=callbacks,
    )  # fmt: skip


def saves_every_step(folder, base, mix, bf16=False, dropout=False, **base_args) -> MixupPreTrainer:
    """For trainings that are killed. Dropout draws from the global stream, batch norms keep statistics."""
    network = vit(dropout=0.1) if dropout else None
    return trainer(
        folder, base, [mix], base_args, TwoViews(38), evaluate=False, network=network, bf16=bf16, max_steps=8, save_steps=1,
        per_device_train_batch_size=4,
    )  # fmt: skip
