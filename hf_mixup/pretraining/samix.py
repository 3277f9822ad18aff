"""SAMix without labels, on MoCo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_mixup.core.checks import check_between, check_count, check_known
from hf_mixup.core.losses import CrossEntropy, Loss
from hf_mixup.core.plan import Dense, MixPlan, blend, mix_targets
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, beta
from hf_mixup.mixers.masks import MASK_LOSSES, adjust_mask, check_mixer, mask_loss
from hf_mixup.networks.passes import input_of, watched
from hf_mixup.networks.signals.features import Stages
from hf_mixup.pretraining.clusters import Clusters
from hf_mixup.pretraining.contrast import hide
from hf_mixup.pretraining.losses import Separate
from hf_mixup.pretraining.moco import Queued, QueueState
from hf_mixup.pretraining.processes import everyone
from hf_mixup.pretraining.state import Batch, through, unit
from hf_mixup.steps.learned.mixing import load_mixer
from hf_mixup.steps.learned.state import choose_stage
from hf_mixup.steps.standard import check_whole_images
from hf_mixup.steps.step import Parts, StepOutput

MIXER_LOSSES = ("infonce", "pair", "cluster")
MIXBLOCK = ("reduction", "lam_input", "lam_mul_k", "value_neck", "value_norm", "x_qk_concat", "upsampling")


class SAMixState(QueueState):
    """A state with a mixer, which gets the key network's features.

    Args:
        stage: stage of the key network, see `MixerStep`.
        make_mixer: function from the number of channels to a mixer.
        clusters: number of clusters of SAMix-C; 0 for none.
    """

    def __init__(self, stage: int | str | None, make_mixer: Callable[[int], nn.Module], clusters: int, *args):
        super().__init__(*args)
        name, channels = choose_stage(self.key.network, stage)
        self.stages = Stages(self.key.network, [name])
        self.mixer = make_mixer(channels)
        self.clusters = Clusters(clusters, self.queue.shape[1]) if clusters else None

    @property
    def mixer_learns(self) -> bool:
        return any(parameter.requires_grad for parameter in self.mixer.parameters())

    def train(self, mode: bool = True) -> SAMixState:
        super().train(mode)
        if not self.mixer_learns:
            self.mixer.eval()  # a frozen mixer keeps its statistics too
        return self

    def remember(self, keys: Tensor) -> None:
        super().remember(keys)
        if self.clusters is not None:
            self.clusters.seen.add_(len(keys))

    def embedded(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The key network's projections (B, d), and features (B, C, h, w). Its weights get no gradients; the images may."""
        taps = [input_of(self.classifiers[1]), *self.stages.taps(tuple(images.shape[2:]))]
        _, (rows, features) = watched(self.key, images, taps)
        return through(self.key_projector.network, rows), features

    @torch.no_grad()
    def masks(self, images: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(B, K, H, W), the mixer's masks for images (B, C, H, W), with `index` and `weight` (B, K) as in a MixPlan; for pictures."""
        return self.mixer(self.embedded(images)[1], index, weight, tuple(images.shape[2:]))


@dataclass(frozen=True)
class SAMix(Queued):
    """SAMix without labels (Li et al., arXiv:2111.15454), on MoCo v2: a mixer learns the masks.

    The own image comes from the first view and its partner from the second. Each should find its key of the other view in the queue. The query
    network learns from clean images, and from mixtures by masks without gradients. The mixer learns through the key network, whose weights
    stay, from mixtures with other pairs. Its loss is `infonce`, against the queue (SAMix's global term), or `pair`, the two sources against each
    other (its local term). The other term has weight `extra`, with positives drawn between both views (`r ~ Beta(2, 2)` for every channel).
    SAMix-P is this with `mixer`, a trained mixer. SAMix-C is this with `mixer_loss="cluster"`: clusters of the keys are classes. A classifier of
    them learns from clean images and mixtures. A copy of it, from after the last step, teaches the mixer, and `extra` is the weight of `pair`.

    The sample policy of the catalogue draws a lam for every image, and the loss on the masks' area is computed for each image. Only then does
    the mixer get lam in training: batch norm in its value neck divides by the spread of the batch, which removes a lam that all images share.

    Deviations from OpenMixup's `MoCoSAMix`:
    1. The mixer gets features of the images that it mixes. (There, partners' features are permuted twice, but their images once.)
    2. The weights of the mixer's loss do not change the query network's loss.
    3. Positives are not extrapolated.
    4. The catalogue has one lam for every image, a value neck as in SAMix with labels, and weight 1 on the masks' area. (There: one lam for the
       batch, no neck, weight 0.1. With these, all masks end with one area, whatever lam is.)
    5. SAMix-C clusters the keys in the queue, again every `cluster_interval` steps. So it needs no pass over the data set, and a resumed run is
       exact. (There: k-means of the whole data set's features, or ODC.)
    6. In SAMix-C the mixer learns only from the copy of the classifier. (There: from the classifier's loss too.) We have not seen accuracies of
       SAMix-C.

    Args:
        temperature, queue_size: see `Queued`; keys are made in one pass, so `bn_splits` is 1.
        stage: of the network whose features the mixer sees, see `MixerStep`.
        mixer: folder or Hub id of a trained mixer, used frozen; its own settings then replace those of the step.
        reduction, lam_input, lam_mul_k, value_neck, value_norm, x_qk_concat, upsampling: settings of the mixer, see `MixBlock`.
        mixer_loss: `infonce`, `pair` or `cluster`.
        mixer_weight: its weight.
        clusters: number of clusters with `cluster`, 0 without. An experiment on ImageNet in OpenMixup 0.2.9 has 500, found again every 250 updates.
        cluster_interval: steps after which the clusters are found again. Before the first time, the mixer learns from the other terms only.
        extra: weight of the other one; 0.5 in OpenMixup, if used.
        mask_loss, mask_loss_mode, mask_loss_margin: weight and kind of the loss on the masks' area.
        mask_margin: the query network's masks are scaled to the area lam if they differ from it by more than this; 1 means never.
    """

    losses: ClassVar[tuple[type[Loss], ...]] = (Separate,)

    stage: int | str | None = None
    mixer: str | None = None
    reduction: int = 2
    lam_input: str = "multiply_residual"
    lam_mul_k: float = -1.0
    value_neck: bool = False
    value_norm: str = "bn"
    x_qk_concat: bool = True
    upsampling: str = "bilinear"
    mixer_loss: str = "infonce"
    mixer_weight: float = 1.0
    clusters: int = 0
    cluster_interval: int = 250
    extra: float = 0.0
    mask_loss: float = 0.1
    mask_loss_mode: str = "L1+Variance"
    mask_loss_margin: float = 0.1
    mask_margin: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_mixer(attention_norm="none", **{name: getattr(self, name) for name in MIXBLOCK if name != "value_neck"})
        check_known("mixer_loss", self.mixer_loss, MIXER_LOSSES)
        check_count(0, clusters=self.clusters)
        check_count(1, cluster_interval=self.cluster_interval)
        if (self.clusters > 1) != (self.mixer_loss == "cluster"):
            raise ValueError(
                f"clusters must be at least 2 with mixer_loss='cluster', and 0 without, got {self.clusters} with {self.mixer_loss!r}; set both."
            )
        if self.clusters > self.queue_size:
            raise ValueError(
                f"clusters must be at most queue_size, whose keys they are of, got {self.clusters} and {self.queue_size}; raise it."
            )
        if self.clusters and self.mixer is not None:
            raise ValueError(f"clusters are to train a mixer, got a trained one, {self.mixer!r}; leave one of them out.")
        for name in ("mixer_loss", "mixer_weight", "extra", "mask_loss_mode", "mask_loss_margin"):
            value = getattr(self, name)
            if self.mixer is not None and value != getattr(type(self), name):
                raise ValueError(
                    f"{name} is for a mixer that learns, got {value!r} with a trained one, {self.mixer!r}; leave one of them out."
                )
        check_known("mask_loss_mode", self.mask_loss_mode, MASK_LOSSES)
        check_between(0, 1, mask_loss_margin=self.mask_loss_margin, mask_margin=self.mask_margin)
        check_between(0, 1e3, extra=self.extra, mask_loss=self.mask_loss, mixer_weight=self.mixer_weight)
        fixed = {
            "positives": "other",
            "both_ways": False,
            "halved": False,
            "one_pass": False,
            "input_mix": 0,
            "layers": (0,),
            "bn_splits": 1,
        }
        for name, value in {**fixed, "mix_temperature": None}.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be left out for samix, got {getattr(self, name)!r}; it has its own views and temperatures.")

    def make_state(self, parts: Parts, network: nn.Module, layers: list[nn.Module | None]) -> SAMixState:
        check_whole_images(parts, "samix")
        projector = self.projector, self.projector_norm
        return SAMixState.for_parts(
            parts, network, self.stage, self.make_mixer, self.clusters, self.queue_size, network, projector, None, layers
        )

    def make_mixer(self, channels: int) -> nn.Module:
        from hf_mixup.mixers import MixBlock

        if self.mixer is not None:
            return load_mixer(MixBlock, self.mixer, channels)
        return MixBlock(channels, **{name: getattr(self, name) for name in MIXBLOCK})

    def run(self, parts: Parts, state: SAMixState, network: nn.Module, images: Tensor, targets: Any, key: MixKey) -> StepOutput:
        """`images` (B, 2, C, H, W); `targets` are not used."""
        rng, views = key.own_rng(), list(images.unbind(1))
        plans = [parts.sample.plan(views[0].shape, rng, Signals(images.device, images=views[0])) for _ in range(2)]
        rows, width = len(images), self.projector[-1]
        between = beta(2.0, rows * width, rng).view(rows, width).float().to(images.device)
        return self.learned(parts, state, network, views, plans, between)

    def learned(
        self, parts: Parts, state: SAMixState, network: nn.Module, views: list[Tensor], plans: list[MixPlan], between: Tensor
    ) -> StepOutput:
        """Runs the step with these draws: plans of the query network's mixtures and of the mixer's, and `between` (B, d), the place of the
        extended positives between both views."""
        first, second = views
        size, one_lam = tuple(first.shape[2:]), bool((plans[1].weight == plans[1].weight[:1]).all())  # read on the CPU
        for_query, for_mixer = (plan.to(first.device) for plan in plans)
        with torch.no_grad():
            projected, features = state.embedded(torch.cat(views))
            keys, maps = unit(projected).chunk(2), features.chunk(2)
            mask = state.mixer(maps[0], for_query.index, for_query.weight, size, others=maps[1])
            lam = for_query.weight[:, 0]
            far = (mask[:, 0].mean((1, 2)) - lam).abs() > self.mask_margin
            mask = torch.where(far[:, None, None, None], adjust_mask(mask, lam), mask)
        plan = replace(for_query, mask=Dense(mask), sources=(first, second[for_query.index[:, 1]]))
        batches = [Batch(first), Batch(blend(plan, first))]
        clean, mixture = map(unit, state.projected(network, batches, one_pass=False))
        own, partners = keys[1], keys[0]  # both sources should be found in the other view
        plain, _, _ = self._infonce(state, clean, own, partners, MixPlan.identity(len(first)).to(first.device))
        losses, scores, targets = self._infonce(state, mixture, own, partners, for_query)
        loss = self.clean * plain.mean() + self.mixed * losses.mean()
        if state.mixer_learns:
            mask = state.mixer(maps[0], for_mixer.index, for_mixer.weight, size, others=maps[1])
            area = mask_loss(mask, for_mixer.weight[:, 0], self.mask_loss_mode, self.mask_loss_margin, per_sample=not one_lam)
            sources = first, second[for_mixer.index[:, 1]]
            made, _ = state.embedded(blend(replace(for_mixer, mask=Dense(mask), sources=sources), first))
            rows = unit(made)
            kinds: dict[str, Callable[..., Tensor]] = {
                "infonce": lambda *keys: self._infonce(state, rows, *keys, for_mixer)[0],
                "pair": lambda *keys: self._pair(rows, *keys, for_mixer),
            }
            if state.clusters is None:
                main = kinds.pop(self.mixer_loss)(own, partners)
            else:
                del kinds["infonce"]
                main, head = state.clusters.losses(made, projected.chunk(2)[0], own, for_mixer)
                loss = loss + head.mean()
            loss = loss + self.mask_loss * area + self.mixer_weight * main.mean()
            if self.extra:
                (other,) = kinds.values()
                loss = loss + self.extra * other(*(unit(between * a + (1 - between) * b) for a, b in (keys[::-1], keys))).mean()
        return StepOutput(loss, losses, scores, targets, lam, plan, {"keys": everyone(own)})

    def after_optimizer_step(self, state: SAMixState, network: nn.Module, step: int, total_steps: int) -> None:
        super().after_optimizer_step(state, network, step, total_steps)
        if state.clusters is not None:
            state.clusters.follow()
            if (step + 1) % self.cluster_interval == 0:
                state.clusters.find(state.queue)

    def _infonce(self, state: SAMixState, rows: Tensor, own: Tensor, partners: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) losses, similarities and targets (B, M): each source against the queue. `own` and `partners` (B, d) are the keys of both."""
        with torch.autocast(rows.device.type, enabled=False):
            candidates = torch.cat([own, partners, state.queue.float()])
            scores = rows @ candidates.T / self.temperature
        crossed = torch.cat([plan.index[:, :1], plan.index[:, 1:] + len(own)], 1)
        numbers = torch.arange(2 * len(own), device=rows.device)
        targets = mix_targets(replace(plan, index=crossed), numbers, len(candidates))
        hidden = targets == 0
        hidden[:, 2 * len(own) :] = False
        return Separate()(hide(scores, hidden), targets), scores, targets

    def _pair(self, rows: Tensor, own: Tensor, partners: Tensor, plan: MixPlan) -> Tensor:
        """(B,) losses: the two sources against each other."""
        with torch.autocast(rows.device.type, enabled=False):
            scores = torch.stack([(rows * own).sum(1), (rows * partners[plan.index[:, 1]]).sum(1)], 1) / self.temperature
        return CrossEntropy()(scores, plan.weight)
