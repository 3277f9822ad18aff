"""Every method obeys every law. A new row of `METHODS` is tested without a change here."""

import pytest
import torch
from torch.testing import assert_close

import laws
from hf_mixup import METHODS
from hf_mixup.core.plan import blend, blend_examples
from hf_mixup.core.rng import keyed

# the exceptions stand on this table and nowhere else: methods whose papers do not label by the visible area
# (law 1 and the sum of weights do not apply), or that need more room than the smallest shapes have
NOT_BY_AREA: set[str] = {"augmix", "mixpro", "remix", "saliencygrafting", "snapmix", "splicemix", "tlalign", "tokenmix", "transmix"}
# of those, methods whose weights do not sum to 1
NOT_WHOLE = {"snapmix", "splicemix"}
# nothing about their pairs is drawn; augmix mixes every image with transforms of itself
UNDRAWN = {"augmix", "vanilla", "guidedmixup"}
SMALLEST = {"comixup": 36}
# numbers of channels that a method can look at; any, if not named: a gray value is defined for these only
CHANNELS = {"saliencymix": (1, 3)}
# sides of the grid of the evidence, which the image must be a multiple of; 4 in laws.py
CELLS = {"mergemix": 4, "smmix": 4, "tlalign": 4, "tokenmix": 4}


def fits(name, shape):
    cells = CELLS.get(name, 1)
    return (
        shape[2] * shape[3] >= SMALLEST.get(name, 0)
        and shape[1] in CHANNELS.get(name, (1, 3, 4))
        and not (shape[2] % cells or shape[3] % cells)
    )


NAMES = sorted(METHODS)
CASES = [(name, shape) for name in NAMES for shape in laws.SHAPES if fits(name, shape)]
every_shape = pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda value: str(value).replace(", ", "x"))
every_method = pytest.mark.parametrize("name", NAMES)


@every_shape
def test_mean_pixel_of_onehot_images_is_the_mixed_target(name, shape):
    if name in NOT_BY_AREA:
        pytest.skip("needs labels by area; this paper labels by evidence")
    method = METHODS[name]
    for key in range(5):
        laws.onehot_images(method.sample, method.label, shape, key, tolerance=1e-5 + laws.PIXEL / (shape[2] * shape[3]) * (name == "fmix"))


@every_shape
def test_masks_and_weights_are_convex(name, shape):
    for key in range(5):
        laws.convex(METHODS[name].sample, shape, key, whole=name not in NOT_WHOLE)


@every_shape
def test_own_image_comes_first(name, shape):
    for key in range(5):
        laws.own_first(METHODS[name].sample, shape, key)


@every_shape
def test_keeping_everything_changes_nothing(name, shape):
    laws.identity(blend, METHODS[name].label, shape)


@every_shape
def test_inputs_and_global_streams_are_untouched(name, shape):
    laws.pure(METHODS[name].sample, METHODS[name].label, shape)


@every_method
def test_plans_follow_the_key(name):
    laws.keyed_plans(METHODS[name].sample, (8, 3, 32, 32), mixes=name not in UNDRAWN)


@every_method
def test_pairings_vary(name):
    laws.varied(METHODS[name].sample, (8, 3, 32, 32), mixes=name not in UNDRAWN)


@every_shape
def test_half_precision(name, shape):
    laws.dtype(METHODS[name].sample, shape)


@every_method
def test_round_trip(name):
    laws.round_trip(METHODS[name])


@pytest.mark.parametrize("mode", ["sample", "pair", "batch"])
@pytest.mark.parametrize("alpha", [0.1, 0.2, 1, 2])
def test_mixup_shares_follow_the_beta(alpha, mode):
    laws.share_distribution(METHODS["mixup"].replaced(alpha=alpha, mode=mode).sample, (4, 3, 8, 8), mean=0.5)


# measured on 2 * 10**5 boxes of the authors' sampler
@pytest.mark.parametrize(("alpha", "size", "area"), [(0.2, 32, 0.276), (1, 32, 0.300), (2, 32, 0.306), (1, 224, 0.318), (1, 8, 0.233)])
def test_cutmix_areas_follow_the_clipped_box(alpha, size, area):
    laws.share_distribution(METHODS["cutmix"].replaced(alpha=alpha).sample, (2, 3, size, size), mean=1 - area, tolerance=0.001)


@every_method
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_smallest_batches(name, batch):
    """11. A batch of one mixes with itself, so nothing changes beyond rounding; odd batches are fine."""
    plan = laws.plan_of(METHODS[name].sample, (batch, 3, 32, 32))
    images = torch.randn(batch, 3, 32, 32)
    mixed = blend(plan, images)
    assert mixed.shape == images.shape
    if batch == 1 and plan.sources is None:
        assert_close(mixed, images)


@every_method
@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (4, 1, 96, 70), (7, 3, 224, 224)])
def test_collator_blend_equals_blend(name, shape):
    if not fits(name, shape):
        pytest.skip("needs another shape, which this method cannot mix")
    images = torch.randn(shape)
    for key in range(3):
        signals = laws.signals_for(shape, key)
        signals["images"] = images
        plan = laws.plan_of(METHODS[name].sample, shape, key, signals)
        # where there is a gradient, images are mixed in several passes
        expected = blend(plan, images.clone().requires_grad_()).detach()
        assert torch.equal(blend(plan, images), expected)
        for examples in (images, list(images)):
            assert torch.equal(blend_examples(plan, examples, torch.empty(shape)), expected)


@every_method
def test_feature_maps_blend_and_pass_gradients_to_both_images(name):
    shape = (4, 3, 16, 16)
    plan = laws.plan_of(METHODS[name].sample, shape)
    if plan.sources is not None:
        return
    for side in (16, 5):  # the images' own grid, and a coarser one
        features = torch.randn(4, 3, side, side, requires_grad=True)
        mixed = blend(plan, features)
        mask = plan.dense_mask((side, side))
        parts = [mask[:, k, None] * features[plan.index[:, k]] for k in range(plan.index.shape[1])]
        assert_close(mixed, sum(parts))
        grad = torch.autograd.grad(mixed.sum(), features)[0]
        expected = torch.zeros_like(grad)
        for k in range(plan.index.shape[1]):
            expected.index_add_(0, plan.index[:, k], mask[:, k, None].expand(features.shape))
        assert_close(grad, expected)


@pytest.mark.parametrize("name", ["vanilla", "fmix", "regmixup", "augmix"])
def test_a_batch_does_not_depend_on_the_default_dtype(name):
    images, labels = torch.randn(4, 3, 9, 8), torch.arange(4)
    expected = METHODS[name](images, labels, 4, keyed(1))
    before = torch.get_default_dtype()
    try:
        for kind in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(kind)
            mixed = METHODS[name](images, labels, 4, keyed(1))
            assert [part.dtype for part in mixed] == [torch.float32] * 2
            assert_close(mixed[0], expected[0], atol=1e-5, rtol=0)
            assert_close(mixed[1], expected[1])
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ["kmixup", "resizemix"])
def test_a_plain_call_passes_gradients_of_large_images(name):
    images = torch.randn(4, 3, 72, 72, requires_grad=True)
    mixed, _ = METHODS[name](images, torch.arange(4), 4, keyed(1))
    assert_close(mixed.detach(), METHODS[name](images.detach(), torch.arange(4), 4, keyed(1))[0])
    score = (mixed * torch.randn(mixed.shape)).sum()
    score.backward()
    assert_close((images.grad * images).sum(), score, atol=1e-2, rtol=1e-3)  # it is linear in the images
