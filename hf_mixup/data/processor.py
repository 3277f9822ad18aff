"""The format of a network's images: size, geometry, normalisation, and the image processor that defines them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from hf_mixup.arguments import DataArguments
from hf_mixup.core.checks import check_channel_values, check_known
from hf_mixup.core.hub import told_plainly
from hf_mixup.data.augment import OneByOne, Transform, posterized
from hf_mixup.data.dataset import unreadable
from hf_mixup.data.pixels import Photograph
from hf_mixup.data.probe import is_timm, pixels_of, probe, processed
from hf_mixup.data.tail import Augmentation

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# filters by Pillow's numbers, which image processors use
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True)
class ImageFormat:
    """The format of a network's images, and the image processor that is saved with it. Evaluation uses that processor's output.

    Attributes:
        size: of the images in pixels: the side of square images, or (height, width). None if the processor's outputs differ in size.
        crop_ratio: share of the resized image's side that the central crop of evaluation keeps.
        mean, std: of the normalisation of pixels in [0, 1], one value for each channel.
        interpolation: one of `FILTERS`.
        squash: resize both sides to the size, whatever the aspect ratio, in training too; otherwise crop the longer side. Default: up to 64 pixels.
        order: the image's channel in each output channel; None keeps the order.
        own: the image processor of a checkpoint, which defines evaluation; `of_processor` measures the other attributes from it.
        whole: the resized pixels are whole numbers, so they fit into bytes.
    """

    size: int | tuple[int, int] | None
    crop_ratio: float = 1.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    squash: bool | None = None
    order: tuple[int, ...] | None = None
    own: Any = field(default=None, compare=False, repr=False)
    whole: bool = True

    def __post_init__(self):
        if self.squash is None:
            object.__setattr__(self, "squash", max(self.sides) <= 64)

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width). Raises ValueError if the output size of the processor depends on the image."""
        if self.size is None:
            raise ValueError(
                f"{type(self.own).__name__} must give images of one size, got one whose size depends on the image; "
                "set do_resize, size and crop_size in preprocessor_config.json."
            )
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def neutral(self) -> tuple[float, ...]:
        """The colour that is normalised to 0, as pixels in [0, 1], in the image's order of channels."""
        return tuple(self.mean) if self.order is None else tuple(self.mean[place] for place in np.argsort(self.order))

    @classmethod
    def of_images(
        cls,
        dataset: Dataset | None,
        column: str,
        size: int | None = None,
        crop_ratio: float | None = None,
        *,
        channels: int = 3,
        train_crop: str | None = None,
        **fields: Any,
    ) -> ImageFormat:
        """The format for training from scratch. If most images have up to 64 pixels, the size is 32 or 64, else 224.

        Args:
            size: use this size instead, in pixels.
            crop_ratio: default: 0.875 above 64 pixels for training with resized crops, else 1, as in training.
            channels: of the network; by default, other numbers than 3 are normalised by mean 0.5 and std 0.5.
            train_crop: see `train_transform`.
        """
        if size is None:
            longest, count = _median_side(dataset, column)
            size = 32 if longest <= 32 else 64 if longest <= 64 else 224
            logger.info("image_size %d: the longer side of the middle one of %d images is %d pixels", size, count, longest)
        if channels != 3:
            fields = {"mean": (0.5,) * channels, "std": (0.5,) * channels, **fields}
        resized = train_crop == "resized" or (train_crop is None and size > 64)
        return cls(size, crop_ratio=crop_ratio or (0.875 if size > 64 and resized else 1.0), **fields)

    @classmethod
    def of_checkpoint(
        cls,
        repo_or_folder: str,
        size: int | None = None,
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **hub: Any,
    ) -> ImageFormat:
        """The format of a checkpoint in a folder or on the Hub. Raises ValueError if it cannot be loaded. `hub`: `revision`, `token` and so on."""
        from transformers import AutoImageProcessor

        with told_plainly(repo_or_folder, hub.get("revision")):
            processor = AutoImageProcessor.from_pretrained(repo_or_folder, **{"trust_remote_code": False, **hub})
        return cls.of_processor(processor, size, channels=channels, mean=mean, std=std)

    @classmethod
    def of_processor(
        cls,
        processor: Any,
        size: int | None = None,
        *,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> ImageFormat:
        """The format of a checkpoint's image processor, of transformers or timm.

        Args:
            size: side of square images, instead of the processor's; its crop keeps its share.
            channels: of the network.
            mean, std: of the normalisation, instead of the processor's.

        Raises:
            ValueError: with its name, for a processor that does more than resizing and normalising.
        """
        processor = _normalising(processor, channels, mean, std)
        seen = probe(processor, channels)
        if size is not None and seen.size != (size, size):
            processor = _of_size(processor, seen.size, size)
            seen = probe(processor, channels)
            if seen.size != (size, size):
                raise ValueError(f"image_size must be one that {type(processor).__name__} can give, got {size}; leave it out.")
        for name, wanted, found in (("image_mean", mean, seen.mean), ("image_std", std, seen.std)):
            if wanted is not None and not np.allclose(wanted, found, rtol=1e-4, atol=1e-6):
                raise ValueError(
                    f"{name} must be followed by {type(processor).__name__}, got one that normalises by {found}; leave it out."
                )
        given = processor.data_config["interpolation"] if is_timm(processor) else getattr(processor, "resample", None)
        given = FILTERS[int(given)] if isinstance(given, int) else getattr(given, "value", given)
        height, width = seen.size or (None, None)
        return cls(
            size=height if height == width else seen.size,
            crop_ratio=processor.data_config["crop_pct"] if is_timm(processor) else 1.0,
            mean=seen.mean,
            std=seen.std,
            interpolation=given if given in FILTERS else "bicubic",
            squash=seen.squashes,
            order=None if seen.order == tuple(range(channels)) else seen.order,
            own=processor,
            whole=seen.whole,
        )

    def train_transform(
        self,
        horizontal_flip: bool = True,
        *,
        size: int | None = None,
        crop: str | None = None,
        scale: tuple[float, float] | None = None,
        resize: int | None = None,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
    ) -> Transform:
        """Random crop, flip, timm's automatic augmentation, tensor, normalise, random erasing with noise.

        All steps before normalising give bytes.

        Aspect ratio of objects, range of values and order of channels are those of evaluation.

        Args:
            size: of the training images in pixels, if not that of evaluation.
            crop: `pad` (pad with zeros by an eighth, then crop), `reflect` (the same with mirrored pixels), `resized`, or `none`.
                Default: `pad` up to 64 pixels, else `resized`.
            scale: smallest and largest share of the image in a `resized` crop; 0.08 and 1 if None.
            resize: length of the shorter side before the crop, in pixels.
            auto_augment: a policy of timm, such as `rand-m9-mstd0.5-inc1`.
            random_erasing: probability that a rectangle of the image becomes noise, 0 to 1.
        """
        form = self if size in (None, self.size) else self.at(size)
        sides, interpolation = form.sides, InterpolationMode(form.interpolation)
        crop = crop or ("pad" if max(sides) <= 64 else "resized")
        check_known("train_crop", crop, ["pad", "reflect", "resized", "none"])
        if scale is not None and crop != "resized":
            raise ValueError(f"crop_scale is for train_crop 'resized', got {list(scale)} with {crop!r}; set train_crop, or leave it out.")
        if auto_augment and form.channels != 3:
            raise ValueError(f"auto_augment needs images of 3 channels, got {form.channels}; leave it out.")
        head: list[Callable] = [v2.Resize(resize, interpolation)] if resize else []
        if crop != "resized" and form.own is not None:
            head.append(replace(form, whole=True).geometry())
        elif crop != "resized":
            head += [v2.Resize(sides, interpolation)] if form.squash else [v2.Resize(sides[0], interpolation), v2.CenterCrop(sides)]
        head_ = v2.Compose(head or [v2.Identity()])
        padding, reflect = max(sides) // 8 if crop in ("pad", "reflect") else 0, crop == "reflect"
        if crop != "resized" and not auto_augment:
            return Transform(head_, form.normalisation(padding, reflect, horizontal_flip, random_erasing), form.channels)
        steps: list[Callable] = []
        if crop == "resized":
            steps += [ResizedCrop(sides, tuple(scale or (0.08, 1.0)), interpolation, form.squash)]
        elif padding:
            steps += [v2.RandomCrop(sides, padding=padding, padding_mode="reflect" if reflect else "constant")]
        steps += [v2.RandomHorizontalFlip()] if horizontal_flip else []
        if auto_augment:
            steps.append(form._auto_augment(auto_augment, max(sides)))
        each = OneByOne(v2.Compose(steps or [v2.Identity()]))
        # without a filter other pixels would be taken
        shrinks = crop == "resized" and not resize and form.interpolation != "nearest"
        return Transform(head_, form.normalisation(erasing=random_erasing), form.channels, each, sides if shrinks else None)

    def _auto_augment(self, policy: str, size: int) -> Callable:
        from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, posterize, rand_augment_transform
        from timm.data.transforms import str_to_pil_interp

        settings = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(max(0, min(255, round(255 * mean))) for mean in self.neutral),
            "interpolation": str_to_pil_interp(self.interpolation),
        }
        made_by = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        try:
            made = made_by.get(policy.split("-")[0], auto_augment_transform)(policy, settings)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', got {policy!r} ({error}); check the spelling."
            ) from None
        for operation in chain(getattr(made, "ops", ()), *getattr(made, "policy", ())):
            if operation.aug_fn is posterize:
                operation.aug_fn = posterized
        return made

    def eval_transform(self, *, normalise: bool = True) -> Transform:
        """The transform that gives the processor's output; without `normalise`, its pixels in [0, 1], in the image's order of channels."""
        plain = Augmentation((0.0,) * self.channels, (1.0,) * self.channels)
        return Transform(self.geometry(), self.normalisation() if normalise else plain, self.channels)

    def geometry(self) -> Geometry:
        """The function from an image to the processor's output pixels."""
        return Geometry(self.processor(), self.mean, self.std, self.order or tuple(range(self.channels)), self.whole)

    def normalisation(self, padding: int = 0, reflect: bool = False, flip: bool = False, erasing: float = 0.0) -> Augmentation:
        """The part for batches of pixels from 0 to 255: random moves, then the normalisation, then random erasing.

        Erased pixels become noise with mean 0 and standard deviation 1, as published. If the format's values are not centred, such as pixels in
        [0, 1], that noise would be far out of range. Then it is the noise that ImageNet's normalisation would turn into such noise.
        """
        noise: dict[str, Any] = {}
        if erasing and not all(0 < mean < 1 for mean in self.mean):
            low, spread = (
                [values[place] if self.channels == 3 else float(np.mean(values)) for place in self.order or range(self.channels)]
                for values in (IMAGENET_MEAN, IMAGENET_STD)
            )
            noise["noise_mean"] = tuple((value - mean) / std for value, mean, std in zip(low, self.mean, self.std, strict=True))
            noise["noise_std"] = tuple(value / std for value, std in zip(spread, self.std, strict=True))
        moves = {"padding": padding, "reflect": reflect, "flip": flip, "order": self.order, "erasing": erasing, **noise}
        if min(map(abs, self.std)) > 1 / 50:
            return Augmentation(tuple(self.mean), tuple(self.std), **moves)
        # the processor keeps pixels at 0 to 255; dividing them first would add rounding errors
        mean, std = (tuple(255 * value for value in values) for values in (self.mean, self.std))
        return Augmentation(mean, std, scale=1.0, **moves)

    def at(self, size: int) -> ImageFormat:
        """The same format for square images of another size."""
        if self.own is None:
            return replace(self, size=size)
        return self.of_processor(self.own, size, channels=self.channels)

    def processor(self) -> Any:
        """The image processor that is saved with the network. It does the same as `eval_transform`."""
        if self.own is not None:
            return self.own
        from transformers import BitImageProcessor

        height, width = (round(side / self.crop_ratio) for side in self.sides)
        return BitImageProcessor(
            size={"height": height, "width": width} if self.squash else {"shortest_edge": height},
            crop_size=dict(zip(("height", "width"), self.sides, strict=True)),
            resample=FILTERS.index(self.interpolation),
            image_mean=list(self.mean),
            image_std=list(self.std),
            do_convert_rgb=self.channels == 3,
        )

    def timm_config(self) -> dict[str, Any]:
        """The same settings under timm's names, which a timm network keeps in its config."""
        if self.own is not None and is_timm(self.own):
            return dict(self.own.data_config)
        return {
            "input_size": (self.channels, *self.sides),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_ratio,
            "crop_mode": "squash" if self.squash else "center",
            "mean": self.mean,
            "std": self.std,
        }

    def of_timm(self) -> ImageFormat:
        """The format for a timm network. Its processor is timm's own transform, read from the network's config, so it is not saved again."""
        from transformers import TimmWrapperImageProcessor

        return replace(self, own=TimmWrapperImageProcessor(self.timm_config()))

    def unnormalised(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] for pictures: the first three of four or more channels, the first as grey of fewer."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        pixels = (images.cpu().float() * std + mean).clamp(0, 1)
        pixels = pixels if self.order is None else pixels[:, list(np.argsort(self.order))]
        return pixels[:, :3] if self.channels >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def format_from_scratch(args: DataArguments, dataset: Dataset | None = None, column: str = "image") -> ImageFormat:
    """The format for a new network, from the arguments and the images. With `image_size` no images are needed."""
    given = {"mean": args.image_mean, "std": args.image_std}
    given = {name: tuple(values) for name, values in given.items() if values is not None}
    channels = args.channels or 3
    for name, values in given.items():
        check_channel_values(f"image_{name}", values, channels)
    return ImageFormat.of_images(dataset, column, args.image_size, args.crop_ratio, channels=channels, train_crop=args.train_crop, **given)


def format_of_checkpoint(args: DataArguments, repo_or_folder: str, channels: int, **hub: Any) -> ImageFormat:
    """The format of a checkpoint whose network takes `channels` channels. Raises ValueError for arguments that do not fit it."""
    if args.channels not in (None, channels):
        raise ValueError(f"channels must be those of the checkpoint, {channels}, got {args.channels}; leave it out.")
    if args.crop_ratio is not None:
        raise ValueError(
            f"crop_ratio must be left out with a checkpoint, whose image processor sets it, got {args.crop_ratio}; leave it out."
        )
    return ImageFormat.of_checkpoint(repo_or_folder, args.image_size, channels=channels, mean=args.image_mean, std=args.image_std, **hub)


@dataclass(frozen=True)
class Geometry:
    """The pixels of an image processor's output before it normalises, found by undoing the normalisation."""

    processor: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: tuple[int, ...]
    whole: bool

    def __call__(self, image: PIL.Image.Image | Tensor) -> Tensor:
        """(C, H, W): uint8, or float32 from 0 to 255 if they are not whole numbers."""
        pixels = pixels_of(processed(self.processor, image), self.mean, self.std, self.order)
        return pixels.round_().clamp_(0, 255).to(torch.uint8) if self.whole else pixels


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of an image, resized. Its aspect ratio is that of evaluation, up to a factor between 3/4 and 4/3.

    If evaluation squashes images, the part has the image's own aspect ratio, which gives the same as squashing first.
    """

    sides: tuple[int, int]
    scale: tuple[float, float]
    interpolation: InterpolationMode
    squash: bool

    def __call__(self, image: PIL.Image.Image | Photograph | Tensor) -> PIL.Image.Image | Tensor:
        width, height = (image.shape[-1], image.shape[-2]) if isinstance(image, Tensor) else image.size
        aspect = width / height if self.squash else self.sides[1] / self.sides[0]
        ratio = [3 / 4 * aspect, 4 / 3 * aspect]
        box = v2.RandomResizedCrop.get_params(torch.empty(()).expand(1, height, width), list(self.scale), ratio)
        if isinstance(image, Photograph):
            return image.resized_crop(*box, self.sides, FILTERS.index(self.interpolation.value))
        return v2.functional.resized_crop(image, *box, list(self.sides), self.interpolation)


def _median_side(dataset: Dataset, column: str) -> tuple[int, int]:
    """The median of the longer sides of up to 1000 images, spread over the data set, and their number."""
    from datasets import Image

    rows = np.unique(np.linspace(0, len(dataset) - 1, 1000).astype(int)).tolist()
    files = dataset.select_columns([column])
    encoded = isinstance(files.features[column], Image)
    if encoded:  # the size is in the first bytes of a file
        files = files.cast_column(column, Image(decode=False))
    sides = []
    for row in rows:
        try:
            value = files[row][column]
            if encoded:
                with PIL.Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"])) as image:
                    sides.append(max(image.size))
            else:
                sides.append(max(value.size if isinstance(value, PIL.Image.Image) else np.shape(value)))
        except Exception as error:
            raise unreadable(dataset, column, row, error) from None
    return int(np.median(sides)), len(rows)


def _normalising(processor: Any, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Any:
    """The processor with a mean and a standard deviation for each channel: the given ones, or the single one that its channels share."""
    timm = is_timm(processor)
    changes = {}
    for name, flag, given in (("mean", "image_mean", mean), ("std", "image_std", std)):
        old = processor.data_config[name] if timm else getattr(processor, flag, None)
        if given is None and isinstance(old, Sequence) and len(old) != channels:
            if len(set(old)) > 1:
                raise ValueError(
                    f"{flag} of the image processor must have a value for each of {channels} channels, got {list(old)}; "
                    "pass --image_mean and --image_std."
                )
            given = [old[0]] * channels
        if given is not None:
            check_channel_values(flag, given, channels)
            changes[name if timm else flag] = list(given)
    return _changed(processor, changes) if changes else processor


def _of_size(processor: Any, old: tuple[int, int] | None, size: int) -> Any:
    """The processor for square images of another size. Its resizing and its crop are scaled by the same factor."""
    if is_timm(processor):
        return _changed(processor, {"input_size": (processor.data_config["input_size"][0], size, size)})
    if old is None:
        raise ValueError(
            f"image_size needs an image processor that gives images of one size, got {type(processor).__name__} whose size depends on the "
            "image; set do_resize, size and crop_size in preprocessor_config.json."
        )
    by = {"height": size / old[0], "max_height": size / old[0], "width": size / old[1], "max_width": size / old[1]}
    changes: dict[str, Any] = {}
    for name in ("size", "crop_size", "pad_size", "resize_short"):
        value = getattr(processor, name, None)
        if isinstance(value, int):
            changes[name] = round(value * size / min(old))
        elif value is not None:
            sides = {key: side for key, side in dict(value).items() if side is not None}
            changes[name] = {key: round(side * by.get(key, size / min(old))) for key, side in sides.items()}
    return _changed(processor, changes)


def _changed(processor: Any, changes: dict[str, Any]) -> Any:
    """A copy of the processor with other settings."""
    if is_timm(processor):
        return type(processor)({**processor.data_config, **changes})
    return type(processor).from_dict({**processor.to_dict(), **changes})
