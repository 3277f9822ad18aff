"""What a network wants to see of an image: size, crop, normalisation, and the image processor that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from hf_mixup.core.checks import check_known
from hf_mixup.core.hub import told_plainly
from hf_mixup.data.augment import Augmentation, OneByOne, Transform

if TYPE_CHECKING:
    from datasets import Dataset

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
