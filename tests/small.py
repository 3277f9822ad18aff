"""Small networks and data for tests of training."""

import torch
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.methods import MethodChoice
from hf_mixup.report.examples import default_architecture


class Images(torch.utils.data.Dataset):
    """Random images whose class is their brightest quadrant: learnable, and the same every time."""

    def __init__(self, count=64, size=16, num_labels=4, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(num_labels, (count,), generator=rng)
        self.pixels = torch.randn(count, 3, size, size, generator=rng) * 0.3
        half = size // 2
        for row, label in enumerate(self.labels.tolist()):
            top, left = half * (label // 2 % 2), half * (label % 2)
            self.pixels[row, :, top : top + half, left : left + half] += 1.5

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"pixel_values": self.pixels[row], "labels": int(self.labels[row])}


def vit(dropout=0.0, num_labels=4, size=16, **config) -> PreTrainedModel:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=size, patch_size=4,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, num_labels=num_labels, **config,
        )
    )  # fmt: skip


def resnet(num_labels=4) -> PreTrainedModel:
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=num_labels)
    )


NETWORKS = {"vit": vit, "resnet": resnet}


def network_for(method: str) -> PreTrainedModel:
    """The tiny ViT where a method reads attention, the tiny ResNet for the others."""
    return NETWORKS["vit" if default_architecture(MethodChoice.build(method)) == "vit_mini" else "resnet"]()


def arguments(folder, **changes) -> MixupTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "mix": ["mixup", "cutmix"],
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return MixupTrainingArguments(**{**settings, **changes})


def trainer(folder, model=None, data=None, evaluation=None, **changes) -> MixupTrainer:
    keep = {name: changes.pop(name) for name in ("data_collator", "callbacks", "processing_class") if name in changes}
    return MixupTrainer(
        vit() if model is None else model,
        arguments(folder, **changes),
        train_dataset=Images() if data is None else data,
        eval_dataset=evaluation,
        **keep,
    )


def losses(done: MixupTrainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def difference(one: dict, other: dict) -> float:
    """The largest difference between two state dicts of the same names."""
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)
