"""Other libraries' mixers and ours: the same lam, boxes and partners give the same images and targets."""

import numpy as np
import pytest
import timm
import timm.data.mixup as timm_mixup
import torch
from packaging.version import Version
from torch.testing import assert_close
from torchvision.transforms import v2

from hf_mixup import MixPlan, blend, mix_targets
from hf_mixup.core.geometry import box_plan, centred_boxes, minmax_boxes
from hf_mixup.core.losses import BCE, CrossEntropy, smooth
from hf_mixup.core.plan import Boxes, Dense, Share, onehot
from hf_mixup.core.rng import keyed

CLASSES = 7


def batch(key, shape=(6, 3, 20, 13)):
    rng = keyed(3, key)
    return torch.randn(shape, generator=rng), torch.randint(CLASSES, shape[:1], generator=rng)


def share_plan(partner, lam):
    return MixPlan.pair(partner, Share(torch.stack([lam, 1 - lam], 1).float()), lam)


@pytest.mark.parametrize("key", range(5))
def test_torchvision_mixup(key, monkeypatch):
    images, labels = batch(key)
    transform = v2.MixUp(alpha=0.8, num_classes=CLASSES)
    drawn = recorded(monkeypatch, transform, "make_params")
    torch.manual_seed(key)
    expected = transform(images, labels)
    lam = torch.full((len(images),), drawn[0]["lam"], dtype=torch.float64)
    plan = share_plan(torch.arange(len(images)).roll(1), lam)
    assert_close(blend(plan, images), expected[0], atol=1e-6, rtol=1e-6)
    assert_close(mix_targets(plan, onehot(labels, CLASSES)), expected[1])


@pytest.mark.parametrize("key", range(10))
def test_torchvision_cutmix(key, monkeypatch):
    images, labels = batch(key)
    transform = v2.CutMix(alpha=1.0, num_classes=CLASSES)
    torch.manual_seed(key)
    # its draws in its order, into our box
    lam = transform._dist.sample(()).double()
    col, row = (torch.randint(length, (1,)) for length in (13, 20))
    edges = centred_boxes((1 - lam).sqrt(), row, col, (20, 13))
    drawn = recorded(monkeypatch, transform, "make_params")
    torch.manual_seed(key)
    expected = transform(images, labels)
    left, top, right, bottom = drawn[0]["box"]
    assert edges.tolist() == [[top, bottom, left, right]]
    plan = box_plan(torch.arange(len(images)).roll(1), edges.expand(len(images), -1), (20, 13))
    assert torch.equal(blend(plan, images), expected[0])
    assert_close(mix_targets(plan, onehot(labels, CLASSES)), expected[1])


@pytest.mark.parametrize("key", range(4))
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "switch",
    [
        {"mixup_alpha": 0.8, "cutmix_alpha": 0.0},
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.5},
        {"mixup_alpha": 0.8, "cutmix_minmax": (0.2, 0.8)},
    ],
    ids=["mixup", "cutmix", "switch", "prob", "minmax"],
)
def test_timm(switch, mode, key, monkeypatch):
    images, labels = batch(key)
    mixup = timm_mixup.Mixup(mode=mode, label_smoothing=0.1, num_classes=CLASSES, **switch)
    shares = recorded(monkeypatch, mixup, "_params_per_batch" if mode == "batch" else "_params_per_elem")
    boxes = recorded(monkeypatch, timm_mixup, "cutmix_bbox_and_lam")
    np.random.seed(key)
    expected = mixup(images.clone(), labels)

    lam, use_cutmix = (torch.as_tensor(drawn).reshape(-1) for drawn in shares[0])
    lam = lam.double()
    boxed = use_cutmix & (lam != 1)
    edges = torch.zeros(len(lam), 4, dtype=torch.int64)
    edges[boxed] = torch.tensor([[int(edge) for edge in box] for box, _ in boxes], dtype=torch.int64).reshape(-1, 4)
    box = Boxes(edges, (20, 13))
    lam = torch.where(boxed, 1 - box.area(), lam)
    own = torch.where(boxed[:, None, None], (~box.inside((20, 13))).float(), lam.float()[:, None, None])
    draw = {"batch": torch.zeros(6, dtype=torch.int64), "elem": torch.arange(6), "pair": torch.tensor([0, 1, 2, 2, 1, 0])}[mode]
    plan = MixPlan.pair(torch.arange(6).flip(0), Dense(torch.stack([own, 1 - own], 1)[draw]), lam[draw])
    assert_close(blend(plan, images), expected[0], atol=1e-6, rtol=1e-6)
    targets = mix_targets(plan, onehot(labels, CLASSES))
    assert_close(smooth(targets, 0.1), expected[1])
    # a method of one kind needs no dense mask, and says the same
    if boxed.all():
        assert torch.equal(blend(box_plan(plan.index[:, 1], edges[draw], (20, 13)), images), expected[0])
    if not boxed.any():
        assert_close(blend(share_plan(plan.index[:, 1], lam[draw]), images), expected[0], atol=1e-6, rtol=1e-6)


def test_timm_keeps_the_odd_pixel_of_a_box_that_the_cutmix_code_loses():
    """timm's sampler and ours, the CutMix code's, give one box wherever the side is even."""
    for key in range(200):
        lam = np.random.default_rng(key).beta(1, 1)
        np.random.seed(key)
        theirs = [int(edge) for edge in timm_mixup.rand_bbox((3, 20, 13), lam)]
        np.random.seed(key)
        row, col = (torch.tensor([np.random.randint(0, length)]) for length in (20, 13))
        ours = centred_boxes(torch.tensor([(1 - lam) ** 0.5]), row, col, (20, 13))[0].tolist()
        for k, length in ((0, 20), (2, 13)):
            odd = int(length * (1 - lam) ** 0.5) % 2
            assert ours[k] == theirs[k]
            assert theirs[k + 1] - ours[k + 1] in ((0, 1) if odd else (0,))


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.29"), reason="timm below 1.0.29 puts no box at the lower and the right edge")
def test_minmax_boxes_have_the_distribution_of_timm():
    count, minmax = 4000, (0.2, 0.8)
    np.random.seed(0)
    theirs = np.stack([timm_mixup.rand_bbox_minmax((3, 20, 13), minmax) for _ in range(count)])
    ours = minmax_boxes(minmax, count, (20, 13), keyed(0)).numpy()
    for k in range(4):
        assert set(ours[:, k]) == set(theirs[:, k])
        spread = (ours[:, k].var() / count + theirs[:, k].var() / count) ** 0.5
        assert abs(ours[:, k].mean() - theirs[:, k].mean()) < 4 * spread


def test_losses_equal_those_of_timm():
    from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

    logits, labels = torch.randn(6, CLASSES), torch.randint(CLASSES, (6,))
    targets = timm_mixup.mixup_target(labels, CLASSES, lam=0.3, smoothing=0.1)
    assert_close(CrossEntropy()(logits, targets).mean(), SoftTargetCrossEntropy()(logits, targets))
    for threshold in (None, 0.2):
        theirs = BinaryCrossEntropy(smoothing=0.0, target_threshold=threshold)(logits, targets)
        assert_close(BCE(target_threshold=threshold)(logits, targets).mean(), theirs)
    assert_close(BCE("sum")(logits, targets).mean(), BinaryCrossEntropy(smoothing=0.0, sum_classes=True)(logits, targets))


def recorded(monkeypatch, owner, name):
    """What the peer's own function returned, call by call."""
    function, results = getattr(owner, name), []

    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        value = results[-1]
        # timm writes into its lam afterwards
        results[-1] = tuple(part.copy() if isinstance(part, np.ndarray) else part for part in value) if isinstance(value, tuple) else value
        return value

    monkeypatch.setattr(owner, name, call)
    return results
