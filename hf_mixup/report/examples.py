"""Example mixtures for pictures, as the network in training gets them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from hf_mixup.core.plan import MixPlan, blend, onehot
from hf_mixup.core.planes import planes
from hf_mixup.core.rng import MixKey
from hf_mixup.data.processor import ImageFormat
from hf_mixup.methods import METHODS, MethodChoice
from hf_mixup.model import MixupModel
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.networks.families import check_pooled
from hf_mixup.networks.signals.features import class_activation, last_feature_map
from hf_mixup.report.plots import masks_by_lam

if TYPE_CHECKING:
    from hf_mixup.data.dataset import ImageDataset
    from hf_mixup.data.stream import ImageStream

LAMS = (0.1, 0.3, 0.5, 0.7, 0.9)  # lam of the pictures of mixers' masks

# signals that only networks with tokens have
TOKEN_SIGNALS = {"attention", "patch_attention", "token_grid", "attention_layers", "token_scores", "merged_attention"}


@dataclass(frozen=True)
class Recordings:
    """How sounds and videos are shown, as `ImageFormat` says it of images.

    Attributes:
        mean, std: what the frames of videos (B, T, C, H, W) were normalised with, a value for each channel; None shows them as they are.
        frequency_first: spectrograms are (F, T), as Whisper takes them, and not (T, F).
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    frequency_first: bool = False

    @classmethod
    def of(cls, model: MixupModel, processor: Any, example: Tensor) -> Recordings:
        """By what the processor normalises with, and by the axis of an example (...) that has as many places as the network has frequencies."""
        bins = getattr(model.config, "num_mel_bins", None)
        first = example.ndim == 2 and bins == example.shape[0] != example.shape[1]
        return cls(getattr(processor, "image_mean", None), getattr(processor, "image_std", None), first)

    def unnormalised(self, inputs: Tensor) -> Tensor:
        """Videos (B, T, 3, H, W) in [0, 1]; spectrograms (B, T, F) and waveforms (B, T) with their own values."""
        inputs = inputs.cpu().float()
        if inputs.ndim < 5:
            return inputs.mT if self.frequency_first and inputs.ndim == 3 else inputs
        if self.mean is not None and self.std is not None:
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
            inputs = inputs * std + mean
        frames = inputs.clamp(0, 1)
        return frames[:, :, :3] if frames.shape[2] >= 3 else frames[:, :, :1].expand(-1, -1, 3, -1, -1)


def default_architecture(choice: MethodChoice) -> str:
    """A small network of this library that the methods can use."""
    wanted = set().union(*(method.sample.needs | method.label.needs for method in choice.methods))
    return "vit_mini" if wanted & TOKEN_SIGNALS else "cifar_resnet20"


def mixed_examples(
    model: MixupModel, images: ImageDataset | ImageStream | Dataset, form: ImageFormat | Recordings, seed: int, count: int = 6
) -> list[dict]:
    """Columns for `plots.gallery`: `count` mixtures, one of each method at least, of images spread over the data set."""
    count = max(count, len(model.choice.methods))
    batch = varied(images, count)
    pixels = torch.stack([torch.as_tensor(example[model.main_input_name]) for example in batch])
    return drawn(model, pixels, torch.tensor([example["labels"] for example in batch]), form, seed, count)


def drawn(
    model: MixupModel,
    pixels: Tensor,
    labels: Tensor,
    form: ImageFormat | Recordings,
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
    model: MixupModel,
    pixels: Tensor,
    labels: Tensor,
    form: ImageFormat | Recordings,
    key: MixKey,
    *,
    masks: bool = False,
    activations: bool = False,
) -> dict[str, list[dict]]:
    """By method, the mixture of every image of a batch, as columns for `plots.gallery`.

    The mixed image is the one that the network really gets, so this also works for methods that mix by what the network sees. For methods that
    mix inside the network it is the clean image.

    Args:
        pixels, labels: (B, 3, H, W) normalised, or sounds and videos as the network takes them; labels as the loss takes them.
        masks: add `mask`, the share of the own image in every pixel (H, W), frame (T, H, W), bin (T, F) or sample (T,), and lam to the title.
        activations: add `activation` (h, w), the class activation map of the mixed image for the heaviest class of its target.
    """
    if activations:
        check_pooled(model.backbone)
    targets = model.choice.methods[0].loss.targets(labels, model.num_labels)
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
            lambda module, args, kwargs, seen=seen: seen.append(kwargs[model.main_input_name].detach()), with_kwargs=True
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
            shares = [None] * len(columns) if step.plan is None else _masks(step.plan, pixels, form)
            for i, (column, share) in enumerate(zip(columns, shares, strict=True)):
                column["title"] = f"{method.name}\nlam {float(step.lam[i]):.2f}"
                if share is not None:
                    column["mask"] = share
        if activations:
            heaviest_class = onehot(step.targets.argmax(1), model.num_labels)
            maps = class_activation(one.backbone, last_feature_map(one.backbone, shown), heaviest_class).detach()
            for column, activation in zip(columns, maps, strict=True):
                column["activation"] = activation
    return made


def _masks(plan: MixPlan, inputs: Tensor, form: ImageFormat | Recordings) -> Tensor:
    """The share of the own image, (B, H, W), (B, T, H, W) of videos, (B, T, F) of spectrograms, (B, T) of waveforms."""
    ones = torch.ones_like(planes(inputs).detach(), dtype=torch.float32, device="cpu")
    alone = replace(plan.to("cpu"), sources=(ones, *[torch.zeros_like(ones)] * (plan.index.shape[1] - 1)), moves=None)
    share = blend(alone, ones.view(inputs.shape)).detach()
    if inputs.ndim > 3:
        return share.select(-3, 0)  # channels are alike
    return form.unnormalised(share)


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


def varied(images: ImageDataset | ImageStream | Dataset, count: int) -> list[dict]:
    """Examples of as many classes as there are, from all over the data set; of a stream, of its first images."""
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
