"""Example mixtures for pictures, as the network in training gets them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from hf_mixup.core.plan import onehot
from hf_mixup.core.rng import MixKey
from hf_mixup.data.processor import ImageFormat
from hf_mixup.methods import METHODS, MethodChoice
from hf_mixup.model import MixupModel
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.networks.signals.features import class_activation, last_feature_map
from hf_mixup.report.plots import masks_by_lam

if TYPE_CHECKING:
    from hf_mixup.data.dataset import ImageDataset
    from hf_mixup.data.stream import ImageStream

LAMS = (0.1, 0.3, 0.5, 0.7, 0.9)  # lam of the pictures of mixers' masks

# signals that only networks with tokens have
TOKEN_SIGNALS = {"attention", "patch_attention", "token_grid", "attention_layers", "token_scores", "merged_attention"}


def default_architecture(choice: MethodChoice) -> str:
    """A small network of this library that the methods can use."""
    wanted = set().union(*(method.sample.needs | method.label.needs for method in choice.methods))
    return "vit_mini" if wanted & TOKEN_SIGNALS else "cifar_resnet20"


def mixed_examples(model: MixupModel, images: ImageDataset | ImageStream, form: ImageFormat, seed: int, count: int = 6) -> list[dict]:
    """Columns for `plots.gallery`: `count` mixtures, at least one of each method, from images spread over the data set."""
    count = max(count, len(model.choice.methods))
    batch = varied(images, count)
    pixels = torch.stack([example["pixel_values"] for example in batch])
    return drawn(model, pixels, torch.tensor([example["labels"] for example in batch]), form, seed, count)


def drawn(
    model: MixupModel,
    pixels: Tensor,
    labels: Tensor,
    form: ImageFormat,
    seed: int,
    count: int,
    *,
    masks: bool = False,
    activations: bool = False,
) -> list[dict]:
    """`count` columns for `plots.gallery`, from the images of a batch and the methods in turn. Of ten draws it uses the first with two classes.

    Arguments as in `mixtures`.
    """
    names = [method.name for method in model.choice.methods]
    made: list[dict[str, list[dict]]] = []
    found, taken = [], set()
    for place in range(count):
        name, row = names[place % len(names)], place % len(pixels)
        new = [step for step in range(10 + place // len(pixels)) if (name, row, step) not in taken]
        for step in new:
            if step == len(made):
                made.append(mixtures(model, pixels, labels, form, MixKey(seed, 0, step), masks=masks, activations=activations))
            if made[step][name][row]["target"].max() < 0.9:
                break
        else:
            step = new[0]
        taken.add((name, row, step))
        found.append(made[step][name][row])
    return found


def mixtures(
    model: MixupModel, pixels: Tensor, labels: Tensor, form: ImageFormat, key: MixKey, *, masks: bool = False, activations: bool = False
) -> dict[str, list[dict]]:
    """By method, the mixture of every image of a batch, as columns for `plots.gallery`.

    The mixed image is the one that the network really gets, so this also works for methods that mix by what the network sees. For methods that
    mix inside the network it is the clean image.

    Args:
        pixels, labels: (B, 3, H, W) normalised; (B,) class numbers, or (B, num_labels).
        masks: add `mask`, the pixels' share of the own image (H, W), and lam to the title.
        activations: add `activation` (h, w), the class activation map of the mixed image for the heaviest class of its target.
    """
    targets = onehot(labels, model.num_labels)
    clean = form.unnormalised(pixels)
    one = copy.deepcopy(model).cpu().train()  # a copy, because a training pass updates BatchNorm's averages
    made: dict[str, list[dict]] = {}
    for method in model.choice.methods:
        partners = clean
        if "history" in method.sample.needs:  # there is no history yet; it uses the same batch in reverse order
            partners = clean.flip(0)
            state = one.states[method.name]
            state.remember(**method.step.run(method.parts, state, one.backbone, pixels.flip(0), targets.flip(0), key).memory)
        seen: list[Tensor] = []
        hook = one.backbone.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["pixel_values"].detach()), with_kwargs=True
        )
        step = method.step.run(method.parts, one.states[method.name], one.backbone, pixels, targets, key)
        hook.remove()
        # some methods also pass the clean images, before or after
        shown = next((images for images in reversed(seen) if not torch.equal(images, pixels)), pixels)
        mixed = form.unnormalised(shown)
        made[method.name] = columns = [
            {
                "title": method.name,
                "own": clean[i],
                "mixed": mixed[i],
                "target": step.targets[i].detach(),
                "own_class": int(targets[i].argmax()),
            }
            for i in range(len(pixels))
        ]
        if step.plan is not None and step.plan.index.shape[1] > 1:
            heaviest = step.plan.weight[:, 1:].argmax(1).cpu() + 1
            for i, column in enumerate(columns):
                column["partner"] = partners[int(step.plan.index[i, heaviest[i]])]
        if masks:
            for i, column in enumerate(columns):
                column["title"] = f"{method.name}\nlam {float(step.lam[i]):.2f}"
                if step.plan is not None:
                    column["mask"] = step.plan.dense_mask(tuple(pixels.shape[2:]))[i, 0].detach().float().cpu()
        if activations:
            heaviest_class = onehot(step.targets.argmax(1), model.num_labels)
            maps = class_activation(one.backbone, last_feature_map(one.backbone, shown), heaviest_class).detach()
            for column, activation in zip(columns, maps, strict=True):
                column["activation"] = activation
    return made


def masks_of_mixers(model: MixupModel, pixels: Tensor, form: ImageFormat) -> dict[str, list[dict]]:
    """By method, its mixer's masks for every image of a batch with the next one at each of `LAMS`, for `plots.masks_by_lam`.

    Methods without a mixer are left out. The model is not changed.

    Args:
        pixels: (B, 3, H, W) normalised.
    """
    if not any(hasattr(state, "masks") for state in model.states.values()):
        return {}
    count = len(pixels)
    partner = torch.arange(count).roll(-1)
    index = torch.stack([torch.arange(count), partner], 1)
    clean = form.unnormalised(pixels)
    found = {}
    for name, state in copy.deepcopy(model).cpu().float().eval().states.items():
        if not hasattr(state, "masks"):
            continue
        masks = torch.stack([state.masks(pixels, index, torch.tensor([[lam, 1 - lam]] * count)) for lam in LAMS], 1)  # (B, L, 2, H, W)
        mixed = masks[:, :, :1] * clean[:, None] + masks[:, :, 1:] * clean[partner][:, None]
        found[name] = [{"own": clean[i], "partner": clean[partner[i]], "masks": masks[i, :, 0], "mixed": mixed[i]} for i in range(count)]
    return found


class MaskPictures(TrainerCallback):
    """Draws the mixers' masks during training, always for the same images: `masks/METHOD-STEP.png`, at the end of up to ten epochs.

    Args:
        folder: for `masks/`.
        pixels: (B, 3, H, W) normalised.
    """

    def __init__(self, folder: str | Path, pixels: Tensor, form: ImageFormat):
        self.folder, self.pixels, self.form = Path(folder, "masks"), pixels, form

    def on_train_begin(self, args, state, control, **kwargs):
        self.tenths = 10 * state.global_step // max(state.max_steps, 1)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        # in steps, because a stream has no number of epochs
        before, self.tenths = self.tenths, 10 * state.global_step // max(state.max_steps, 1)
        if not state.is_world_process_zero or self.tenths == before:
            return
        for name, columns in masks_of_mixers(model, self.pixels, self.form).items():
            self.folder.mkdir(parents=True, exist_ok=True)
            masks_by_lam(self.folder / f"{name}-{state.global_step:06d}.png", columns, LAMS)


def pairs_of_every_method(
    pixels: Tensor,
    form: ImageFormat,
    seed: int,
    names: Sequence[str] | None = None,
    model: PreTrainedModel | None = None,
    *,
    masks: bool = False,
) -> list[dict]:
    """Columns for `plots.overview`: the first of two images, mixed with the second by every method.

    For each method it shows the first draw with a lam from 0.35 to 0.65.

    Args:
        pixels: (2, 3, H, W) normalised.
        model: the network that methods look at; untrained ones of this library if None.
        masks: as in `mixtures`.
    """

    def unevenness(column: dict) -> float:
        return abs(float(column["target"][1]) - 0.5)

    columns = []
    for name in names or METHODS:
        choice = MethodChoice.build(name)
        torch.manual_seed(seed + 1)  # for the untrained networks; mixing has its own keys
        network = (
            copy.deepcopy(model) if model is not None else from_scratch(default_architecture(choice), 2, form.size, channels=form.channels)
        )
        mixing = MixupModel(network, choice)
        # some methods need more than two images; mirrored and shifted copies are added
        more = torch.cat([images.roll(images.shape[3] * k // 32, 3) for k in range(4) for images in (pixels, pixels.flip(3))])
        found = []
        for batch, step in ((batch, step) for batch in (pixels, more) for step in range(12)):
            labels = torch.arange(len(batch)) % 2
            made = mixtures(mixing, batch, labels, form, MixKey(seed, 0, step), masks=masks)[name]
            found += made[:1] if batch is pixels else made
            if name == "vanilla" or min(map(unevenness, found)) <= 0.15:
                break
        columns.append(min(found, key=unevenness))
    return columns


def varied(images: ImageDataset | ImageStream, count: int) -> list[dict]:
    """Examples of as many classes as possible, spread over the data set; for a stream, from its first images."""
    found: list[dict] = []
    spare: list[dict] = []
    if isinstance(images, torch.utils.data.IterableDataset):
        examples = islice(images, 8 * count)
    else:
        examples = (images[row] for row in torch.linspace(0, len(images) - 1, min(len(images), 8 * count)).int().tolist())
    for example in examples:
        known = [other["labels"] for other in found]  # lists, if an image has several classes
        (spare if example["labels"] in known else found).append(example)
        if len(found) == count:
            return found
    return (found + spare)[:count]
