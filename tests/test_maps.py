"""Label maps: every pixel gets the label of the image that is visible there."""

import pytest
import torch
from torch.testing import assert_close

import laws
from hf_mixup import METHODS, MixupCollator, MixupLoss, MixupModel, blend, get_method
from hf_mixup.core.plan import MixPlan, move_maps
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed
from hf_mixup.method import needs_of_model
from hf_mixup.methods import OF_MAPS
from hf_mixup.policies import ClassMix
from refusals import refuses
from small import vit

IGNORED = 255
WHOLE = ["vanilla", "cutmix", "fmix", "gridmix", "saliencymix", "resizemix", "ricap", "decouplemix"]
SOFT = ["mixup", "smoothmix", "hmix", "gmix", "regmixup", "kmixup", "localmixup"]
CLASSMIX = get_method("classmix")
every_whole = pytest.mark.parametrize("method", [*map(METHODS.get, WHOLE), CLASSMIX], ids=str)


def labelled(shape=(6, 3, 16, 12), seed=0):
    """Images whose red is the label of the pixel, and their maps, with pixels to be ignored."""
    maps = torch.randint(4, (shape[0], *shape[2:]), generator=keyed(seed))
    maps[:, :2] = IGNORED
    images = torch.randn(shape, generator=keyed(seed, 1))
    images[:, 0] = maps.float()
    return images, maps


@every_whole
@pytest.mark.parametrize("shape", [(6, 3, 16, 12), (3, 3, 7, 5), (4, 3, 96, 70)], ids=str)
def test_every_pixel_keeps_its_own_label(method, shape):
    """An image that is its own label map: after mixing it still is. Every method but those that resize between pixels is held to it."""
    images, maps = labelled(shape)
    for key in range(4):
        mixed, moved = method(images, maps, generator=keyed(key))
        assert moved.dtype == maps.dtype
        assert moved.shape == maps.shape
        assert torch.equal(mixed[:, 0], moved.float())


@every_whole
def test_the_share_of_a_map_is_the_share_of_the_mask(method):
    """Maps that are one class each: what is left of it is the mask's share of the pixels, and the label's weight."""
    images, _ = labelled()
    if method is CLASSMIX:
        _, maps = labelled()
        own = torch.arange(6)[:, None, None].expand_as(maps)
        plan = method.plan(images, maps, keyed(3))
    else:
        own = torch.arange(6)[:, None, None].expand(6, 16, 12)
        plan = method.plan(images, own, keyed(3))
    moved = move_maps(plan, own)
    mask = plan.dense_mask((16, 12))
    for row in range(6):
        for image in range(6):
            share = mask[row][plan.index[row] == image].sum(0).mean() if (plan.index[row] == image).any() else torch.tensor(0.0)
            assert_close((moved[row] == image).float().mean(), share, atol=1e-6, rtol=0)
    if method.name != "fmix":  # which labels with the share it drew
        assert_close((moved == own).float().mean((1, 2)), plan.weight[:, 0] + plan.weight[:, 1] * (plan.index[:, 1] == torch.arange(6)) if plan.index.shape[1] == 2 else (moved == own).float().mean((1, 2)), atol=1e-6, rtol=0)  # fmt: skip


def test_a_resized_map_is_the_resized_image_between_pixels_too():
    images, maps = labelled((5, 3, 32, 32), 2)
    method = get_method("resizemix", interpolation="bilinear")
    moved = method(images, maps, generator=keyed(1))[1]
    nearest = get_method("resizemix")(images, maps, generator=keyed(1))
    assert torch.equal(moved, nearest[1])
    assert set(moved.unique().tolist()) <= set(maps.unique().tolist()), "no label between labels"


@pytest.mark.parametrize("name", ["cutmix", "fmix", "gridmix", "resizemix"])
def test_maps_of_another_grid_and_of_volumes_move_alike(name):
    images, maps = labelled((4, 3, 16, 16))
    plan = METHODS[name].plan(images, maps, keyed(6))
    doubled = maps.repeat_interleave(2, 1).repeat_interleave(2, 2)
    if name != "resizemix":  # a move has pixels of its own on a finer grid
        assert torch.equal(move_maps(plan, doubled), move_maps(plan, maps).repeat_interleave(2, 1).repeat_interleave(2, 2))
    slices = torch.stack([maps, maps.flip(0)], 1)
    moved = move_maps(plan, slices)
    assert torch.equal(moved[:, 0], move_maps(plan, maps))
    assert torch.equal(moved[:, 1], move_maps(plan, maps.flip(0)))


@pytest.mark.parametrize("name", SOFT)
def test_soft_masks_are_refused(name):
    images, maps = labelled()
    sentence = f"one image in every pixel, got '{name}', which mixes two images in one pixel; use a method of whole pixels"
    with refuses(sentence):
        METHODS[name](images, maps)
    with refuses(sentence):
        MixupCollator(name)([{"pixel_values": image, "labels": one} for image, one in zip(images, maps, strict=True)])
    with refuses("one image in every pixel, got the method"):
        move_maps(METHODS["mixup"].plan(images, None, keyed(0)), maps)


def test_moves_that_are_not_said_are_refused_by_name():
    images, maps = labelled()
    with refuses("label maps need a method that tells where each pixel comes from, got 'augmix'"):
        METHODS["augmix"](images, maps)


def test_every_other_method_of_images_is_one_of_the_two():
    known = {*WHOLE, *SOFT, "augmix", "classmix"}
    images, maps = labelled()
    for name, method in METHODS.items():
        if method.needs_targets and not needs_of_model(method):
            with refuses(f"'{name}' looks at labels of whole images, got label maps"):
                method(images, maps)
        elif not needs_of_model(method):
            assert name in known, name


@every_whole
def test_collators_move_maps_and_keep_integers(method):
    images, maps = labelled((6, 3, 40, 40))
    batch = MixupCollator(method, num_labels=4)([{"pixel_values": i, "labels": m} for i, m in zip(images, maps, strict=True)])
    assert batch["labels"].dtype == torch.int64
    assert torch.equal(batch["pixel_values"][:, 0], batch["labels"].float())
    if method.name != "vanilla":
        assert not torch.equal(batch["labels"], maps)
    with refuses("label maps need the network's own loss, got them in MixupLoss; leave out compute_loss_func"):
        MixupLoss()(torch.randn(6, 4, 40, 40), batch["labels"])


@pytest.mark.parametrize("shape", laws.SHAPES, ids=str)
@pytest.mark.parametrize("name", OF_MAPS)
def test_methods_of_maps_obey_the_laws(name, shape):
    method = OF_MAPS[name]
    for key in range(3):
        laws.onehot_images(method.sample, method.label, shape, key)
        laws.convex(method.sample, shape, key)
        laws.own_first(method.sample, shape, key)
    laws.pure(method.sample, method.label, shape)
    laws.dtype(method.sample, shape)
    laws.round_trip(method)
    laws.keyed_plans(method.sample, (8, 3, 32, 32))
    laws.varied(method.sample, (8, 3, 32, 32))


# -- ClassMix ---------------------------------------------------------------------------------------------------------------


def kept_classes(maps, seed, **fields):
    images = torch.randn(len(maps), 3, *maps.shape[1:])
    plan = ClassMix(**fields).plan(images.shape, keyed(seed), Signals(images=images, maps=maps))
    return plan, plan.dense_mask(tuple(maps.shape[1:]))[:, 0].bool()


def test_classmix_keeps_half_of_the_classes_whole():
    """The formula of the authors' code: `int((n - n % 2) / 2)` of the n classes that are there, without the ignored one."""
    maps = torch.stack([torch.arange(64).view(8, 8) % n for n in (1, 2, 3, 4, 7)])
    maps[:, 0] = IGNORED
    chosen = []
    for seed in range(40):
        plan, own = kept_classes(maps, seed)
        for row, n in enumerate((1, 2, 3, 4, 7)):
            classes = set(maps[row][own[row]].tolist())
            assert len(classes) == n // 2
            assert IGNORED not in classes
            assert torch.equal(own[row], torch.isin(maps[row], torch.tensor(sorted(classes) or [-1]))), "along the borders"
            chosen += sorted(classes) if n == 7 else []
        assert_close(plan.lam, own.float().mean((1, 2)))
    counts = torch.bincount(torch.tensor(chosen), minlength=7)
    assert counts.min() > 0.5 * counts.float().mean()  # every class as often


def test_classmix_ignores_what_it_is_told_to():
    maps = torch.tensor([[[0, 1], [9, 9]], [[-100, 1], [2, 2]]])
    for seed in range(10):
        _, own = kept_classes(maps, seed, ignore_index=9)
        assert not own[0, 1].any()
        assert not own[1, 0, 0]


def test_classmix_needs_label_maps():
    with refuses(r"classmix mixes by label maps, \(B, H, W\), got labels of whole images"):
        CLASSMIX(torch.randn(4, 3, 8, 8), torch.arange(4), 4)
    with refuses(r"classmix mixes by label maps"):
        MixupModel(vit(), CLASSMIX)
    with refuses(r"classmix mixes by label maps"):
        MixupCollator(CLASSMIX, num_labels=4)([{"pixel_values": torch.randn(3, 8, 8), "labels": row} for row in range(4)])


def test_a_plan_of_one_image_leaves_maps_alone():
    images, maps = labelled()
    plan = MixPlan.identity(6)
    assert torch.equal(move_maps(plan, maps), maps)
    assert blend(plan, images) is images
