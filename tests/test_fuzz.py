"""Random input gives a valid batch, or one of our errors.

By default 120 cases of one seed. The slow suite tries 2,000 cases of a new seed and prints it; `--fuzz-seed` repeats them.
"""

import dataclasses
import math
import random
import traceback
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import hf_mixup
from hf_mixup import METHODS, MixupCollator, MixupModel
from hf_mixup.core.rng import MixKey
from hf_mixup.method import KINDS, needs_of_model
from hf_mixup.steps.keepclean import KeepClean
from refusals import parts
from small import NETWORKS, network_for

PACKAGE = str(Path(hf_mixup.__file__).parent)
# other networks, which would be looked for on the Hub, and the size of their images
OF_OTHER_NETWORKS = {"teacher", "teacher_size", "mixer"}


def mostly(*right, wrong=()):
    """One of `right`, and one time in ten of `wrong`."""
    return st.integers(0, 9).flatmap(lambda place: st.sampled_from(wrong if wrong and place == 9 else right))


numbers = mostly(0.2, 0.5, 1.0, 1, 2, 3, 0.0, 30.0, 1e-4, wrong=(-1, -0.5, 7, math.nan, math.inf, True))
words = mostly(
    "sample", "pair", "batch", "attention", "activation", "published", "paper", "official", "block", "random", "bilinear", "nearest", "sum",
    "mean", "both", "less", "more", wrong=("nope", ""),
)  # fmt: skip
tuples = st.lists(numbers, max_size=3).map(lambda listed: tuple(sorted(listed)))
OF_KIND = {bool: st.booleans(), int: numbers, float: numbers, str: words, tuple: tuples}


@st.composite
def hyper_parameters(draw, method):
    """At most two fields of the method, nearly always with values of the right type."""
    defaults = {
        field.name: getattr(getattr(method, part), field.name) for part in KINDS for field in dataclasses.fields(getattr(method, part))
    }
    names = sorted(defaults.keys() - OF_OTHER_NETWORKS)
    chosen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
    anything = st.one_of(numbers, words, tuples, st.none())
    return {name: draw(anything if draw(mostly(False, wrong=(True,))) else OF_KIND.get(type(defaults[name]), anything)) for name in chosen}


@st.composite
def calls(draw):
    """A batch for a method that needs images alone, by the method itself or in the collator."""
    method = METHODS[draw(st.sampled_from(sorted(name for name, method in METHODS.items() if not needs_of_model(method))))]
    shape = (
        draw(mostly(1, 2, 3, 4, 5, 8, wrong=(0,))),
        draw(mostly(1, 3, 3, 4, wrong=(2, 8))),
        draw(st.integers(1, 40)),
        draw(st.integers(1, 40)),
    )
    return {
        "method": method.name,
        "fields": draw(hyper_parameters(method)),
        "shape": draw(mostly(shape, wrong=(shape[1:], shape[2:], (*shape, 2), (shape[0], *shape[2:], shape[1])))),
        "dtype": draw(
            mostly(torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, wrong=(torch.uint8, torch.int64, torch.bool))
        ),
        "pixels": draw(mostly("normal", "normal", "constant", "huge", wrong=("nan", "inf", "list"))),
        "labels": draw(mostly("right", "right", "soft", wrong=LABELS)),
        "num_labels": draw(mostly(4, 4, 2, 1000, wrong=(1, 0, -1, None, "4", 4.0))),
        "collator": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


LABELS = ("wrong", "ignored", "many", "few", "matrix", "float", "list", "words", "none")


@st.composite
def steps(draw):
    """A training step of any method with a network that it can serve, or cannot."""
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    return {
        "method": method.name,
        "fields": draw(hyper_parameters(method)),
        "network": draw(mostly("own", wrong=("vit", "resnet"))),
        "batch": draw(mostly(2, 3, 4, 5, wrong=(0,))),
        "side": draw(mostly(16, 8, 20, 33)),
        "dtype": draw(mostly(torch.float32, wrong=(torch.uint8,))),
        "half": draw(st.sampled_from([None, None, torch.bfloat16])),
        "pixels": draw(mostly("normal", "normal", "constant", "huge")),
        "labels": draw(mostly("right", "right", "soft", wrong=LABELS[:-1])),
        "seed": draw(st.integers(0, 99)),
    }


def pixels_of(case, shape):
    rng = torch.Generator().manual_seed(case["seed"])
    pixels = torch.randn(shape, generator=rng)
    if case["pixels"] == "constant":
        pixels = torch.ones(shape)
    elif case["pixels"] == "huge":
        pixels = pixels * 1e4
    elif case["pixels"] in ("nan", "inf") and pixels.numel():
        pixels.view(-1)[-1] = float(case["pixels"])
    pixels = (pixels.nan_to_num() * 40).to(case["dtype"]) if not case["dtype"].is_floating_point else pixels.to(case["dtype"])
    return pixels.tolist() if case["pixels"] == "list" else pixels


def labels_of(case, count, num_labels):
    classes = num_labels if isinstance(num_labels, int) and num_labels > 0 else 4
    right = torch.arange(count) % classes
    match case["labels"]:
        case "soft":
            return torch.softmax(torch.randn(count, classes, generator=torch.Generator().manual_seed(case["seed"])), 1)
        case "wrong":
            return right + classes - 1
        case "ignored":
            return torch.where(torch.arange(count) == count - 1, -100, right)
        case "many":
            return torch.arange(count + 1) % classes
        case "few":
            return right[:-1]
        case "matrix":
            return right[:, None]
        case "float":
            return right.float()
        case "list":
            return right.tolist()
        case "words":
            return ["cat"] * count
        case "none":
            return None
    return right


def rows_of(method, images):
    """The images as often as a batch holds each."""
    return torch.cat([images] * (method.step.mixtures + 1 if isinstance(method.step, KeepClean) else 1))


def check_batch(pixels, images, labels):
    assert pixels.shape == images.shape
    assert pixels.dtype == images.dtype
    assert torch.isfinite(pixels).all()
    assert labels.dtype == torch.float32
    assert labels.shape[0] == images.shape[0]
    assert (labels >= 0).all()
    assert ((labels.sum(1) - 1).abs() < 1e-3).all()


def mix(case):
    """Does what the case says, and looks at the result. Raises what it raises."""
    method = METHODS[case["method"]].replaced(**case["fields"])
    torch.manual_seed(case["seed"])
    images = pixels_of(case, case["shape"])
    labels = labels_of(case, case["shape"][0], case["num_labels"])
    if case["collator"]:
        rows = zip(images, [None] * len(images) if labels is None else labels, strict=False)
        mixed = MixupCollator(method, num_labels=case["num_labels"])([{"pixel_values": image, "labels": label} for image, label in rows])
        check_batch(mixed["pixel_values"], rows_of(method, torch.as_tensor(images))[: len(mixed["labels"])], mixed["labels"])
    else:
        pixels, targets = method(images, labels, case["num_labels"])
        check_batch(pixels, rows_of(method, images), targets)


def step(case):
    network = network_for(case["method"]) if case["network"] == "own" else NETWORKS[case["network"]]()
    method = METHODS[case["method"]].replaced(**case["fields"])
    model = MixupModel(network, method).train()
    side = 16 if network.config.model_type == "vit" else case["side"]
    images = pixels_of(case, (case["batch"], 3, side, side))
    labels = labels_of(case, case["batch"], 4)
    with torch.autocast("cpu", dtype=case["half"], enabled=case["half"] is not None):
        for place in range(2):
            outputs = model(images, labels, mix_key=MixKey(case["seed"], 0, place))
    assert torch.isfinite(outputs.loss)
    assert outputs.loss.dtype == torch.float32
    assert outputs.targets.shape == (len(rows_of(method, images)), 4)
    assert torch.isfinite(outputs.targets).all()
    assert (outputs.targets >= 0).all()
    # TokenMix sums to what it finds, and SnapMix counts two images of one class twice; of SpliceMix, the union counts
    counted = outputs.targets.clamp(max=1) if METHODS[case["method"]].loss.multi_label else outputs.targets
    assert (counted.sum(1) <= 4 + 1e-3).all()
    assert ((outputs.lam >= 0) & (outputs.lam <= 2 + 1e-3)).all()
    outputs.loss.backward()


def ours(error) -> bool:
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)


def fuzz(cases, do, count, start):
    refused = mixed = 0

    @seed(start)
    @settings(
        max_examples=count, deadline=None, database=None, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck)
    )
    @given(cases)
    def one(case):
        nonlocal refused, mixed
        try:
            do(case)
            mixed += 1
        except (ValueError, TypeError) as error:
            if not ours(error):
                raise
            parts(str(error))
            refused += 1

    print(f"--fuzz-seed {start}")
    one()
    print(f" {mixed} batches, {refused} refusals")
    assert mixed > count / 10, "hardly anything is tried"
    assert refused > count / 10


@pytest.mark.parametrize(("cases", "do"), [(calls(), mix), (steps(), step)], ids=["calls", "steps"])
def test_a_valid_batch_or_a_refusal(cases, do):
    fuzz(cases, do, 60, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "do"), [(calls(), mix), (steps(), step)], ids=["calls", "steps"])
def test_two_thousand(cases, do, request):
    fuzz(cases, do, 1000, request.config.getoption("--fuzz-seed") or random.SystemRandom().randrange(2**32))
