"""A user's program, for the type checker alone: the public names have types, and mistakes are seen. Never run."""

from typing import assert_type

import torch

from hf_mixup import (
    METHODS,
    Method,
    MethodChoice,
    MixPlan,
    MixupCallback,
    MixupCollator,
    MixupLoss,
    MixupModel,
    MixupTrainer,
    MixupTrainingArguments,
    blend,
    get_method,
    mix_targets,
)

collator = MixupCollator(["mixup", "cutmix"], num_labels=10, alpha=[0.8, 1.0])
assert_type(collator, MixupCollator)
MixupCollator(["mixup"], num_labels="ten")  # type: ignore[arg-type]
callback, loss = MixupCallback(collator), MixupLoss()

method = get_method("cutmix", alpha=0.2)
assert_type(method, Method)
assert_type(METHODS["mixup"], Method)
images, targets = method(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), num_labels=10)
assert_type(images, torch.Tensor)
choice = MethodChoice.build(["mixup", "cutmix"], mix_prob=[0.5, 0.5])
assert_type(choice, MethodChoice)

arguments = MixupTrainingArguments("runs/mine", mix=["mixup"], max_steps=2)
MixupTrainingArguments("runs/mine", mix_repeat="twice")  # type: ignore[arg-type]
model = MixupModel.from_pretrained("runs/mine")
assert_type(model, MixupModel)
trainer = MixupTrainer(model, arguments)
assert_type(trainer.mixup_model, MixupModel)


def mixed(plan: MixPlan, pixels: torch.Tensor) -> torch.Tensor:
    mix_targets(plan, torch.zeros(4, dtype=torch.int64), 10)
    return blend(plan, pixels)
