"""Mixing in any training loop of transformers: a data collator, a loss for `compute_loss_func`, a callback."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import TrainerCallback
from transformers.data import DefaultDataCollator, default_data_collator

from hf_mixup.core.checks import check_count, check_distributions, check_examples, check_images, check_labels, check_num_labels
from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.core.plan import ONE_PASS_FROM, MixPlan, blend_examples, mix_targets, onehot
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed
from hf_mixup.method import Method, check_model_free
from hf_mixup.methods import MethodChoice

logger = logging.getLogger(__name__)


class MixedBatch(dict):
    """A batch whose labels are final. The type survives accelerate's and the Trainer's moves to a device, which an extra key
    would not: models reject or swallow keys that they do not know."""


@dataclass
class MixupCollator:
    """Stacks examples into a batch and mixes it, in one pass over the pixels. Labels come out soft, (B, num_labels) float32.

    For training only: give a stock `Trainer` `MixupCallback(collator)` and `compute_loss_func=MixupLoss()`, so that evaluation
    stays plain. Methods that need the model are refused. Plans are drawn from one number of the worker's own torch stream and
    the process rank, so no two workers or processes repeat each other; a resumed run is exact at the ends of epochs only
    (MixupTrainer's is exact at any step).

    Args:
        mix: a method of `METHODS` that needs images only, or several, of which one is chosen for every batch.
        num_labels: classes; needed where labels are class numbers.
        mix_prob: one probability for each method; equal ones if None.
        alpha: one for each method, or one for all.
        mix_args: other hyper-parameters by method, `{"cutmix": {"mode": "batch"}}`.
        base_collator: makes the batch, a mapping with `pixel_values` and `labels`; None stacks, which is faster.
        mode: `sample`, `pair` or `batch`, for every method that has it.
        mix_rate: the share of batches that is mixed, 0 to 1.
        mix_repeat: independent mixtures of each batch; r of them give r * B rows.
        check_finite: refuse NaN and infinite pixels.

    Raises:
        ValueError: at construction for methods and hyper-parameters, at the batch for images and labels that cannot be mixed.
    """

    mix: str | Method | Sequence[str | Method] = "cutmix"
    num_labels: int | None = None
    mix_prob: Sequence[float] | None = None
    alpha: float | Sequence[float] | None = None
    mix_args: Mapping[str, Mapping[str, Any]] | None = None
    base_collator: Callable[[list], Mapping] | None = None
    mode: str | None = None
    mix_rate: float = 1.0
    mix_repeat: int = 1
    check_finite: bool = True
    choice: MethodChoice = field(init=False, repr=False)

    def __post_init__(self):
        self.choice = MethodChoice.build(self.mix, self.mix_prob, self.alpha, self.mix_args, mode=self.mode, mix_rate=self.mix_rate)
        for method in self.choice.methods:
            check_model_free(method, "MixupCollator")
        check_count(1, mix_repeat=self.mix_repeat)
        if self.num_labels is not None:
            check_num_labels(self.num_labels)

    def __call__(self, examples: list) -> MixedBatch:
        if self.base_collator is None:
            images, labels, others = _unpack(examples)
            images = _checked(images)
        else:
            others = dict(self.base_collator(examples))
            images, labels = others.pop(_image_key(others)), others.pop(_label_key(others))
            check_images(images, finite=False)
            images = images if images[0].numel() < ONE_PASS_FROM else list(images)
        check_labels(labels, len(images), self.num_labels)
        out = _batch_like(images[0], self.mix_repeat * len(images))
        check_images(out, finite=False)
        key = int(torch.randint(2**62, ()))
        rank = int(os.environ.get("RANK", 0))  # a plain DataLoader seeds the workers of all processes alike
        mixed_targets, totals = [], []
        for repeat, rows in enumerate(out.chunk(self.mix_repeat)):
            plan = self._plan(images, rows, keyed(key, rank, repeat))
            blend_examples(plan, images, rows, lambda part: totals.append(part.sum()) if self.check_finite else None)
            mixed_targets.append(mix_targets(plan, labels, self.num_labels))
        if not math.isfinite(sum(totals)):
            check_images(out)  # says where, if it was not the sum that ran over
        if self.mix_repeat > 1:
            others = {k: torch.cat([v] * self.mix_repeat) if isinstance(v, Tensor) else v for k, v in others.items()}
        return MixedBatch(others, pixel_values=out, labels=mixed_targets[0] if self.mix_repeat == 1 else torch.cat(mixed_targets))

    def _plan(self, images: list[Tensor] | Tensor, rows: Tensor, rng: torch.Generator) -> MixPlan:
        """`rows` (B, C, H, W), where the mixtures go, holds the images until then if the policy looks at them."""
        if len(images) == 1:
            _log_once("a batch of one image is not mixed; use dataloader_drop_last=True to leave it out")
            return MixPlan.identity(1)
        method = self.choice.draw(rng)
        signals = Signals()
        if "images" in method.sample.needs:
            signals["images"] = images if isinstance(images, Tensor) else torch.stack(images, out=rows)
        return method.sample.plan(rows.shape, rng, signals)


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)


def _unpack(examples: list) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Images, labels and the other columns that make tensors, of a list of examples (mappings)."""
    if not examples:
        check_examples(examples)
    first = examples[0]
    if not isinstance(first, Mapping):
        raise TypeError(
            f"examples must be mappings with 'pixel_values' and 'labels', got {type(first).__name__}; return dicts from the data set."
        )
    image_key, label_key = _image_key(first), _label_key(first)
    labels = [example[label_key] for example in examples]
    try:
        if isinstance(labels[0], int):
            labels = np.array(labels)  # which torch reads five times as fast as a list
        labels = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"labels must be class numbers, or soft labels of one length, got {labels[0]!r} and others; make numbers of names in the data set."
        ) from None
    others = {
        key: torch.stack([example[key] for example in examples])
        for key, value in first.items()
        if key not in (image_key, label_key) and isinstance(value, Tensor)
    }
    return [example[image_key] for example in examples], labels, others


def _checked(images: list[Tensor]) -> list[Tensor] | Tensor:
    """All images are of one size; small ones come stacked."""
    if isinstance(images[0], Tensor) and images[0].numel() < ONE_PASS_FROM:
        try:
            return torch.stack(images)
        except (RuntimeError, TypeError):
            pass  # what is wrong, the check says better
    check_examples(images)
    return images


def _image_key(columns: Mapping) -> str:
    if "pixel_values" not in columns:
        raise ValueError(
            f"examples must have a column 'pixel_values', got {sorted(columns)}; "
            "rename the image column, and set remove_unused_columns=False if the Trainer dropped it."
        )
    return "pixel_values"


def _label_key(columns: Mapping) -> str:
    for key in ("labels", "label"):
        if key in columns:
            return key
    raise ValueError(f"examples must have a column 'labels' or 'label', got {sorted(columns)}; rename the column of the classes.")


def _batch_like(example: Tensor, batch: int) -> Tensor:
    """An uninitialised batch, in shared memory inside a worker, which saves the copy to the main process."""
    shape = (batch, *example.shape)
    if get_worker_info() is None or example.device.type != "cpu":
        return example.new_empty(shape)
    storage = example._typed_storage()._new_shared(batch * example.numel(), device=example.device)
    return example.new(storage).resize_(shape)


@dataclass
class CheckedCollator:
    """The collator of training, with a look at what it is given and what it makes; in a worker, where waiting costs nothing."""

    base: Callable
    num_labels: int
    multi_label: bool
    on_device: bool = False  # images are uint8, and augmented and normalised there

    def __call__(self, examples: list) -> Any:
        if isinstance(examples[0], dict) and "pixel_values" in examples[0]:
            check_examples([example["pixel_values"] for example in examples])
        batch = self.base(examples)
        wanted = ["pixel_values", "labels", *(["augmentation_keys"] if self.on_device else [])]
        if not all(name in batch for name in wanted):
            raise ValueError(
                f"a batch must have {' and '.join(map(repr, wanted))}, got {sorted(batch)}; rename the columns, and set remove_unused_columns=False "
                "if the Trainer dropped one."
            )
        check_images(batch["pixel_values"], finite=not isinstance(batch, MixedBatch), raw=self.on_device)
        check_labels(batch["labels"], len(batch["pixel_values"]), self.num_labels)
        if not self.multi_label:
            check_distributions(batch["labels"])
        return batch


class MixupLoss:
    """The loss of mixed batches for any `Trainer`: `Trainer(..., compute_loss_func=MixupLoss())`.

    Takes soft labels (B, num_labels) and hard labels (B,), and is right under gradient accumulation: it divides by the images
    of the whole accumulated batch. In evaluation neither smoothing nor target threshold applies, so losses stay comparable.

    Args:
        label_smoothing: of the mixed target, 0 to 1; use it in place of `label_smoothing_factor`, which mixing cannot have.
        loss: `CrossEntropy()` or another of `hf_mixup.core.losses`; its own smoothing field and `label_smoothing` exclude each other.
    """

    def __init__(self, label_smoothing: float = 0.0, loss: Loss | None = None):
        if loss is not None and label_smoothing:
            raise ValueError(f"label_smoothing must be given once, got {label_smoothing} beside loss={loss!r}; set it in the loss.")
        self.loss = CrossEntropy(label_smoothing) if loss is None else loss
        self._warned = False

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        soft = labels.ndim == 2
        training = torch.is_grad_enabled()
        if soft and not training and not self._warned:
            self._warned = True
            warnings.warn(
                "evaluation was expected to have plain labels, got soft ones; a MixupCollator given as data_collator mixes the "
                "evaluation set too: give the Trainer callbacks=[MixupCallback(collator)] instead.",
                stacklevel=2,
            )
        if not self.loss.multi_label:
            check_distributions(labels)
        targets = onehot(labels, logits.shape[1])
        losses = self.loss(logits, targets) if training or self.loss.multi_label else CrossEntropy()(logits, targets)
        if num_items_in_batch is None:
            return losses.mean()
        # the Trainer counts every number of a soft label as an item
        return losses.sum() / (num_items_in_batch / (labels.shape[1] if soft else 1))


class MixupCallback(TrainerCallback):
    """Mixes the training batches of an unmodified `Trainer`, and only those: `Trainer(..., callbacks=[MixupCallback(collator)])`.

    The Trainer's own collator makes the batch, unless it is the default one, which the faster `MixupCollator` replaces. Give
    the Trainer `compute_loss_func=MixupLoss()` too: without it transformers takes soft labels for multi-label ones.

    Raises:
        RuntimeError: at the first batch, when the loss of the model would see the soft labels.
    """

    def __init__(self, collator: MixupCollator):
        if not isinstance(collator, MixupCollator):
            raise TypeError(f"MixupCallback needs a MixupCollator, got {type(collator).__name__}; wrap yours with base_collator=.")
        self.collator = collator

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0 when mixing, got {args.label_smoothing_factor}; use MixupLoss(label_smoothing=...)."
            )
        if args.per_device_train_batch_size < 2:
            raise ValueError("mixing needs at least 2 images in a batch, got per_device_train_batch_size=1; raise it.")
        # accelerate puts its own class around the loader, whose attribute the iteration does not read
        self._loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        self._plain = self._loader.collate_fn
        collator = self.collator
        if collator.base_collator is None and not _is_default(self._plain):
            collator = dataclasses.replace(collator, base_collator=self._plain)
        self._loader.collate_fn = collator
        self._guard = model.register_forward_pre_hook(self._first_batch, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        self._loader.collate_fn = self._plain
        self._guard.remove()

    def _first_batch(self, module, args, kwargs):
        self._guard.remove()
        labels = kwargs.get("labels")
        if labels is not None and labels.ndim == 2:
            raise RuntimeError(
                "labels must be class numbers where the model's own loss sees them, got soft ones, which it takes for multi-label; "
                "give the Trainer compute_loss_func=MixupLoss()."
            )


def _is_default(collate_fn: Any) -> bool:
    return collate_fn is default_data_collator or isinstance(collate_fn, DefaultDataCollator)
