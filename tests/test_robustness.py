"""Attacks, corruptions and occlusion: computed by hand, and compared with other libraries."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup.core.rng import Draws
from hf_mixup.evaluation.corruptions import (
    ALEXNET_ERRORS,
    COMMON_CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    SEVERITIES,
    blurred,
    corrupt,
    mean_corruption_error,
    motion,
)
from hf_mixup.evaluation.robustness import PixelModel, fgsm, occlude, pgd
from small import resnet

ALL = (*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)
EPS = 8 / 255


def photos(count=4, size=32, seed=0):
    """Smooth colour images with all shades, in [0, 1]."""
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    smooth = blurred(noise, 2.0)
    return ((smooth - smooth.amin((2, 3), keepdim=True)) / (smooth.amax((2, 3), keepdim=True) - smooth.amin((2, 3), keepdim=True))).clamp(
        0, 1
    )


@pytest.fixture
def model():
    network = resnet()
    with torch.no_grad():  # the fresh network hardly reacts
        for parameter in network.parameters():
            parameter.mul_(2)
    return PixelModel(network, MEAN, STD)


class Linear(nn.Module):
    """Two classes of two pixels: logits (3a - b, 0) on whatever the normalisation makes of them."""

    def forward(self, pixels):
        first, second = pixels.flatten(1).unbind(1)
        return torch.stack([3 * first - second, torch.zeros_like(first)], 1)


def test_fgsm_by_hand():
    """Of class 0, the loss falls in the first pixel and grows in the second; pixels near black and white are clamped."""
    images = torch.tensor([[0.5, 0.5], [0.01, 0.99]]).view(2, 1, 1, 2)
    attacked = fgsm(Linear(), images, torch.tensor([0, 0]), eps=0.1)
    assert_close(attacked.flatten(1), torch.tensor([[0.4, 0.6], [0.0, 1.0]]))
    assert_close(fgsm(Linear(), images, torch.tensor([1, 1]), eps=0.1).flatten(1), torch.tensor([[0.6, 0.4], [0.11, 0.89]]))


def test_pgd_by_hand():
    """Steps of 0.03 stop at the edge of the ball of 0.1 around the images given, and at black."""
    images = torch.tensor([[0.5, 0.5], [0.05, 0.95]]).view(2, 1, 1, 2)
    labels = torch.tensor([0, 0])
    assert_close(pgd(Linear(), images, labels, eps=0.1, step_size=0.03, steps=2).flatten(1), torch.tensor([[0.44, 0.56], [0.0, 1.0]]))
    assert_close(pgd(Linear(), images, labels, eps=0.1, step_size=0.03, steps=50).flatten(1), torch.tensor([[0.4, 0.6], [0.0, 1.0]]))


def test_attacks_are_those_of_foolbox(model):
    import foolbox

    images, labels = photos(8), torch.arange(8) % 4
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    for attack, ours in (
        (foolbox.attacks.LinfFastGradientAttack(random_start=False), fgsm(model, images, labels, EPS)),
        (
            foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=2 / 255, steps=10, random_start=False),
            pgd(model, images, labels, EPS, 2 / 255, 10),
        ),
    ):
        _, expected, _ = attack(theirs, images, labels, epsilons=EPS)
        assert_close(ours, expected, atol=1e-6, rtol=0)
        assert not torch.equal(ours, images)


def test_attacks_stay_in_the_ball_and_raise_the_loss(model):
    """Whatever the normalisation: eps is in pixels. More steps are at least as strong as one."""
    images, labels = photos(8), torch.arange(8) % 4
    loss = lambda pixels: nn.functional.cross_entropy(model(pixels), labels).item()  # noqa: E731
    draws = Draws([(0, row) for row in range(8)])
    one, many = fgsm(model, images, labels, EPS), pgd(model, images, labels, EPS, draws=draws)
    for attacked in (one, many):
        assert (attacked - images).abs().max() <= EPS + 1e-6
        assert 0 <= attacked.min() <= attacked.max() <= 1
    assert loss(images) < loss(one) <= loss(many) + 1e-4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_random_start_follows_the_row(model):
    images, labels = photos(4), torch.arange(4)
    whole = pgd(model, images, labels, steps=1, draws=Draws([(0, row) for row in range(4)]))
    part = pgd(model, images[2:], labels[2:], steps=1, draws=Draws([(0, row) for row in (2, 3)]))
    # where a gradient is next to nothing its sign may differ between batches of two sizes
    assert ((whole[2:] - part).abs() > 1e-6).float().mean() < 0.001
    assert (whole - pgd(model, images, labels, steps=1, draws=Draws([(1, row) for row in range(4)]))).abs().max() > 0.01


def test_classes_in_another_order():
    network = resnet().eval()
    images = photos()
    assert_close(PixelModel(network, MEAN, STD, [3, 1, 0, 2])(images), PixelModel(network, MEAN, STD)(images)[:, [3, 1, 0, 2]])


# -- corruptions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("name", ALL)
def test_every_corruption(name, size):
    """Stays in range, depends on the row and not on the batch, changes nothing of the caller's, and grows with the severity."""
    images = photos(4, size)
    before = images.clone()
    damage = []
    for severity in SEVERITIES:
        result = corrupt(images, name, severity, [10, 11, 12, 13])
        assert result.shape == images.shape
        assert 0 <= result.min() <= result.max() <= 1
        assert_close(corrupt(images[2:], name, severity, [12, 13]), result[2:])
        damage.append((result - images).abs().mean().item())
    assert torch.equal(images, before)
    assert min(damage) > 1e-4
    # the published constants are not monotone in every measure: saturation falls, then rises, and so on
    if name not in ("saturate", "elastic_transform", "spatter", "glass_blur", "frost"):
        assert damage[0] < damage[2] < damage[4]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (20, 33), (70, 50)])
def test_other_shapes(size, channels):
    images = torch.rand(2, channels, *size)
    for name in ALL:
        assert corrupt(images, name, 5, [0, 1]).shape == images.shape, name


def test_blur_is_that_of_scipy():
    from scipy.ndimage import gaussian_filter

    images = photos(1, 24)[:, :, :, :17]
    for sigma in (0.05, 0.7, 3.0, 40.0):
        expected = gaussian_filter(images.numpy().astype(np.float64), sigma, axes=(2, 3), mode="reflect")
        assert_close(blurred(images, sigma), torch.tensor(expected).float(), atol=1e-5, rtol=0)


def test_colours_are_those_of_hue_saturation_value():
    import colorsys

    images = photos(1, 8)
    images[0, :, 0, 0] = 0  # black, and a grey
    images[0, :, 0, 1] = 0.4
    for name, change in (
        ("brightness", lambda h, s, v: (h, s, min(v + 0.15, 1))),
        ("saturate", lambda h, s, v: (h, min(s * 2 + 0.1, 1), v)),
    ):
        result = corrupt(images, name, 3 if name == "brightness" else 4, [0])
        for row, col in ((0, 0), (0, 1), (3, 4), (7, 2)):
            expected = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*images[0, :, row, col].tolist())))
            assert_close(result[0, :, row, col], torch.tensor(expected), atol=1e-5, rtol=0)


def test_jpeg_and_pixelate_are_those_of_pillow():
    import io

    from PIL import Image

    images = (photos(1, 80) * 255).round() / 255
    picture = Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=15)
    expected = torch.tensor(np.array(Image.open(stream))).permute(2, 0, 1) / 255
    assert_close(corrupt(images, "jpeg_compression", 3, [0])[0], expected)
    for side, keep, severity in ((80, 0.25, 5), (80, 0.6, 1), (32, 0.95, 1), (32, 0.65, 5)):
        picture = Image.fromarray((photos(1, side)[0] * 255).round().byte().permute(1, 2, 0).numpy())
        small = picture.resize((int(side * keep),) * 2, Image.Resampling.BOX).resize((side, side), Image.Resampling.BOX)
        given = torch.tensor(np.array(picture)).permute(2, 0, 1)[None] / 255
        assert_close(
            corrupt(given, "pixelate", severity, [0])[0], torch.tensor(np.array(small)).permute(2, 0, 1) / 255, atol=1.1 / 255, rtol=0
        )


def test_jpeg_of_other_channels_is_that_of_each_as_grey():
    images = torch.rand(2, 4, 24, 20)
    found = corrupt(images, "jpeg_compression", 3, [0, 1])
    assert torch.equal(found[:, 2:3], corrupt(images[:, 2:3], "jpeg_compression", 3, [0, 1]))
    assert not torch.equal(found[:, 2], found[:, 3])


def test_noise_has_the_published_moments():
    grey = torch.full((16, 3, 32, 32), 0.5)
    rows = range(16)
    assert corrupt(grey, "gaussian_noise", 5, rows).std().item() == pytest.approx(0.10, rel=0.02)
    assert corrupt(grey, "speckle_noise", 5, rows).std().item() == pytest.approx(0.5 * 0.2, rel=0.02)
    assert corrupt(grey, "shot_noise", 5, rows).std().item() == pytest.approx(math.sqrt(0.5 / 50), rel=0.02)
    hit = corrupt(grey.repeat(16, 1, 1, 1), "impulse_noise", 5, range(256))
    assert (hit != 0.5).float().mean().item() == pytest.approx(0.07, rel=0.05)
    assert (hit == 1).sum() / (hit == 0).sum() == pytest.approx(1, rel=0.1)


def test_motion_moves_one_way():
    """A point is drawn out along the line, the pixel itself heaviest, and keeps its sum."""
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    result = motion(point, 6, 2.0, torch.tensor([0.0]))[0, 0]
    assert result.sum() == pytest.approx(1, abs=1e-3)
    assert result[10].nonzero().flatten().tolist()[-1] == 10
    line = result[10, :11].flip(0)
    assert_close(line[1] / line[0], torch.tensor(math.exp(-0.125)))
    assert result[[9, 11]].sum() == 0


def test_mean_corruption_error_by_hand():
    """Only the 15 count, and each once. AlexNet itself has an error of 1 on AlexNet's scale."""
    errors = {name: [0.1, 0.2, 0.3, 0.4, 0.5] for name in COMMON_CORRUPTIONS} | {"saturate": [1.0] * 5}
    errors["fog"] = [0.6] * 5
    assert mean_corruption_error(errors) == pytest.approx((14 * 0.3 + 0.6) / 15)
    alexnet = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(alexnet, alexnet=True) == pytest.approx(1)
    assert mean_corruption_error(alexnet) == pytest.approx(0.789, abs=0.001)
    with pytest.raises(ValueError, match="needs five severities of all 15 corruptions, got 0 of 'fog'"):
        mean_corruption_error({name: value for name, value in errors.items() if name != "fog"})


def test_unknown_corruptions_are_refused():
    with pytest.raises(ValueError, match="did you mean 'fog'"):
        corrupt(photos(1), "fogg", 1, [0])
    with pytest.raises(ValueError, match="choose from 1, 2, 3, 4, 5"):
        corrupt(photos(1), "fog", 6, [0])


# -- occlusion ------------------------------------------------------------------------------------------------------------


def test_occlusion_hides_whole_patches():
    images = torch.rand(3, 3, 32, 24) * 0.5 + 0.25
    hidden_before = torch.zeros(3, 1, 32, 24, dtype=torch.bool)
    for tenth in range(10):
        result = occlude(images, tenth / 10, 4, -1.0, Draws([(0, row) for row in range(3)]))
        hidden = (result == -1).all(1, keepdim=True)
        assert torch.equal(torch.where(hidden, images, result), images)
        patches = hidden.view(3, 8, 4, 6, 4).float().mean((2, 4))
        assert set(patches.unique().tolist()) <= {0.0, 1.0}
        assert patches.sum((1, 2)).tolist() == [round(4.8 * tenth)] * 3
        assert (hidden | ~hidden_before).all()  # more, and the same ones
        hidden_before = hidden
    assert not torch.equal(hidden[0], hidden[1])


def test_occlusion_needs_whole_patches():
    with pytest.raises(ValueError, match="whole multiples"):
        occlude(torch.rand(1, 3, 30, 32), 0.5, 4, 0.0, Draws([(0,)]))
