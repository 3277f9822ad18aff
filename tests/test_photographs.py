"""Large JPEG files, which are decoded at a fraction of their size if the crop will be small."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.pixels import Photograph
from hf_mixup.data.processor import ImageFormat
from hf_mixup.data.stream import ImageStream, StreamedSplit
from refusals import refuses

FEATURES = Features({"image": Image(), "label": Value("int64")})
PHOTOGRAPHS = [Pillow.fromarray(array) for array in load_sample_images().images]  # 640 x 427


def jpeg(image, kind="jpeg", **options):
    image.save(stream := io.BytesIO(), kind, **{"quality": 92, **options})
    return stream.getvalue()


def enlarged(image, width, height):
    """With noise as of a sensor, so that there is something at every scale."""
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 1))
    return Pillow.fromarray((np.asarray(image.resize((width, height), Pillow.Resampling.LANCZOS)) + noise).clip(0, 255).astype(np.uint8))


LARGE = enlarged(PHOTOGRAPHS[0], 1597, 1065)  # of which 8 divides neither side


def data_set(files):
    return Dataset.from_dict({"image": [{"bytes": file, "path": None} for file in files], "label": [0] * len(files)}, features=FEATURES)


def levels(transform, files, epochs=4, decoded=False):
    """(epochs, files, C, H, W) int, of 0 to 255. `decoded`: of whole pictures, which are decoded before."""
    data = ImageDataset(data_set(files), "image", "label", transform, seed=5, on_device=True)
    if decoded:
        whole = [Pillow.open(io.BytesIO(file)) for file in files]
        data.data = [{"image": image, "label": 0} for image in whole]
    seen = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        seen.append(torch.stack([example["pixel_values"] for example in data.__getitems__(range(len(files)))]).int())
    return torch.stack(seen)


def crops(size, interpolation="bicubic", **options):
    return ImageFormat(size, interpolation=interpolation).train_transform(crop="resized", **options)


@pytest.fixture
def scales(monkeypatch):
    """Those at which photographs are decoded from here on."""
    from PIL.JpegImagePlugin import JpegImageFile

    seen, draft = [], JpegImageFile.draft

    def watched(image, mode, size):
        done = draft(image, mode, size)
        seen.append(image.decoderconfig[0])
        return done

    monkeypatch.setattr(JpegImageFile, "draft", watched)
    return seen


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_fraction_of_the_pixels_is_enough(scales, interpolation):
    """Of photographs as they are and enlarged ones, at 1/2, 1/4 and 1/8: less than half of what the other filter changes, at most 24 levels."""
    files = [jpeg(image) for image in (*PHOTOGRAPHS, LARGE)]
    other = "bicubic" if interpolation == "bilinear" else "bilinear"
    changes, filters, largest = [], [], 0
    for size in (24, 48, 96):
        seen, whole = levels(crops(size, interpolation), files), levels(crops(size, interpolation), files, decoded=True)
        change = (seen - whole).abs().flatten(2).float()
        scaled = change.amax(-1) > 0  # those of a small part are equal
        changes.append(change.mean(-1)[scaled])
        filters.append((levels(crops(size, other), files, decoded=True) - whole).abs().flatten(2).float().mean(-1)[scaled])
        largest = max(largest, int(change.max()))
    changes, filters = torch.cat(changes), torch.cat(filters)
    assert set(scales) == {2, 4, 8}
    assert len(changes) == len(scales) > 15
    assert changes.mean() < filters.mean() / 2
    assert changes.max() < 1.6
    assert largest <= 24


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_moves_no_pixel(scales, orientation):
    """As exact as upright, also where the decoded sides are not whole: the pattern is sharp enough that a quarter of a decoded pixel shows."""
    exif = Pillow.Exif()
    exif[0x112] = orientation
    y, x = np.mgrid[:1065, :1597] / 30
    waves = np.stack([np.sin(x), np.sin(y), np.sin(x + y)], -1) * 100 + 128
    files = [jpeg(Pillow.fromarray(waves.astype(np.uint8)), quality=98, subsampling=0, exif=exif)]
    seen, whole = (levels(crops((96, 72)), files, 6, decoded) for decoded in (False, True))
    assert set(scales) >= {2}
    assert (seen - whole).abs().float().mean() < 0.5


@pytest.mark.parametrize(
    "file",
    [
        jpeg(LARGE.convert("L")),
        jpeg(LARGE, progressive=True),
        jpeg(LARGE, subsampling=0),
        jpeg(LARGE, "mpo", save_all=True, append_images=[LARGE.resize((80, 60))]),
    ],
    ids=["grey", "progressive", "4:4:4", "MPO"],
)
def test_kinds_of_files(scales, file):
    seen, whole = (levels(crops(64), [file], 3, decoded) for decoded in (False, True))
    assert scales
    assert 0 < (seen - whole).abs().float().mean() < 1


@pytest.mark.parametrize(
    ("file", "transform"),
    [
        (jpeg(LARGE.convert("CMYK")), crops(64)),
        (jpeg(LARGE, "png"), crops(64)),
        (jpeg(LARGE), crops(64, "nearest")),
        (jpeg(LARGE), crops(64, resize=200)),
        (jpeg(LARGE), ImageFormat(64).train_transform(crop="pad")),
        (jpeg(LARGE), ImageFormat(64).eval_transform()),
        (jpeg(LARGE), crops(300)),
    ],
    ids=["CMYK", "PNG", "nearest", "resized before", "pad", "evaluation", "large crops"],
)
def test_all_else_is_decoded_as_a_whole(scales, file, transform):
    assert torch.equal(levels(transform, [file], 2), levels(transform, [file], 2, decoded=True))
    assert not scales


def test_a_small_part_is_the_same_to_the_bit():
    """Of a photograph of which other parts are decoded at a fraction."""
    box = (101, 203, 300, 280)
    photograph = Photograph.of(jpeg(LARGE), 3, (96, 96), Exception)
    ours = photograph.resized_crop(*box, (96, 96), Pillow.Resampling.BICUBIC)
    theirs = v2.functional.resized_crop(Pillow.open(io.BytesIO(jpeg(LARGE))), *box, [96, 96], v2.InterpolationMode.BICUBIC)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_crops_are_those_of_torchvision():
    transform, key = ImageFormat(40, squash=False).train_transform(crop="resized").each.transform.transforms[0], 7
    torch.manual_seed(key)
    ours = transform(PHOTOGRAPHS[0])
    torch.manual_seed(key)
    theirs = v2.RandomResizedCrop(40, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC)(PHOTOGRAPHS[0])
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_batches_workers_and_streams_are_the_same():
    rows = data_set([jpeg(LARGE), jpeg(PHOTOGRAPHS[1]), jpeg(LARGE, progressive=True)])
    data = ImageDataset(rows, "image", "label", crops(48), seed=3)
    one_by_one = torch.stack([data[row]["pixel_values"] for row in range(3)])
    assert torch.equal(next(iter(torch.utils.data.DataLoader(data, 3, num_workers=1)))["pixel_values"], one_by_one)
    split = StreamedSplit(rows.cast_column("image", Image(decode=False)).to_iterable_dataset(), "train", "image", "label", [0])
    streamed = torch.stack([example["pixel_values"] for example in ImageStream(split, crops(48), seed=3)])
    assert torch.equal(streamed, one_by_one)


def test_a_torn_photograph_is_named():
    rows = data_set([jpeg(LARGE), jpeg(LARGE)[:20000]])
    with refuses("every row must hold a readable image, got an error at row 1 \\(.*truncated.*\\); repair or drop that row"):
        ImageDataset(rows, "image", "label", crops(48)).__getitems__([0, 1])
    split = StreamedSplit(rows.cast_column("image", Image(decode=False)).to_iterable_dataset(), "train", "image", "label", [0])
    with refuses("every row must hold a readable image, got an error at place 1 of the stream of 'train' \\(.*truncated"):
        list(ImageStream(split, crops(48)))
