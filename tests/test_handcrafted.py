"""Image-only policies, compared with the same formulas pixel by pixel, for sizes and branches that golden files do not cover."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from hf_mixup import blend, get_method
from hf_mixup.core.geometry import dense_pair
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import beta, keyed, uniform
from hf_mixup.policies import CutMix, FMix, GridMix, ResizeMix, SaliencyMix, SmoothMix
from hf_mixup.policies.fmix import brightest, paper_field, published_field
from hf_mixup.policies.gridmix import holes
from hf_mixup.policies.resizemix import cut_boxes, moved_boxes, paste_resized
from hf_mixup.policies.saliencymix import blur8, bytes_of, fine_grained, gray8, peaks
from hf_mixup.policies.smoothmix import windows
from refusals import refuses

SIZES = [(32, 32), (15, 17), (32, 16), (9, 30), (8, 8), (7, 5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decay_power", [3.0, 1.5])
def test_published_field_is_the_padded_transform(size, decay_power):
    """The authors' spectrum, laid out in full: (columns, 2) values, padded or cropped to the half plane of a real image."""
    height, width = size
    columns = width // 2 + 1 + width % 2
    noise = torch.randn(3, 2, columns, 2, dtype=torch.float64, generator=keyed(1))
    frequency = (torch.fft.fftfreq(height).double()[:, None] ** 2 + torch.fft.fftfreq(width).double()[:columns] ** 2).sqrt()
    scale = frequency.clamp(min=1 / max(size)) ** -decay_power
    half_plane = torch.complex(noise[:, 0] * scale[0, :, None], noise[:, 1] * scale[1, :, None])
    expected = torch.fft.irfft2(half_plane, s=size)
    field = published_field(noise, size, decay_power)
    # ours is not divided by the length of a row
    assert_close(field, expected * width, atol=1e-4 * expected.abs().max().item(), rtol=1e-5)


@pytest.mark.parametrize("max_soft", [0.0, 0.1, 0.5])
def test_brightest_counts_ranks(max_soft):
    """1 for the ranks before the edge, 0 behind it, evenly between; the same by selection and by sorting."""
    pixels, lam = 35, torch.tensor([0.0, 0.01, 0.05, 0.4, 0.5, 0.93, 0.99, 1.0], dtype=torch.float64)
    field = torch.randn(len(lam), 7, 5, dtype=torch.float64, generator=keyed(2))
    for up in (False, True):
        own = brightest(field, lam, torch.full((len(lam),), up), max_soft)
        assert own.is_floating_point() == (max_soft > 0)
        for row, share in zip(range(len(lam)), lam.tolist(), strict=True):
            count = (math.ceil if up else math.floor)(share * pixels)
            soft = math.floor(pixels * min(max_soft, share, 1 - share))
            expected = torch.zeros(pixels)
            expected[: count - soft] = 1
            expected[count - soft : count + soft] = torch.linspace(1, 0, 2 * soft)
            order = field[row].flatten().argsort(descending=True)
            assert_close(own[row].flatten()[order].float(), expected)


def test_soft_fmix_mixes_along_the_edge_only():
    field = paper_field(torch.randn(4, 2, 32, 17, generator=keyed(3)), (32, 32), 3.0)
    lam = torch.full((4,), 0.4, dtype=torch.float64)
    soft = brightest(field, lam, torch.zeros(4, dtype=torch.bool), 0.1)
    hard = brightest(field, lam, torch.zeros(4, dtype=torch.bool), 0.0)
    between = (soft > 0) & (soft < 1)
    assert between.sum() == 4 * (2 * 102 - 2)
    assert torch.equal(soft[~between].bool(), hard[~between])


@pytest.mark.parametrize("size", [(32, 32), (13, 20)])
def test_windows_are_gaussian(size):
    rows, cols = windows(torch.tensor([3]), torch.tensor([9]), torch.tensor([0.3], dtype=torch.float64), size)
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    expected = torch.exp(-(((y - 2.5) / size[0] / 0.3) ** 2 + ((x - 8.5) / size[1] / 0.3) ** 2) / 2)
    assert_close(rows[0][:, None] * cols[0], expected)


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (20, 20), (24, 40)])
def test_grid_of_holes_is_cut_hole_by_hole(size, as_published):
    """As the published loop does it, by slices; what they do with negative numbers is what `as_published` is about."""
    count, (height, width) = 150, size
    rng = keyed(4, height)
    lam, area, aspect = beta(1.0, count, rng), uniform(0.5, 1, count, rng), uniform(0.5, 2, count, rng)
    n_holes = torch.randint(2, 7, (count,), generator=rng)
    down, along = uniform(0, 1, count, rng), uniform(0, 1, count, rng)
    rows, cols = holes(lam, n_holes, 1.2, area, aspect, (down, along), size, as_published)
    crossing = 0
    for i in range(count):
        cut_w = int((int(height * width * float(area[i])) / float(aspect[i])) ** 0.5)
        cut_h = int(cut_w * float(aspect[i]))
        x0, y0 = int((width - cut_w) * float(along[i])), int((height - cut_h) * float(down[i]))
        # the published code stops where so many cells do not fit
        cell_w = -(-cut_w // min(int(n_holes[i]), cut_w // 2))
        cell_h = int(cell_w * 1.2)
        side = (1 - float(lam[i])) ** 0.5
        hole_w, hole_h = (min(max(int(cell * side), 1), cell - 1) for cell in (cell_w, cell_h))
        mask = np.zeros(size, dtype=bool)
        for top in range(y0, y0 + cut_h, cell_h):
            for left in range(x0, x0 + cut_w, cell_w):
                bottom, right = min(top + hole_h, y0 + cut_h), min(left + hole_w, x0 + cut_w)
                crossing += top < 0 or left < 0
                if not as_published:
                    mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
                else:
                    mask[top:bottom, left:right] = True
        assert np.array_equal((rows[i][:, None] & cols[i]).numpy(), mask), i
    assert crossing > 50


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 1, 7, 5), (2, 3, 4, 4)])
def test_gridmix_of_tiny_images_has_holes(shape):
    """The published code refuses most draws at 8 pixels, as more cells are asked for than fit."""
    weights = torch.cat([get_method("gridmix").sample.plan(torch.Size(shape), keyed(5, key), Signals()).weight[:, 1] for key in range(50)])
    assert (weights > 0).double().mean() > 0.9
    assert weights.max() < 1


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("boxes", [moved_boxes, cut_boxes])
@pytest.mark.parametrize("size", [(32, 32), (13, 21)])
def test_resized_partner_is_pasted(size, boxes, interpolation):
    rng, batch = keyed(6, size[0]), 12
    images = torch.randn(batch, 3, *size, generator=rng)
    partner = torch.randperm(batch, generator=rng)
    tau = uniform(0.1, 0.8, batch, rng)
    row, col = (torch.randint(length, (batch,), generator=rng) for length in size)
    edges, step = boxes(tau, row, col, size)
    mixed = blend(paste_resized(images, partner, edges, step, interpolation), images)
    for i, (top, bottom, left, right) in enumerate(edges.tolist()):
        expected = images[i].clone()
        if bottom > top and right > left:
            smooth = {} if interpolation == "nearest" else {"align_corners": False}
            how = {"scale_factor": float(tau[i])} if boxes is moved_boxes else {"size": (bottom - top, right - left)}
            if boxes is cut_boxes or min(int(length * float(tau[i])) for length in size) > 0:
                expected[:, top:bottom, left:right] = F.interpolate(images[partner[i]][None], mode=interpolation, **how, **smooth)[0]
        if interpolation == "nearest":
            assert torch.equal(mixed[i], expected), i
        else:
            assert_close(mixed[i], expected, atol=1e-5, rtol=1e-5)


def test_official_boxes_are_moved_inside():
    tau = torch.tensor([0.3, 0.3, 0.3, 0.05], dtype=torch.float64)
    edges, _ = moved_boxes(tau, torch.tensor([5, 0, 9, 9]), torch.tensor([5, 0, 9, 0]), (10, 10))
    # a side of 3 pixels has one before its centre; never less than a pixel
    assert edges.tolist() == [[4, 7, 4, 7], [0, 3, 0, 3], [7, 10, 7, 10], [9, 10, 0, 1]]


def test_resizemix_draws_again_outside_of_its_scope():
    low, high, alpha, count = 0.2, 0.6, 0.3, 20000
    policy = ResizeMix(alpha=alpha, use_alpha=True, scope=(low, high))
    images = torch.zeros(count, 1, 20, 20)
    areas = policy.plan(images.shape, keyed(8), Signals(images=images)).weight[:, 1].double()
    generator = np.random.default_rng(0)
    tau = generator.beta(alpha, alpha, 200000)
    tau = np.where((tau >= low) & (tau <= high), tau, generator.uniform(low, high, len(tau)))
    expected = np.floor(tau * 20) ** 2 / 400
    assert abs(areas.mean().item() - expected.mean()) < 4 * (expected.var() / count + expected.var() / len(tau)) ** 0.5
    assert areas.min() >= low**2 - 1e-6


def written_out_saliency(gray):
    """One image of whole numbers, with loops."""
    height, width = gray.shape
    brighter, darker = np.zeros(gray.shape, int), np.zeros(gray.shape, int)
    for r in range(height):
        for c in range(width):
            for n in (12, 24, 48, 28, 56, 112):
                window = gray[max(r - n + 1, 0) : min(r + n + 1, height), max(c - n + 1, 0) : min(c + n + 1, width)]
                others = (int(window.sum()) - int(gray[r, c])) / (window.size - 1)
                brighter[r, c] += math.floor(max(gray[r, c] - others, 0))
                darker[r, c] += math.floor(max(others - gray[r, c], 0))
    on, off = (255 * part // max(part.max(), 1) for part in (brighter, darker))
    both = 255 * (on + off) // max(on.max(), off.max(), 1)
    return both % 256, both.max() > 255


@pytest.mark.parametrize("size", [(7, 5), (14, 30), (26, 26)])
def test_fine_grained_saliency_written_out(size):
    for key in range(6):
        gray = (torch.rand(2, *size, generator=keyed(7, key)) * (256 if key % 2 else 6)).floor()
        saliency = fine_grained(gray)
        for i in range(2):
            assert np.array_equal(saliency[i].numpy(), written_out_saliency(gray[i].long().numpy())[0])
    flat = fine_grained(torch.full((1, *size), 77.0))
    assert (flat == 0).all()
    assert [int(place) for place in peaks(flat)] == [0, 0]
    # the first of equal ones
    assert [int(place) for place in peaks(torch.ones(1, *size))] == [0, 0]


def test_fine_grained_saliency_wraps_like_the_8_bits_it_is_stored_in():
    """Squares in squares: somewhere the brighter and the darker part together are more than the highest of either."""
    y, x = torch.meshgrid(torch.arange(87), torch.arange(87), indexing="ij")
    distance = torch.maximum((y - 43).abs(), (x - 43).abs())
    gray = torch.where(distance < 4, 173, torch.where(distance < 18, 7, 3))
    expected, wraps = written_out_saliency(gray.numpy())
    assert wraps
    assert np.array_equal(fine_grained(gray.float()[None])[0].numpy(), expected)


def test_pixels_are_recovered_from_normalised_images():
    pixels = torch.randint(256, (4, 3, 16, 16), generator=keyed(9)).float()
    pixels[:, :, 0, 0], pixels[:, :, 0, 1] = 0, 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.equal(bytes_of(images, mean, std), pixels)
    # stretched from smallest to largest, whatever one scale and shift did to all channels
    assert torch.equal(bytes_of(pixels / 255 * 2 - 1, None, None), pixels)
    gray = gray8(pixels)
    assert_close(gray, (pixels * torch.tensor([0.114, 0.587, 0.299])[:, None, None]).sum(1), atol=0.5001, rtol=0)
    assert torch.equal(gray8(pixels[:, :1]), pixels[:, 0])
    # [1 2 1] both ways is a sum of 16
    spot = torch.zeros(1, 9, 9)
    spot[0, 4, 4] = 160
    assert blur8(spot)[0, 4, 4] == 23  # 160 -> 40, and then (4 * 40 + 2 * 4 * 20 + 4 * 10) / 16 = 22.5, rounded up


def test_dense_pair_repeats_a_mask_for_the_images_that_share_it():
    own = torch.rand(2, 3, 4)
    row = torch.tensor([1, 0, 1])
    value = dense_pair(own, row).value
    assert torch.equal(value[:, 0], own[row])
    assert torch.equal(value[:, 1], 1 - own[row])


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: CutMix(margin=0.7), "margin"),
        (lambda: CutMix(minmax=(0.8, 0.2)), "minmax"),
        (lambda: CutMix(minmax=0.3), "minmax"),
        (lambda: FMix(as_published="paper"), "as_published"),
        (lambda: FMix(max_soft=0.6), "max_soft"),
        (lambda: FMix(decay_power=0), "decay_power"),
        (lambda: SmoothMix(sigma=(0, 0.5)), "sigma"),
        (lambda: SmoothMix(as_published="inverted"), "as_published"),
        (lambda: GridMix(n_holes=(0, 3)), "n_holes"),
        (lambda: GridMix(n_holes=(2, 3.5)), "most_holes"),
        (lambda: GridMix(cut_area_ratio=(0.5, 1.5)), "cut_area_ratio"),
        (lambda: GridMix(as_published="wrap"), "as_published"),
        (lambda: ResizeMix(scope=(0.0, 0.8)), "scope"),
        (lambda: ResizeMix(as_published="offical"), "as_published"),
        (lambda: ResizeMix(interpolation="bicubic"), "bilinear"),
        (lambda: ResizeMix(alpha=0.2), "use_alpha"),  # it would have no effect
        (lambda: SaliencyMix(mean=(0.5,)), "std"),
        (lambda: SaliencyMix(mean=(0.5,), std=(0.0,)), "std"),
    ],
)
def test_refusals_name_the_field(build, told):
    with pytest.raises(ValueError, match=told):
        build()


@pytest.mark.parametrize(("channels", "fields"), [(4, {}), (2, {"as_published": True}), (4, {"mean": (0.5,) * 3, "std": (0.5,) * 3})])
def test_row_11_saliencymix_refuses_channels_without_a_gray(channels, fields):
    images = torch.randn(4, channels, 8, 8)
    with refuses("channels"):
        get_method("saliencymix", **fields)(images, torch.arange(4), num_labels=4)
