"""VideoMix: boxes in time and space, only for videos."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import ASTConfig, ASTForAudioClassification, VideoMAEConfig, VideoMAEForVideoClassification

import laws
from hf_mixup import METHODS, MixPlan, MixupCollator, MixupModel, blend, get_method, mix_targets
from hf_mixup.core.plan import Boxes, blend_examples, mix_others
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.methods import OF_VIDEOS
from refusals import refuses
from small import vit

VIDEOMIX = get_method("videomix")
every_axes = pytest.mark.parametrize("axes", ["space", "time", "spacetime"])
# few and many frames, one channel, frames that are wide, and lines
SHAPES = [(4, 2, 3, 7, 5), (5, 8, 1, 9, 16), (3, 16, 3, 32, 32), (4, 5, 2, 1, 6)]


@every_axes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_share_of_voxels_is_the_share_of_the_label(axes, shape):
    """Videos that are their own labels: the mean voxel of the mixture is the mixed target, in every channel of its own."""
    method, boxes = VIDEOMIX.replaced(axes=axes), 0
    for key in range(10):
        targets = torch.rand(shape[0], 3, generator=keyed(key))
        clips = [row.view(-1, 1, 1, 1, 1).expand(shape).contiguous() for row in targets.T]
        plan = method.plan(clips[0], generator=keyed(key, 1))
        mixed = [blend(plan, clip) for clip in clips]
        assert_close(torch.stack([clip.flatten(1).mean(1) for clip in mixed], 1), mix_targets(plan, targets), atol=1e-5, rtol=0)
        for clip in mixed:
            assert torch.equal(clip, clip[:, :, :1].expand(shape)), "one mask for all channels of a frame"
        boxes += int(((plan.lam > 0) & (plan.lam < 1)).sum())
        mask = plan.dense_mask(tuple(shape[3:]))
        assert_close(mask.sum(1), torch.ones_like(mask[:, 0]))
        assert_close(mask[:, 0].mean((1, 2)), plan.lam)
    assert boxes > 10


@every_axes
def test_a_box_is_cut_along_its_axes(axes):
    shape = (32, 6, 3, 12, 10)
    own = torch.arange(shape[0]).float().view(-1, 1, 1, 1, 1).expand(shape)
    plan = VIDEOMIX.replaced(axes=axes).plan(own.contiguous(), generator=keyed(5))
    taken = (blend(plan, own.contiguous()) != own)[:, :, 0]
    box = taken.any(3).any(2)[:, :, None, None] & taken.any(3).any(1)[:, None, :, None] & taken.any(2).any(1)[:, None, None]
    assert torch.equal(taken, box), "a cuboid"
    frames, rows = taken.flatten(2).any(2), taken.any(3).any(1)
    seen = frames.any(1)
    changes = (frames[:, 1:] != frames[:, :-1]).sum(1)
    assert (changes <= 2).all(), "frames that follow each other"
    if axes == "space":
        assert frames[seen].all()
    else:
        assert not frames[seen].all(1).all()
    if axes == "time":
        assert rows[seen].all()


def test_golden_cuboids():
    """The formula of the paper (arXiv:2012.03457, section 3): `x = M * x_A + (1 - M) * x_B` with M one in a cuboid (t1, t2, w1, w2, h1, h2), and
    `lam = (t2 - t1) (w2 - w1) (h2 - h1) / (T W H)` for the label, voxel by voxel."""
    x = torch.randn(2, 4, 3, 6, 5, generator=keyed(3))
    for t1, t2, h1, h2, w1, w2 in ((1, 3, 0, 6, 2, 4), (0, 4, 1, 2, 0, 5), (3, 4, 0, 6, 0, 5), (2, 2, 0, 6, 0, 5)):
        edges = torch.tensor([[h1, h2, w1, w2]] * 2)
        boxes = Boxes(edges, (6, 5), torch.tensor([[3 * t1, 3 * t2]] * 2), 12)
        plan = MixPlan.pair(torch.tensor([1, 0]), boxes, 1 - boxes.area())
        expected = x.clone()
        for t in range(t1, t2):
            for h in range(h1, h2):
                for w in range(w1, w2):
                    expected[0, t, :, h, w], expected[1, t, :, h, w] = x[1, t, :, h, w], x[0, t, :, h, w]
        assert torch.equal(blend(plan, x), expected)
        assert torch.equal(blend_examples(plan, list(x), torch.empty_like(x)), expected)
        assert_close(1 - plan.lam[0], torch.tensor((t2 - t1) * (h2 - h1) * (w2 - w1) / (4 * 6 * 5)))


@every_axes
def test_the_volume_follows_lam(axes):
    """Before clipping a box has the volume 1 - lam: none is larger, and far from the border it is that up to whole pixels and frames."""
    from hf_mixup.core.rng import beta, partners

    shape, rng = torch.Size((2000, 40, 1, 40, 40)), keyed(9)
    signals = laws.signals_for((1, 1, 1, 1))
    signals.frames = 40
    plan = VIDEOMIX.replaced(axes=axes).sample.plan(torch.Size((2000, 40, 40, 40)), keyed(9), signals)
    partners(shape[0], "sample", rng)
    lam = beta(1.0, shape[0], rng)
    side = (1 - lam) ** (1 / {"space": 2, "time": 1, "spacetime": 3}[axes])
    steps = (side * 40 + 0.5) ** {"space": 0, "time": 1, "spacetime": 1}[axes] * (side * 40) ** {"space": 2, "time": 0, "spacetime": 2}[
        axes
    ]
    whole = 40.0 ** {"space": 2, "time": 1, "spacetime": 3}[axes]
    assert (1 - plan.lam.double() <= steps / whole + 1e-6).all()
    assert 0.15 < float((1 - plan.lam).mean()) < 0.5
    least = (side * 40 - 2).clamp(min=0) ** {"space": 2, "time": 1, "spacetime": 3}[axes] / whole
    assert ((1 - plan.lam.double()) >= least - 1e-6).double().mean() > 0.1, "some boxes are not clipped"


@every_axes
@pytest.mark.parametrize("size", [10, 60])
def test_every_way_of_mixing_gives_the_same(axes, size):
    """Floats and bytes, small and large, lists and batches, any dtype; and gradients pass."""
    x = torch.randint(256, (4, 4, 3, size, size), dtype=torch.uint8, generator=keyed(1))
    plan = VIDEOMIX.replaced(axes=axes).plan(x.float(), generator=keyed(2))
    mixed = blend(plan, x.float())
    assert torch.equal(mixed, torch.where(_inside(plan, x), x.float()[plan.partners[:, 0]], x.float()))
    assert torch.equal(blend_examples(plan, list(x), torch.empty_like(x)).float(), mixed)
    assert torch.equal(blend_examples(plan, list(x.float()), torch.empty(x.shape)), mixed)
    assert blend(plan, x.bfloat16()).dtype == torch.bfloat16
    learned = x.float().requires_grad_()
    blend(plan, learned).sum().backward()
    assert_close(learned.grad.sum(), torch.tensor(float(x.numel())))
    collator, mixed = MixupCollator(VIDEOMIX.replaced(axes=axes), num_labels=4), 0
    for seed in range(4):
        batches = []
        for clips in (x, x.float()):
            torch.manual_seed(seed)
            batches.append(collator([{"pixel_values": clip, "labels": row} for row, clip in enumerate(clips)]))
        assert torch.equal(batches[0]["pixel_values"].float(), batches[1]["pixel_values"])
        assert torch.equal(batches[0]["labels"], batches[1]["labels"])
        mixed += bool((batches[0]["pixel_values"] != x).any())
    assert mixed > 1


def _inside(plan, x):
    ones = torch.ones(x.shape)
    return blend(MixPlan(plan.index, plan.mask, plan.weight, (ones.flatten(1, 2) * 0, ones.flatten(1, 2))), ones) > 0.5


def test_laws_of_randomness_and_saving():
    laws.round_trip(VIDEOMIX)
    shape = (8, 12, 8, 8)
    signals = laws.signals_for(shape)
    signals.frames = 4
    before = torch.get_rng_state()
    drawn = [VIDEOMIX.sample.plan(torch.Size(shape), key.own_rng(), signals) for key in (MixKey(1, 0, 0), MixKey(1, 0, 0), MixKey(1, 0, 1))]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn[0].mask.through, drawn[1].mask.through)
    assert not torch.equal(drawn[0].mask.through, drawn[2].mask.through)
    one = VIDEOMIX.replaced(mode="batch").sample.plan(torch.Size(shape), keyed(4), signals)
    assert (one.mask.through == one.mask.through[0]).all()
    two = VIDEOMIX.replaced(mode="pair").sample.plan(torch.Size(shape), keyed(4), signals)
    assert torch.equal(two.mask.through[two.partners[:, 0]], two.mask.through)


def test_masks_of_a_mixture_are_united_and_label_maps_refused():
    x = torch.randn(4, 4, 3, 8, 8)
    plan = VIDEOMIX.plan(x, generator=keyed(0))
    mask = torch.eye(4, dtype=torch.long)
    shown = (plan.lam < 1)[:, None]
    assert torch.equal(mix_others(plan, {"attention_mask": mask})["attention_mask"], mask | (mask[plan.partners[:, 0]] * shown))
    from hf_mixup.core.plan import move_maps

    with refuses("label maps need one mask for all frames, got the method, which cuts videos in time; use cutmix"):
        move_maps(plan, torch.zeros(4, 8, 8, dtype=torch.long))


def videomae(**fields):
    return VideoMAEForVideoClassification(
        VideoMAEConfig(
            image_size=8, patch_size=4, num_frames=4, tubelet_size=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            num_labels=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def test_the_loss_of_a_step_is_that_of_the_cuboid():
    torch.manual_seed(0)
    network, x, labels = videomae(), torch.randn(4, 4, 3, 8, 8), torch.arange(4)
    model = MixupModel(network, "videomix").train()
    key = MixKey(3, 0, 1)
    loss = model(pixel_values=x, labels=labels, mix_key=key).loss
    plan = VIDEOMIX.plan(x, generator=key.own_rng())
    logits = network(pixel_values=blend(plan, x)).logits
    assert_close(loss, -(mix_targets(plan, labels, 4) * logits.log_softmax(1)).sum(1).mean())
    model.eval()
    assert_close(model(pixel_values=x, labels=labels).logits, network(pixel_values=x).logits)


def test_other_inputs_are_refused_in_one_sentence():
    sentence = r"VideoMix mixes videos \(B, T, C, H, W\) of two frames and more, got others; use another method, such as cutmix"
    for shape in ((4, 3, 8, 8), (4, 1, 12, 8, 8), (4, 60), (4, 10, 6)):
        with refuses(sentence):
            VIDEOMIX(torch.randn(shape), torch.arange(4), 4)
        name = "pixel_values" if len(shape) > 3 else "input_values"
        with refuses(sentence):
            MixupCollator("videomix", num_labels=4)([{name: one, "labels": row} for row, one in enumerate(torch.randn(shape))])
    with refuses("got videos of one frame"):
        VIDEOMIX(torch.randn(4, 1, 3, 8, 8), torch.arange(4), 4)
    sounds = ASTForAudioClassification(
        ASTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_mel_bins=16, max_length=24, patch_size=8
        )
    )
    for network in (vit(), sounds):
        with refuses("videomix mixes videos, got a network of other inputs; use another method, such as cutmix"):
            MixupModel(network, "videomix")
    with refuses("axes must be a known name, got 'frames'"):
        VIDEOMIX.replaced(axes="frames")
    assert "videomix" not in METHODS
    assert math.isclose(OF_VIDEOS["videomix"].sample.alpha, 1.0)
