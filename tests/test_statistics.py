"""The random draws of every image-only policy, compared with known numbers: exact if there is a formula, else measured on at least 20,000
draws of the reference's sampler. The tolerance is 4 sigma of the sample, plus half a unit of the last digit."""

import pytest
import torch

from hf_mixup import METHODS
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import keyed, partners, uniform
from hf_mixup.methods import MethodChoice
from hf_mixup.policies.fmix import brightest, paper_field, published_field
from hf_mixup.policies.resizemix import cut_boxes, moved_boxes

MANY = 20000


def close(sample, mean, digit=0.0):
    """The mean of a sample (n,) is `mean`, known to `digit`."""
    sample = sample.double()
    bound = 4 * sample.std().item() / len(sample) ** 0.5 + digit / 2
    assert abs(sample.mean().item() - mean) <= bound, (sample.mean().item(), mean, bound)


def pasted(name, size, count=MANY, channels=3, **fields):
    """(count,) shares of the partner, of one batch of independent draws."""
    shape = torch.Size((count, channels, *size))
    signals = Signals(images=torch.zeros(1, 1, 1, 1).expand(shape))
    plan = METHODS[name].replaced(**fields).sample.plan(shape, keyed(5), signals)
    return 1 - plan.weight[:, 0].double()


@pytest.mark.parametrize("alpha", [1e-4, 0.01, 0.2, 1.0, 2.0, 50.0])
def test_mixup_shares_are_beta(alpha):
    """Its moments, down to an alpha where both Gammas of a Beta would underflow."""
    share = pasted("mixup", (8, 8), alpha=alpha)
    assert ((share >= 0) & (share <= 1)).all()
    variance = 1 / (4 * (2 * alpha + 1))
    close(share, 0.5)
    close((share - 0.5) ** 2, variance, digit=1e-6)
    close((share - 0.5) ** 4, 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3)), digit=1e-6)


@pytest.mark.parametrize(
    ("side", "alpha", "area", "empty", "quantiles"),
    [
        (8, 0.2, 0.205, 0.305, None),
        (8, 1.0, 0.233, 0.0625, (0.031, 0.234, 0.469)),
        (8, 2.0, 0.243, 0.011, None),
        (32, 0.2, 0.276, 0.174, None),
        (32, 1.0, 0.300, 0.0039, (0.062, 0.282, 0.559)),
        (32, 2.0, 0.306, 0.0, None),
        (64, 0.2, 0.288, 0.132, None),
        (64, 1.0, 0.310, 0.0010, (0.070, 0.297, 0.566)),
        (224, 0.2, 0.296, 0.080, None),
        (224, 1.0, 0.318, 0.0001, (0.077, 0.303, 0.576)),
        (224, 2.0, 0.325, 0.0, None),
    ],
)
def test_cutmix_boxes(side, alpha, area, empty, quantiles):
    share = pasted("cutmix", (side, side), alpha=alpha)
    close(share, area, digit=0.001)
    none = (share == 0).double().mean().item()
    assert abs(none - empty) <= 4 * (empty * (1 - empty) / MANY) ** 0.5 + 0.0005, none
    for level, value in zip((0.1, 0.5, 0.9), quantiles or (), strict=False):
        # where the distribution function is at `level`, its estimate is binomial; areas are whole pixels
        below = (share < value - 0.005).double().mean().item(), (share < value + 0.005 + 1 / side).double().mean().item()
        assert below[0] - 0.01 <= level <= below[1] + 0.01, (level, below)


def test_cutmix_centres_are_anywhere_and_margin_keeps_boxes_inside():
    shape = torch.Size((MANY, 3, 20, 12))
    edges = METHODS["cutmix"].replaced(margin=0.5).sample.plan(shape, keyed(1), Signals()).mask.edges
    # nothing is clipped, so both sides are those drawn: area is `1 - lam` but for whole pixels
    heights, widths = edges[:, 1] - edges[:, 0], edges[:, 3] - edges[:, 2]
    assert (heights % 2 == 0).all()
    assert (widths % 2 == 0).all()
    # centres are pixels below `length - side / 2`, as in timm
    for end, length in ((1, 20), (3, 12)):
        assert edges[:, end - 1].min() == 0
        assert edges[:, end].max() == length - 1
    free = METHODS["cutmix"].sample.plan(shape, keyed(1), Signals()).mask.edges
    assert ((free[:, 1] - free[:, 0]) % 2 == 1).any()
    # small boxes are nowhere clipped: their centres are uniform over the pixels
    small = free[(free[:, 1] - free[:, 0] == 2)]
    inner = (small[:, 0] + 1).double()
    close(inner, 10.0, digit=0.4)


def test_minmax_boxes_of_cutmix():
    edges = METHODS["cutmix"].replaced(minmax=(0.2, 0.8)).sample.plan(torch.Size((MANY, 3, 20, 10)), keyed(1), Signals()).mask.edges
    for start, (low, high), length in ((0, (4, 16), 20), (2, (2, 8), 10)):
        side = edges[:, start + 1] - edges[:, start]
        assert set(side.tolist()) == set(range(low, high))
        close(side, (low + high - 1) / 2)
        # uniform among all places inside
        close(edges[:, start], ((length - side) / 2.0).double().mean().item(), digit=0.05)


def test_fmix_keeps_lam_of_the_pixels_rounded_by_a_fair_coin():
    shape = torch.Size((4000, 3, 15, 17))
    plan = METHODS["fmix"].sample.plan(shape, keyed(2), Signals())
    kept, lam = plan.mask.value[:, 0].double().mean((1, 2)), plan.weight[:, 0].double()
    assert (kept - lam).abs().max() < 1 / 255 + 1e-6
    close((kept > lam).double(), 0.5)
    close(kept, 0.5)
    close((kept - 0.5).square(), 1 / 12)
    close(plan.mask.value[:, 0, 0, 0], 0.5)


def test_fmix_spectrum_of_the_reference():
    """Two of its frequency rows, as real and imaginary part: power `u**-6 + (u**2 + 1)**-3` down, waves 0 and 1 along."""
    field = published_field(torch.randn(MANY, 2, 17, 2, generator=keyed(3)), (32, 32), 3.0)
    power = torch.fft.fft2(field).abs().square()
    assert power[:, :, 2:31].max() < 1e-20 * power.max()
    unit = power[:, 1, 0].mean().item() / (1 + 1 / 8)
    for u in range(1, 6):
        close(power[:, u, 0] / unit, u**-6 + (u**2 + 1) ** -3, digit=8 * (u**-6 + (u**2 + 1) ** -3) * (2 / MANY) ** 0.5)
    # what is measured on masks of the reference, lam 0.5
    half = brightest(field, torch.full((MANY,), 0.5, dtype=torch.float64), torch.zeros(MANY, dtype=torch.bool), 0.0)
    down, along = (half[:, 1:] ^ half[:, :-1]).double().mean((1, 2)), (half[:, :, 1:] ^ half[:, :, :-1]).double().mean((1, 2))
    for sample, mean, spread in ((down, 0.043, 0.020), (along, 0.061, 0.006)):
        close(sample, mean, digit=0.003)
        assert abs(sample.std().item() - spread) < 0.001


def test_fmix_spectrum_of_the_paper_is_isotropic():
    field = paper_field(torch.randn(MANY // 4, 2, 32, 17, generator=keyed(3)), (32, 32), 3.0)
    power = torch.fft.fft2(field).abs().square()
    for u in range(1, 4):
        close(power[:, u, 0] - power[:, 0, u] * (power[:, 1, 0].mean() / power[:, 0, 1].mean()), 0.0)
    # decay: 2 waves have 2**-6 of the power of 1
    close(power[:, 2, 0] - power[:, 1, 0] / 64, 0.0)
    close(power[:, 2, 2] - power[:, 1, 1] / 64, 0.0)


def test_fmix_reformulated_keeps_the_own_label():
    sample = METHODS["fmix"].replaced(reformulate=True, alpha=0.5).sample
    plan = sample.plan(torch.Size((2000, 3, 16, 16)), keyed(2), Signals())
    assert torch.equal(plan.weight, torch.tensor([1.0, 0.0]).expand(2000, 2))
    # Beta(alpha + 1, alpha)
    close(plan.mask.value[:, 0].mean((1, 2)), 0.75, digit=1 / 256)


def test_smoothmix_windows():
    share = pasted("smoothmix", (32, 32), count=5000)
    close(share, 0.43, digit=0.01)
    assert abs(share.std().item() - 0.128) < 0.005
    assert share.min() > 0.09
    assert share.max() < 0.75
    # the published weight is that of the other image
    swapped = pasted("smoothmix", (32, 32), count=5000, as_published=True)
    torch.testing.assert_close(swapped, 1 - share, atol=1e-6, rtol=0)


def test_gridmix_holes():
    published = pasted("gridmix", (32, 32), count=5000, alpha=0.2, as_published=True)
    close(1 - published, 0.744, digit=0.001)
    assert abs(published.std().item() - 0.216) < 0.006
    # cuts that are clipped at the border keep the holes that the published code loses
    assert pasted("gridmix", (32, 32), count=5000, alpha=0.2).mean() > published.mean() + 0.005


@pytest.mark.parametrize("use_alpha", [False, True])
def test_resizemix_areas(use_alpha):
    """A Beta of alpha 1 that is drawn again outside of the scope is uniform in it."""
    for as_published, mean in ((False, 0.2296), (True, 0.159)):
        share = pasted("resizemix", (32, 32), count=5000, channels=1, as_published=as_published, use_alpha=use_alpha)
        close(share, mean, digit=0.001 if as_published else 0.0001)


def test_resizemix_areas_of_large_images():
    rng, size = keyed(4), (224, 224)
    tau = uniform(0.1, 0.8, MANY, rng)
    row, col = (torch.randint(224, (MANY,), generator=rng) for _ in size)
    for boxes, mean, digit in ((moved_boxes, 0.2414, 0.0001), (cut_boxes, 0.174, 0.001)):
        edges, _ = boxes(tau, row, col, size)
        close((edges[:, 1] - edges[:, 0]) * (edges[:, 3] - edges[:, 2]) / 224**2, mean, digit)


def test_saliencymix_boxes_lie_on_the_peak_of_the_own_partner():
    """One faint spot in every image: the box of each image is around its partner's, of the side that lam gives."""
    rng, count = keyed(6), 400
    images = torch.full((count, 3, 32, 32), 0.5)
    place = torch.randint(2, 30, (count, 2), generator=rng)
    images[torch.arange(count), :, place[:, 0], place[:, 1]] += 0.35
    fields = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    plan = METHODS["saliencymix"].replaced(**fields).sample.plan(images.shape, keyed(7), Signals(images=images))
    edges, partner = plan.mask.edges, plan.index[:, 1]
    unclipped = (edges[:, ::2] > 0).all(1) & (edges[:, 1::2] < 32).all(1) & (edges[:, 1] > edges[:, 0])
    assert unclipped.sum() > 30
    centre = (edges[:, ::2] + edges[:, 1::2]) // 2
    assert torch.equal(centre[unclipped], place[partner][unclipped])
    # one draw for all: the box of the first image's partner
    one = METHODS["saliencymix"].replaced(**fields, mode="batch").sample.plan(images.shape, keyed(8), Signals(images=images))
    assert (one.mask.edges == one.mask.edges[0]).all()
    spot = place[one.index[0, 1]]
    assert ((one.mask.edges[0, ::2] <= spot) & (spot < one.mask.edges[0, 1::2])).all()


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_uniform_pairings_have_one_fixed_point(mode):
    fixed = torch.stack([(partners(16, mode, keyed(key)).partner == torch.arange(16)).sum() for key in range(2000)])
    close(fixed, 1.0)
    close((fixed - 1.0).square(), 1.0)


def test_methods_are_chosen_with_their_probabilities():
    choice = MethodChoice.build(["mixup", "cutmix"], [0.3, 0.7], mix_rate=0.8)
    names = [choice.draw(keyed(9, key)).name for key in range(3000)]
    for name, chance in (("vanilla", 0.2), ("mixup", 0.24), ("cutmix", 0.56)):
        close(torch.tensor([drawn == name for drawn in names]), chance)
