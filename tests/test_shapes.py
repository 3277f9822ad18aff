"""Methods mix inputs of every shape, or refuse it: none returns a batch unmixed, or exchanged as a whole, without a word."""

import pytest
import torch
from torch.testing import assert_close
from transformers import ViTConfig, ViTForImageClassification

import laws
from hf_mixup import METHODS, MixupModel
from hf_mixup.core.geometry import block_grid
from hf_mixup.core.plan import blend, mix_targets
from hf_mixup.core.rng import keyed
from hf_mixup.methods import get_method
from hf_mixup.steps.moex import exchanged
from refusals import refuses
from small import resnet, vit
from test_laws import UNDRAWN, fits

# a waveform, stereo sound; sides without a common divisor; a prime one
SHAPES = [(8, 1, 1, 4096), (8, 1, 2, 4096), (8, 3, 28, 33), (8, 3, 31, 31)]
CASES = [(name, shape) for name in sorted({*METHODS} - UNDRAWN) for shape in SHAPES if fits(name, shape)]


def mixedness(plan, size):
    """(B,): the chance that two random pixels of a mixture come from different images, 0 for an image that is whole."""
    shares = plan.dense_mask(size).double().mean((2, 3)).expand(len(plan.index), -1)
    return 1 - torch.zeros(len(shares), len(shares), dtype=torch.float64).scatter_add_(1, plan.index, shares).square().sum(1)


def bumps(count, size, key):
    """(count, H, W): saliency around one place of each image."""
    places = torch.rand(2, count, generator=keyed(23, key))
    down, along = (torch.exp(-(((torch.arange(n) / n - at[:, None]) / 0.2) ** 2)) for n, at in zip(size, places, strict=True))
    return down[:, :, None] * along[:, None] + 1e-3


@pytest.mark.parametrize(("name", "shape"), CASES, ids=lambda value: str(value).replace(", ", "x"))
def test_every_shape_is_mixed_or_refused(name, shape):
    policy = METHODS[name].sample
    if shape[2] == 31 and name in ("comixup", "puzzlemix", "saliencygrafting"):
        with refuses(r"images must have a side that 2 to \d+ blocks divide, got 31 x 31 pixels; resize them, or set block_nums"):
            laws.plan_of(policy, shape)
        return
    plans = []
    for key in range(3):
        signals = laws.signals_for(shape, key)
        if name == "comixup":  # of noise it shows whole images
            signals["saliency"] = bumps(shape[0], shape[2:], key)
        plans.append(laws.plan_of(policy, shape, key, signals))
    assert torch.cat([mixedness(plan, shape[2:]) for plan in plans]).mean() > 0.04
    colours = torch.rand(shape[0], shape[1])
    for plan in plans:
        if plan.sources is None:
            mixed = blend(plan, colours[:, :, None, None].expand(shape)).mean((2, 3))
            assert_close(mixed, mix_targets(plan, colours), atol=laws.PIXEL / (shape[2] * shape[3]), rtol=0)


def test_sides_without_a_common_number_of_blocks_have_numbers_of_their_own():
    assert block_grid((1, 16000), (4,), keyed(0)) == (1, 4)
    assert block_grid((28, 33), (2, 4, 8, 16), keyed(0)) == (14, 11)
    assert block_grid((30, 45), (2, 4), keyed(0)) == (3, 3)
    assert {block_grid((32, 64), (2, 8), keyed(key)) for key in range(20)} == {(2, 2), (8, 8)}


@pytest.mark.parametrize("name", ["attentivemix", "mergemix", "smmix", "tlalign", "tokenmix"])
def test_a_grid_of_one_place_is_refused(name):
    shape = (4, 3, 8, 8)
    signals = laws.signals_for(shape)
    for signal in ("features", "patch_attention", "token_scores", "merged_attention", "token_grid"):
        signals[signal] = signals[signal][..., :1, :1]
    with refuses("the network must look at several places of an image, got a grid of one; use larger images"):
        laws.plan_of(METHODS[name].sample, shape, signals=signals)


def test_attention_on_one_place_is_refused():
    """It would give one of both images half of the label, whatever is pasted."""
    model = MixupModel(
        ViTForImageClassification(
            ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=16, num_labels=4
            )
        ),
        "transmix",
    ).train()
    with refuses("the network must look at several places of an image, got a grid of one"):
        model(torch.randn(4, 3, 16, 16), torch.arange(4), (0, 0, 0))


@pytest.mark.parametrize("channels", [1, 2])
def test_boxes_of_sounds_cover_all_channels(channels):
    for fields in ({}, {"margin": 0.5}, {"minmax": (0.2, 0.8)}):
        plan = laws.plan_of(get_method("cutmix", **fields).sample, (40, 1, channels, 200))
        assert (plan.mask.edges[:, 1] - plan.mask.edges[:, 0] == channels).all()
        assert 0.3 < plan.weight[:, 0].mean() < 0.8
        assert plan.weight[:, 0].std() > 0.1


def test_boxes_need_room():
    for size in ((1, 1), (2, 2), (1, 2)):
        for minmax in (None, (0.2, 0.8)):
            with refuses(f"boxes need a side of at least 3 pixels or patches, got {size[0]} x {size[1]}"):
                laws.plan_of(get_method("cutmix", minmax=minmax).sample, (4, 3, *size))


@pytest.mark.parametrize("shape", [(6, 1, 1, 40), (6, 3, 2, 12)])
def test_every_image_whose_label_counts_is_in_a_spliced_grid(shape):
    """Cells of a waveform are side by side. In a grid of two rows only those of the first row would be seen."""
    images = torch.arange(1.0, 7)[:, None, None, None].expand(shape)
    for key in range(40):
        signals = laws.signals_for(shape)
        signals["images"] = images
        plan = laws.plan_of(METHODS["splicemix"].sample, shape, key, signals)
        mixed = blend(plan, images)
        for row, index, weight in zip(mixed, plan.index, plan.weight, strict=True):
            assert {int(i) + 1 for i, w in zip(index, weight, strict=True) if w > 0} <= {int(v) for v in row.unique() if v == int(v)}
    with refuses("splicemix needs a pixel for each of . images, got images of 1 x 1 pixels; use larger ones"):
        laws.plan_of(METHODS["splicemix"].sample, (4, 3, 1, 1))


# -- labels -----------------------------------------------------------------------------------------------------------------


def test_spliced_labels_are_a_union_everywhere():
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 2
    method = get_method("splicemix", step="standard")
    for targets in (
        method(images, labels, 3, keyed(0))[1],
        mix_targets(method.plan(images, generator=keyed(0)), labels, 3),
        MixupModel(vit(num_labels=3), "splicemix").train()(images, labels, (0, 0, 0)).targets,
    ):
        assert set(targets.unique().tolist()) == {0, 1}
    with refuses("'splicemix' unites the labels of several images, got the loss CrossEntropy, which takes shares that sum to 1; use 'bce'"):
        get_method("splicemix", loss="crossentropy")


def test_methods_of_one_network_have_losses_of_one_kind():
    with refuses("methods of one network must have losses of one kind, got 'splicemix' with BCE, 'mixup' with CrossEntropy; give all"):
        MixupModel(vit(), ["splicemix", "mixup"])
    MixupModel(vit(), ["splicemix", "mixup"], loss="bce")


@pytest.mark.parametrize("name", ["remix", "cmo", "cmixup", "balancedmixup"])
def test_a_plan_by_labels_checks_them(name):
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, -1])
    for num_labels in (4, None):
        with refuses("labels must be from 0 to ., got -1 at row 3"):
            METHODS[name].plan(images, labels, num_labels=num_labels)
    with refuses("labels must be from 0 to 3, got 6 at row 3"):
        METHODS[name].plan(images, torch.tensor([0, 1, 2, 6]), num_labels=4)
    with refuses("the ignore index -100 at row 0"):
        METHODS[name].plan(images, torch.tensor([-100, 1, 2, 3]))


# -- hidden states ----------------------------------------------------------------------------------------------------------


def test_moments_of_one_channel_are_refused():
    """Its mean is the image: the partner would be shown whole, under a tenth of its label."""
    with refuses("moex exchanges moments over several channels, got hidden states of one; name a later layer"):
        exchanged(torch.randn(4, 1, 8, 8), torch.arange(4).roll(1), 1, 1e-5)


def test_styles_of_one_place_are_refused():
    from hf_mixup.steps.mixstyle import restyled

    with refuses("mixstyle mixes styles over several places, got maps of one; name an earlier layer"):
        restyled(torch.randn(4, 8, 1, 1), torch.arange(4).roll(1), torch.full((4,), 0.5), 1e-6)


@pytest.mark.parametrize("name", ["manifoldmix", "moex", "nfm", "patchup"])
@pytest.mark.parametrize("layer", ["resnet.encoder.stages", "resnet.encoder.stages.0.layers.0.layer.0.normalization"])
def test_layers_that_do_not_run_once_are_refused(name, layer):
    """A list of modules has a name, but never runs; a module may also be used twice. Only the labels would be mixed, or the states twice."""
    network = resnet()
    if layer.endswith("normalization"):
        network.resnet.encoder.stages[0].layers[0].layer[1].normalization = network.get_submodule(layer)
    model = MixupModel(network, get_method(name, layers=(layer,))).train()
    with refuses(r"a layer that is changed must run once in a pass, got a \w+ that ran [02] times; name another one in layers"):
        model(torch.randn(4, 3, 16, 16), torch.arange(4), (0, 0, 0))


def test_layers_without_maps_are_refused():
    with refuses(r"a layer must give maps \(B, C, h, w\) or tokens \(B, N, C\), got shape \(4, 4\); name another one"):
        MixupModel(resnet(), get_method("moex", layers=("classifier.1",))).train()(torch.randn(4, 3, 16, 16), torch.arange(4), (0, 0, 0))
