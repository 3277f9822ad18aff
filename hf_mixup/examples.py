"""Mixtures to look at, as a network in training is shown them."""

from __future__ import annotations

import copy

import torch

from hf_mixup.data import ImageDataset, ImageFormat
from hf_mixup.methods import MethodChoice
from hf_mixup.modeling import MixupModel
from hf_mixup.plan import onehot
from hf_mixup.rng import MixKey

# what only networks of tokens can give
TOKEN_SIGNALS = {"attention", "patch_attention", "token_grid", "attention_layers", "token_scores"}


def default_architecture(choice: MethodChoice) -> str:
    """A small network of ours that the methods can use."""
    wanted = set().union(*(method.sample.needs | method.label.needs for method in choice.methods))
    return "vit_mini" if wanted & TOKEN_SIGNALS else "cifar_resnet20"


def mixed_examples(model: MixupModel, images: ImageDataset, form: ImageFormat, seed: int, count: int = 8) -> list[dict]:
    """Columns for `plots.gallery`: `count` mixtures, by every method in turn, of images spread over the data set.

    The mixed image is what the network really received, so this serves methods that mix by what the network sees. Of those
    that mix inside it, it is the clean image.
    """
    batch = _varied(images, count)
    pixels = torch.stack([example["pixel_values"] for example in batch])
    targets = onehot(torch.tensor([example["labels"] for example in batch]), model.num_labels)
    clean = form.unnormalised(pixels)
    one = copy.deepcopy(model).cpu().train()  # a copy: a forward pass of training moves BatchNorm's averages
    columns: list[dict] = [{}] * count
    for place, method in enumerate(model.choice.methods):
        seen: list[torch.Tensor] = []
        hook = one.backbone.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["pixel_values"].detach()), with_kwargs=True
        )
        step = method.step.run(method, one.states[method.name], one.backbone, pixels, targets, MixKey(seed, 0, 0))
        hook.remove()
        mixed = form.unnormalised(seen[-1])
        for i in range(place, count, len(model.choice.methods)):
            columns[i] = {"title": method.name, "own": clean[i], "mixed": mixed[i], "target": step.targets[i].detach()}
            if step.plan is not None and step.plan.index.shape[1] > 1:
                heaviest = int(step.plan.weight[i, 1:].argmax()) + 1
                columns[i]["partner"] = clean[int(step.plan.index[i, heaviest])]
    return columns


def _varied(images: ImageDataset, count: int) -> list[dict]:
    """Examples of as many classes as there are, from all over the data set."""
    found: list[dict] = []
    spare: list[dict] = []
    for row in torch.linspace(0, len(images) - 1, min(len(images), 8 * count)).int().tolist():
        example = images[row]
        known = {other["labels"] for other in found}
        (spare if example["labels"] in known else found).append(example)
        if len(found) == count:
            return found
    return (found + spare)[:count]
