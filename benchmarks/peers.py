"""Mixers of other libraries, as functions: (images, class numbers) to (mixed images, soft targets)."""

from __future__ import annotations

from collections.abc import Callable

from timm.data import Mixup as TimmMixup
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def peers(num_labels: int) -> dict[str, Mix]:
    """The mixers by name. Kornia's are left out if it is not installed."""

    def timm(mode: str, mixup_alpha: float, cutmix_alpha: float) -> Mix:
        return TimmMixup(mixup_alpha, cutmix_alpha, mode=mode, label_smoothing=0.0, num_classes=num_labels)

    found: dict[str, Mix] = {
        "timm mixup, batch": timm("batch", 1.0, 0.0),
        "timm cutmix, batch": timm("batch", 0.0, 1.0),
        "timm mixup, per image": timm("elem", 1.0, 0.0),
        "timm cutmix, per image": timm("elem", 0.0, 1.0),
        "torchvision MixUp": v2.MixUp(alpha=1.0, num_classes=num_labels),
        "torchvision CutMix": v2.CutMix(alpha=1.0, num_classes=num_labels),
    }
    try:
        from kornia.augmentation import RandomCutMixV2, RandomMixUpV2
    except ImportError:
        return found
    keys = ["input", "class"]

    def kornia(mixer: Callable, of_own: bool) -> Mix:
        def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            mixed, labels = mixer(images, labels)  # (B, 3): both class numbers, and the share of one of them
            own, partner, share = labels.reshape(-1, 3).unbind(1)
            own, partner = (F.one_hot(classes.long(), num_labels) for classes in (own, partner))
            share = (share if of_own else 1 - share)[:, None]
            return mixed, share * own + (1 - share) * partner

        return mix

    found["kornia RandomMixUpV2"] = kornia(RandomMixUpV2(p=1.0, data_keys=keys), of_own=False)
    found["kornia RandomCutMixV2"] = kornia(RandomCutMixV2(p=1.0, data_keys=keys, use_correct_lambda=True), of_own=True)
    return found
