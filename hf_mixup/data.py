"""Images: the embedded digits, data sets of the Hub, local folders; transforms whose randomness is keyed."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from tqdm.auto import tqdm

from hf_mixup.arguments import DataArguments
from hf_mixup.checks import check_cached_size, check_known, nearest, refuse_augmentation_on_device
from hf_mixup.hub import told_plainly
from hf_mixup.rng import hashed, hashed_integers, keyed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def digits() -> DatasetDict:
    """scikit-learn's 1797 handwritten digits, 8x8 and grey, in 1437 to train on and 360 to evaluate on, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    # 17 shades, 0 to 16
    pixels = (data.images * 15.9375).round().astype(np.uint8)
    parts = train_test_split(np.arange(len(pixels)), test_size=360, stratify=data.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    return DatasetDict(
        {
            name: Dataset.from_dict({"image": [pixels[i] for i in rows], "label": data.target[rows].tolist()}, features=features)
            for name, rows in zip(("train", "test"), parts, strict=True)
        }
    )


@dataclass
class ImageData:
    """Two splits of a data set and what their columns are; `train` is None where there is none and none is needed."""

    name: str
    train: Dataset | None
    evaluation: Dataset
    evaluation_split: str
    image_column: str
    label_column: str
    label_names: list[str]


def load_images(
    args: DataArguments, seed: int = 0, *, token: str | None = None, cache_dir: str | None = None, training: bool = True
) -> ImageData:
    """The data set that the arguments name. Raises ValueError when it cannot be had, or lacks splits or columns.

    Args:
        training: False for one to evaluate on, which may lack the split `train`, and if it has one split alone may call it anything.
    """
    splits = load_splits(args, token, cache_dir)
    evaluation_split = next((name for name in ("validation", "val", "valid", "test") if name in splits), None)
    if "train" not in splits and evaluation_split is None and len(splits) == 1:
        evaluation_split = next(iter(splits))
    if "train" not in splits and (training or evaluation_split is None):
        wanted = "a split 'train'" if training else "a split 'validation' or 'test'"
        raise ValueError(f"the data set must have {wanted}, got {sorted(splits)}; rename one.")
    train = splits.get("train")
    described = splits[evaluation_split] if train is None else train
    image_column = _column(described, args.image_column_name, "image", lambda feature: isinstance(feature, Image))
    label_column = _column(described, args.label_column_name, "label", lambda feature: isinstance(feature, ClassLabel))
    feature = described.features[label_column]
    names = feature.names if isinstance(feature, ClassLabel) else [str(n) for n in range(max(described.unique(label_column)) + 1)]
    if evaluation_split is None:
        enough = len(train) * min(args.train_val_split, 1 - args.train_val_split) >= len(names)
        stratify = label_column if isinstance(feature, ClassLabel) and enough else None
        parts = train.train_test_split(args.train_val_split, seed=seed, stratify_by_column=stratify)
        train, evaluation, evaluation_split = parts["train"], parts["test"], f"{args.train_val_split:.0%} of train"
    else:
        evaluation = splits[evaluation_split]
    if args.max_train_samples is not None and train is not None:
        train = train.shuffle(seed=seed).select(range(min(args.max_train_samples, len(train))))
    if args.max_eval_samples is not None:
        evaluation = evaluation.shuffle(seed=seed).select(range(min(args.max_eval_samples, len(evaluation))))
    name = args.dataset_name or Path(args.train_dir or args.validation_dir).name
    return ImageData(name, train, evaluation, evaluation_split, image_column, label_column, names)


def load_splits(args: DataArguments, token: str | None = None, cache_dir: str | None = None) -> dict[str, Dataset]:
    """Every split of the data set that the arguments name, as it is there. Raises ValueError when it cannot be had."""
    folders = {name: path for name, path in (("train", args.train_dir), ("validation", args.validation_dir)) if path is not None}
    if folders:
        for path in folders.values():
            if not Path(path).is_dir():
                raise ValueError(f"train_dir and validation_dir must be folders with one folder a class, got {path!r}; look at the path.")
        files = {name: str(Path(path, "**")) for name, path in folders.items()}
        return load_dataset("imagefolder", data_files=files, cache_dir=cache_dir)
    name = args.dataset_name
    if name == "digits":
        return digits()
    path = Path(name)
    if path.is_dir() and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        loaded = load_from_disk(name)
        return loaded if isinstance(loaded, dict) else {"train": loaded}
    try:
        return load_dataset(name, args.dataset_config_name, token=token, cache_dir=cache_dir)
    except (FileNotFoundError, ConnectionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"dataset_name must be 'digits', a folder, or a data set of the Hub that can be reached, got {name!r} ({first}); look at the name."
        ) from None


def _column(dataset: Dataset, name: str | None, kind: str, fits: Callable[[Any], bool]) -> str:
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"{kind}_column_name must be a column of the data set, got {name!r}; {nearest(name, dataset.column_names)}")
        return name
    fitting = [column for column, feature in dataset.features.items() if fits(feature)]
    usual = [column for column in ("image", "img", "label", "labels", "fine_label") if column in fitting]
    if not fitting:
        fitting = [column for column in ({"image": ["image", "img"], "label": ["label", "labels"]}[kind]) if column in dataset.column_names]
    if not fitting:
        raise ValueError(f"the data set must have a column of type {kind}, got {dataset.column_names}; name it with {kind}_column_name.")
    return (usual or fitting)[0]


# -- transforms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFormat:
    """What a network wants to see. Also what the saved image processor says.

    Attributes:
        size: side of the square image, in pixels.
        crop_ratio: share of the resized image's shorter side that the central crop of evaluation keeps.
        mean, std: of the normalisation, on pixels in [0, 1].
    """

    size: int
    crop_ratio: float = 1.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"

    @classmethod
    def of_images(
        cls, dataset: Dataset, column: str, size: int | None = None, crop_ratio: float | None = None, **fields: Any
    ) -> ImageFormat:
        """For training from scratch. Images of up to 64 pixels keep their size, tiny ones come at 32, the others at 224."""
        longest = max(dataset[0][column].size)
        size = size or (32 if longest <= 32 else 64 if longest <= 64 else 224)
        return cls(size, crop_ratio=crop_ratio or (0.875 if size > 64 else 1.0), **fields)

    @classmethod
    def of_checkpoint(cls, repo_or_folder: str, size: int | None = None, **hub: Any) -> ImageFormat:
        """That of a folder or a repository of the Hub. Raises ValueError where it cannot be had. `hub` is `revision`, `token` and so on."""
        from transformers import AutoImageProcessor

        with told_plainly(repo_or_folder, hub.get("revision")):
            processor = AutoImageProcessor.from_pretrained(repo_or_folder, **{"trust_remote_code": False, **hub})
        return cls.of_processor(processor, size)

    @classmethod
    def of_processor(cls, processor: Any, size: int | None = None) -> ImageFormat:
        """From the image processor of a checkpoint."""
        timm_config = getattr(processor, "data_config", None)
        if timm_config is not None:
            fields = {
                "size": timm_config["input_size"][-1],
                "crop_ratio": timm_config["crop_pct"],
                "interpolation": timm_config["interpolation"],
            }
            mean, std = timm_config["mean"], timm_config["std"]
        else:
            wanted, crop = dict(processor.size), getattr(processor, "crop_size", None)
            side = wanted.get("shortest_edge", wanted.get("height"))
            cropped = dict(crop).get("height", side) if crop and getattr(processor, "do_center_crop", False) else side
            ratio = getattr(processor, "crop_pct", None) or cropped / side
            fields = {"size": cropped, "crop_ratio": ratio if cropped < 384 else 1.0}
            mean, std = processor.image_mean, processor.image_std
        fields["size"] = size or fields["size"]
        return cls(**fields, mean=tuple(mean), std=tuple(std))

    def train_transform(
        self,
        horizontal_flip: bool = True,
        *,
        size: int | None = None,
        crop: str | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        resize: int | None = None,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
    ) -> Transform:
        """Random crop, flip, timm's automatic augmentation, tensor, normalise, timm's random erasing with noise.

        Args:
            size: of the images, where it is not that of evaluation.
            crop: `pad` with zeros by an eighth, or `reflect`, and crop; `resized`; or `none`. By default the first up to 64 pixels.
            scale: smallest and largest share of the image in a `resized` crop.
            resize: the shorter side before the crop.
            auto_augment: a policy of timm, such as `rand-m9-mstd0.5-inc1`.
            random_erasing: its probability.
        """
        interpolation, size = InterpolationMode(self.interpolation), size or self.size
        crop = crop or ("pad" if size <= 64 else "resized")
        check_known("train_crop", crop, ["pad", "reflect", "resized", "none"])
        head = [v2.Resize(resize, interpolation) if resize else v2.Identity()]
        if crop != "resized":
            head += [v2.Resize((size, size), interpolation)]
        padding, reflect = size // 8 if crop in ("pad", "reflect") else 0, crop == "reflect"
        if crop != "resized" and not auto_augment and not random_erasing:
            return Transform(v2.Compose(head), Augmentation(self.mean, self.std, padding, reflect, horizontal_flip))
        steps = []
        if crop == "resized":
            steps += [v2.RandomResizedCrop(size, tuple(scale), interpolation=interpolation)]
        elif padding:
            steps += [v2.RandomCrop(size, padding=padding, padding_mode="reflect" if reflect else "constant")]
        steps += [v2.RandomHorizontalFlip()] if horizontal_flip else []
        if auto_augment:
            steps.append(self._auto_augment(auto_augment, size))
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        if random_erasing:
            from timm.data.random_erasing import RandomErasing

            steps.append(RandomErasing(random_erasing, mode="pixel", device="cpu"))
        return Transform(v2.Compose(head), OneByOne(v2.Compose(steps)))

    def _auto_augment(self, policy: str, size: int) -> Callable:
        from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
        from timm.data.transforms import str_to_pil_interp

        settings = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(min(255, round(255 * mean)) for mean in self.mean),
            "interpolation": str_to_pil_interp(self.interpolation),
        }
        made_by = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        try:
            return made_by.get(policy.split("-")[0], auto_augment_transform)(policy, settings)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ValueError(
                f"auto_augment must be a policy of timm such as 'rand-m9-mstd0.5-inc1', got {policy!r} ({error}); mend it."
            ) from None

    def eval_transform(self) -> Transform:
        resized = v2.Resize(round(self.size / self.crop_ratio), InterpolationMode(self.interpolation))
        return Transform(v2.Compose([resized, v2.CenterCrop(self.size)]), Augmentation(self.mean, self.std))

    def processor(self):
        """The transformers image processor that does what `eval_transform` does."""
        from transformers import BitImageProcessor

        resample = {"bilinear": 2, "bicubic": 3}[self.interpolation]
        return BitImageProcessor(
            size={"shortest_edge": round(self.size / self.crop_ratio)},
            crop_size={"height": self.size, "width": self.size},
            resample=resample,
            image_mean=list(self.mean),
            image_std=list(self.std),
            do_convert_rgb=True,
        )

    def unnormalised(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1], for looking at."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.cpu().float() * std + mean).clamp(0, 1)


@dataclass(frozen=True)
class Augmentation:
    """Random crop, mirror and normalisation of a batch in one go, on any device.

    Attributes:
        mean, std: of the normalisation, on pixels in [0, 1].
        padding: pixels added to each side before the crop back to the size of before.
        reflect: what is added is mirrored; else it is black.
        flip: mirror one half of the images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    reflect: bool = False
    flip: bool = False

    def __call__(self, images: Tensor | Sequence[Tensor], keys: Tensor) -> Tensor:
        """(B, 3, H, W) float32 of images (B, 3, H, W) uint8. What is drawn for one follows from its key (B,) int64 alone."""
        images = images if isinstance(images, Tensor) else torch.stack(images)
        if self.padding or self.flip:
            images = self._moved(images, keys)
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        return images.float().mul_(1 / 255).sub_(mean).div_(std)

    def _moved(self, images: Tensor, keys: Tensor) -> Tensor:
        height, width = images.shape[2:]
        # where the pixels of row y and column x come from, (B, H) and (B, W)
        y, x = (torch.arange(side, device=images.device).expand(len(images), -1) for side in (height, width))
        if self.flip:
            x = torch.where(hashed_integers(keys, 2, 2)[:, None] == 1, width - 1 - x, x)
        y, x = (axis + (hashed_integers(keys, draw, 2 * self.padding + 1) - self.padding)[:, None] for draw, axis in enumerate((y, x)))
        if self.reflect:
            y, x = (last - (last - axis.abs()).abs() for axis, last in ((y, height - 1), (x, width - 1)))
        from_y, from_x = y.clamp(0, height - 1), x.clamp(0, width - 1)
        source = (from_y[:, :, None] * width + from_x[:, None, :]).flatten(1)[:, None]
        moved = images.flatten(2).gather(2, source.expand(-1, images.shape[1], -1)).view_as(images)
        inside = (y == from_y)[:, :, None] & (x == from_x)[:, None, :]
        return moved * inside[:, None]


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept, because copying them to an accelerator for every batch would wait for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


@dataclass(frozen=True)
class OneByOne:
    """Transforms of single PIL images that draw from the global streams, by keys all the same."""

    transform: Callable[[PIL.Image.Image], Tensor]

    def __call__(self, images: Iterable[Tensor], keys: Tensor) -> Tensor:
        """(B, 3, S, S) float32 of uint8 images of any sizes."""
        done = []
        for image, key in zip(images, keys.tolist(), strict=True):
            with seeded_streams(key):
                done.append(self.transform(to_pil_image(image)))
        return torch.stack(done)


@dataclass(frozen=True)
class Transform:
    """What becomes of an image, in two halves.

    Attributes:
        head: from a PIL image to one; draws nothing, so that its pixels can be kept.
        tail: from uint8 pixels, and a key for each image, to what a network sees.
    """

    head: Callable[[PIL.Image.Image], PIL.Image.Image]
    tail: Augmentation | OneByOne

    def pixels(self, image: PIL.Image.Image) -> Tensor:
        """(3, H, W) uint8."""
        return pil_to_tensor(self.head(image.convert("RGB")))

    def __call__(self, image: PIL.Image.Image, key: int = 0) -> Tensor:
        """(3, S, S) float32 of one image."""
        return self.tail([self.pixels(image)], torch.tensor([key]))[0]


class ImageDataset(torch.utils.data.Dataset):
    """`{"pixel_values": (3, H, W) float32, "labels": int}` of a data set of images.

    What a transform draws follows from (seed, epoch, row), not from a global stream: the same images come in batches of any size, at
    any number of workers, and to a resumed run.

    Args:
        data: with an image and a label column; images of any mode become RGB.
        cache: decode and resize all images now, and keep them in memory, one copy for all workers of this process.
        on_device: give uint8 pixels, and `augmentation_keys` for `transform.tail`, which MixupTrainer then applies on the device.

    Raises:
        ValueError: for images that cannot be read, with `cache` for those of several sizes, and with `on_device` for transforms that
            take images one by one.
    """

    def __init__(
        self,
        data: Dataset,
        image_column: str,
        label_column: str,
        transform: Transform,
        seed: int = 0,
        *,
        cache: bool = False,
        on_device: bool = False,
    ):
        if on_device and not isinstance(transform.tail, Augmentation):
            refuse_augmentation_on_device()
        self.data = data.select_columns([image_column, label_column])
        self.image_column, self.label_column = image_column, label_column
        self.transform, self.seed, self.on_device = transform, seed, on_device
        # in shared memory, because persistent workers keep the copy of the data set that they started with
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._cache: tuple[Tensor, list] | None = self._decoded() if cache else None

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """A row, or (row, copy): of every copy of an image, another augmentation is drawn."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The same for a batch, which DataLoaders ask for."""
        rows, copies = zip(*((index, 0) if isinstance(index, int) else index for index in indices), strict=True)
        if self._cache is None:
            pixels, labels = zip(*map(self._read, rows), strict=True)
        else:
            pixels, labels = self._cache[0][list(rows)], [self._cache[1][row] for row in rows]
        epoch = keyed(self.seed, int(self._epoch)).initial_seed()
        keys = hashed(torch.tensor(rows) + (torch.tensor(copies) << 40), epoch)
        if self.on_device:
            return [
                {"pixel_values": image, "labels": label, "augmentation_keys": key}
                for image, label, key in zip(pixels, labels, keys, strict=True)
            ]
        images = self.transform.tail(pixels, keys)
        return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    def _read(self, row: int) -> tuple[Tensor, Any]:
        try:
            example = self.data[row]
            pixels = self.transform.pixels(example[self.image_column])
        except Exception as error:
            raise ValueError(
                f"every row must hold a readable image, got an error at row {row} ({error}); repair or drop that row."
            ) from None
        return pixels, example[self.label_column]

    def _decoded(self) -> tuple[Tensor, list]:
        """(N, 3, H, W) uint8 and the labels. Not in shared memory, which containers have little of: forked workers share it as it is."""
        labels = []
        for row in tqdm(range(len(self)), desc="decoding images", disable=None):
            pixels, label = self._read(row)
            if row == 0:
                images = pixels.new_empty((len(self), *pixels.shape))
            check_cached_size(row, pixels, images[0])
            images[row] = pixels
            labels.append(label)
        return images, labels


@contextlib.contextmanager
def seeded_streams(key: int) -> Iterator[None]:
    """Inside, the global streams that transforms draw from, of torch, Python and numpy, follow from the key; after, they are as before."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = keyed(key).initial_seed()
    torch.random.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


class RepeatedAugmentation(torch.utils.data.Sampler):
    """The order of repeated augmentation (Hoffer et al., CVPR 2020, arXiv:1901.09335; as in DeiT's and timm's sampler): every image
    is shown `repeats` times in a row, each time augmented anew, and an epoch is as long as without, so it holds fewer images.

    Where several processes share the order, copies of an image go to different ones. What is left of the last batch is dropped.

    Args:
        length: images of the data set, an `ImageDataset`, which is asked for (row, copy).
        repeats: augmentations of each.
        batch_size, processes: images that a process takes at once, and how many processes take turns.
        seed: with the epoch, the order follows from it.
    """

    def __init__(self, length: int, repeats: int, batch_size: int, processes: int, seed: int):
        self.length, self.repeats, self.batch_size, self.processes, self.seed = length, repeats, batch_size, processes, seed
        self.epoch = 0
        if length < batch_size * processes:
            raise ValueError(
                f"repeated augmentation needs at least one batch of {batch_size * processes} images, got {length}; make batches smaller."
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.processes) * self.batch_size * self.processes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rows = torch.randperm(self.length, generator=keyed(self.seed, self.epoch)).tolist()
        # the next image of the list goes to the next process, and every process takes its batch in one piece
        order = torch.arange(len(self)).view(-1, self.batch_size, self.processes).transpose(1, 2).flatten().tolist()
        for place in order:
            yield rows[place // self.repeats], place % self.repeats
