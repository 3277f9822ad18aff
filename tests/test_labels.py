"""Losses and label policies that rewrite labels: hand-worked cases, composition, refusals."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

import laws
import tiny
from hf_mixup import METHODS, MixupCollator, MixupLoss, MixupModel, get_method
from hf_mixup.core.geometry import box_plan, enlarged
from hf_mixup.core.losses import BCE, CrossEntropy, Decoupled, DecoupledBCE
from hf_mixup.core.plan import Dense, MixPlan, blend, mix_targets
from hf_mixup.core.policy import AreaLabels, Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.labels import AlignedLabels, AttentionLabels, ProgressiveLabels, TokenLabels
from hf_mixup.networks.families import classifier_of
from hf_mixup.networks.passes import output_of, watched
from hf_mixup.networks.signals.attention import GridAttention
from hf_mixup.networks.signals.features import class_activation, last_feature_map
from hf_mixup.policies.mixpro import kept_cells
from hf_mixup.policies.smmix import max_min_plan, square_sides
from hf_mixup.steps.smmixing import pooled_parts
from hf_mixup.steps.sumix import weighed
from refusals import refuses

# -- DecoupleMix ------------------------------------------------------------------------------------------------------------


def test_decoupled_by_hand():
    """Three classes with odds 1 : 2 : 4, the first two mixed: each is compared with itself and the third."""
    logits = torch.tensor([[1.0, 2.0, 4.0]]).log()
    targets = torch.tensor([[0.3, 0.7, 0.0]])
    mixed = -(0.3 * math.log(1 / 7) + 0.7 * math.log(2 / 7))
    first, second = -math.log(1 / 5), -math.log(2 / 6)
    for loss, expected in (
        (Decoupled(eta=0.5), mixed + 0.5 * (first + second)),
        (Decoupled(eta=0.5, sides="less"), mixed + 0.5 * first),
        (Decoupled(eta=0.5, sides="more"), mixed + 0.5 * second),
        (Decoupled(eta=0.5, power=1), mixed + 0.5 * (0.3 * first + 0.7 * second)),
        (Decoupled(eta=0.5, power=2, threshold=0.5), mixed + 0.5 * (0.36 * first + second)),
    ):
        assert_close(loss(logits, targets), torch.tensor([expected]))


@pytest.mark.parametrize(
    "targets",
    [[1.0, 0.0, 0.0], [0.9995, 0.0005, 0.0], [0.5, 0.3, 0.2]],
    ids=["one class", "hardly mixed", "soft labels"],
)
def test_decoupled_leaves_what_is_no_mixture_of_two_alone(targets):
    logits, targets = torch.randn(1, 3), torch.tensor([targets])
    assert_close(Decoupled(eta=0.5)(logits, targets), CrossEntropy()(logits, targets))


def test_decoupled_smooths_the_mixed_part_only():
    logits, targets = torch.randn(4, 5), torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0]]).expand(4, 5)
    terms = Decoupled(eta=0.1)(logits, targets) - CrossEntropy()(logits, targets)
    assert_close(Decoupled(eta=0.1, smoothing=0.1)(logits, targets) - CrossEntropy(0.1)(logits, targets), terms)


def test_decoupled_gradients_are_finite_and_do_not_let_the_classes_compete():
    logits = torch.tensor([[80.0, -80.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    extra = Decoupled(eta=1.0, sides="less")(logits, targets) - CrossEntropy()(logits, targets)
    grad = torch.autograd.grad(extra.sum(), logits)[0]
    assert grad.isfinite().all()
    assert grad[1, 1] == 0  # the term of the first class knows nothing of the second
    # two classes and both mixed: nothing is left to be compared with
    two = torch.randn(3, 2, requires_grad=True)
    loss = Decoupled(eta=1.0)(two, torch.tensor([[0.4, 0.6]]).expand(3, 2))
    assert_close(loss, CrossEntropy()(two, torch.tensor([[0.4, 0.6]]).expand(3, 2)))
    assert torch.autograd.grad(loss.sum(), two)[0].isfinite().all()


def test_decoupled_bce_is_bce_until_it_is_told_otherwise():
    logits, targets = torch.randn(4, 5), torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0]]).expand(4, 5)
    assert_close(DecoupledBCE()(logits, targets), BCE()(logits, targets))
    whole = torch.tensor([[0.0, 0.8, 0.0, 1.0, 0.0]]).expand(4, 5)
    assert_close(DecoupledBCE(threshold=0.5)(logits, targets), BCE()(logits, whole))


def test_decouplemix_serves_stock_trainers():
    """The loss needs mixed labels only, so it works behind a collator as well."""
    method = get_method("decouplemix", eta=0.2)
    _, targets = method(torch.randn(8, 3, 16, 16), torch.arange(8), num_labels=10)
    logits = torch.randn(8, 10)
    loss = MixupLoss(loss=method.loss)({"logits": logits}, targets)
    assert_close(loss, method.loss(logits, targets).mean())
    assert loss > CrossEntropy()(logits, targets).mean()


# -- TransMix ---------------------------------------------------------------------------------------------------------------


def test_attention_labels_by_hand():
    """A box on the right half of one image of two patches: 0.5 * 0.5 of the area and 0.5 * 0.9 of the attention are its."""
    plan = box_plan(torch.tensor([1, 0]), torch.tensor([[0, 4, 4, 8], [0, 0, 0, 0]]), (4, 8))
    attention = torch.tensor([[[0.1, 0.9]], [[0.3, 0.1]]])
    weights = AttentionLabels().weights(plan, Signals(attention=attention))
    assert_close(weights, torch.tensor([[0.3, 0.7], [1.0, 0.0]]))
    assert_close(AttentionLabels(rho=1.0).weights(plan, Signals(attention=attention)), plan.weight)
    assert_close(AttentionLabels(rho=0.0).weights(plan, Signals(attention=attention))[0], torch.tensor([0.1, 0.9]))
    nothing = AttentionLabels(rho=0.0).weights(plan, Signals(attention=torch.zeros(2, 1, 2)))
    assert_close(nothing, plan.weight)


@pytest.mark.parametrize("sample", ["mixup", "cutmix", "fmix", "gridmix", "resizemix", "vanilla"])
def test_transmix_labels_any_policy(sample):
    method = get_method("transmix", sample={"name": sample})
    plan = method.sample.plan(torch.Size((6, 3, 32, 32)), keyed(1), Signals(images=torch.randn(6, 3, 32, 32)))
    weights = method.label.weights(plan, Signals(attention=torch.rand(6, 8, 8)))
    assert_close(weights.sum(1), torch.ones(6))
    assert weights.min() >= 0


def test_transmix_needs_the_model():
    with pytest.raises(ValueError, match=r"mix by images only, got .transmix., which needs attention, so the model"):
        MixupCollator("transmix", num_labels=10)
    with pytest.raises(ValueError, match="rho must be a number from 0 to 1, got 2"):
        get_method("transmix", rho=2)


# -- TokenMix ---------------------------------------------------------------------------------------------------------------


def test_token_labels_by_hand():
    """Two places: the own image is known by the left one, its partner by the right, and the right is the partner's."""
    plan = MixPlan.pair(torch.tensor([1, 0]), Dense(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).expand(2, 2, 1, 2)), torch.full((2,), 0.5))
    scores = torch.tensor([[[3.0, 1.0]], [[1.0, 9.0]]])
    weights = TokenLabels().weights(plan, Signals(token_scores=scores))
    assert_close(weights, torch.tensor([[0.75, 0.9], [0.1, 0.25]]))
    # without evidence every place is worth the same
    assert_close(TokenLabels().weights(plan, Signals(token_scores=torch.zeros(2, 1, 2))), torch.full((2, 2), 0.5))


@pytest.mark.parametrize(("grid", "count"), [((14, 14), 112), ((8, 8), 36), ((4, 4), 9), ((7, 10), 40)])
def test_token_masks_cover_what_they_aim_at(grid, count):
    """The published 112 of 196, and the same share of other grids; never more, and hardly ever less than nine tenths of it."""
    policy = get_method("tokenmix").sample
    signals = Signals(token_scores=torch.rand(4, *grid))
    shape = torch.Size((4, 3, grid[0] * 2, grid[1] * 2))
    pasted = torch.stack([1 - policy.plan(shape, keyed(key), signals).weight[0, 0] for key in range(200)]) * grid[0] * grid[1]
    assert pasted.max() <= count + 1e-3
    assert pasted.mean() > 0.9 * count


@pytest.mark.parametrize("mask_type", ["block", "random"])
def test_token_masks_are_whole_patches(mask_type):
    policy = get_method("tokenmix", mask_type=mask_type, mode="sample").sample
    mask = policy.plan(torch.Size((4, 3, 32, 24)), keyed(1), Signals(token_scores=torch.rand(4, 8, 6))).dense_mask((32, 24))
    assert torch.equal(mask, enlarged(mask[:, :, ::4, ::4], (32, 24)))
    assert len({tuple(row.flatten().tolist()) for row in mask[:, 0]}) == 4


@pytest.mark.parametrize("size", [(225, 224), (224, 230)])
def test_row_12_tokenmix_refuses_images_that_the_patches_do_not_divide(size):
    signals = Signals(token_scores=torch.rand(2, 14, 14))
    with refuses(f"grid of 14 x 14 patches, got {size[0]} x {size[1]} pixels"):
        get_method("tokenmix").sample.plan(torch.Size((2, 3, *size)), keyed(1), signals)


def test_tokenmix_reads_a_teacher(tmp_path):
    """Class activation maps of a frozen convolutional network, as in the paper, for a network of any kind."""
    tiny.network("resnet").save_pretrained(tmp_path)
    fields = {"scores": "activation", "teacher": str(tmp_path), "teacher_size": 128}
    model = MixupModel(tiny.network("vit"), "tokenmix", mix_args={"tokenmix": fields}).train()
    images, targets = tiny.batch()
    out = model(images, targets, MixKey(1, 0, 0))
    teacher = tiny.network("resnet")
    features = last_feature_map(teacher, F.interpolate(images, (128, 128), mode="bilinear"))
    scores = class_activation(teacher, features, targets).relu().detach()
    method = get_method("tokenmix", **fields)
    plan = method.sample.plan(images.shape, MixKey(1, 0, 0).own_rng(), Signals(token_scores=scores))
    assert_close(out.targets, mix_targets(plan.reweighted(method.label.weights(plan, Signals(token_scores=scores))), targets))
    assert not any(parameter.requires_grad for parameter in model.states["tokenmix"].teachers.parameters())


def test_tokenmix_of_a_network_without_attention():
    with pytest.raises(ValueError, match="must have attention that can be read"):
        MixupModel(tiny.network("resnet"), "tokenmix")
    model = MixupModel(tiny.network("resnet"), "tokenmix", mix_args={"tokenmix": {"scores": "activation"}}).train()
    images, targets = tiny.batch()
    model(images, targets, MixKey(1, 0, 0)).loss.backward()


@pytest.mark.parametrize("family", ["vit", "deit", "swin", "pvt", "pvt_v2", "timm_vit", "timm_swin"])
def test_tokenmix_step(family):
    """Its scores are those of the clean images, in evaluation mode, and leave no trace in the network."""
    model = MixupModel(tiny.network(family), "tokenmix").train()
    images, targets = tiny.batch()
    signal = model.states["tokenmix"].early["sample", "token_scores"]
    scores = signal.take(images, targets, Signals())
    assert model.backbone.training
    plan = METHODS["tokenmix"].sample.plan(images.shape, MixKey(1, 0, 0).own_rng(), Signals(token_scores=scores))
    out = model(images, targets, MixKey(1, 0, 0))
    assert_close(out.lam, TokenLabels().weights(plan, Signals(token_scores=scores))[:, 0])
    assert (out.targets.sum(1) - 1).abs().max() > 1e-5
    out.loss.backward()


# -- SMMix ------------------------------------------------------------------------------------------------------------------


def test_smmix_pastes_the_most_attended_square_over_the_least():
    """Cells hold their own number, so that what was moved can be read off the pixels."""
    numbers = torch.arange(16.0).view(4, 4)
    images = enlarged(torch.stack([numbers, 100 + numbers])[:, None], (8, 12))
    attention = torch.rand(2, 4, 4)
    attention[0, 2:, :2] -= 5  # the least of the first image
    attention[1, 1:3, 2:] += 5  # the most of the second
    mixed = blend(max_min_plan(images, attention, torch.tensor([1, 0]), 2), images)[0, 0, ::2, ::3]
    expected = numbers.clone()
    expected[2:, :2] = 100 + numbers[1:3, 2:]
    assert_close(mixed, expected)


@pytest.mark.parametrize(("grid", "sides"), [(14, range(3, 11)), (7, range(1, 6)), (2, range(1, 2)), (1, range(1, 2))])
def test_smmix_sides(grid, sides):
    assert square_sides(grid, (0.25, 0.75)) == sides


def test_row_12_smmix_refuses_images_that_the_patches_do_not_divide():
    signals = Signals(patch_attention=torch.rand(2, 7, 7), images=torch.randn(2, 3, 225, 224))
    with refuses("grid of 7 x 7 patches, got 225 x 224 pixels"):
        get_method("smmix").sample.plan(torch.Size((2, 3, 225, 224)), keyed(1), signals)


def test_smmix_step_and_sample_belong_together():
    with pytest.raises(ValueError, match="needs the sample policy 'smmix', got CutMix"):
        MixupModel(tiny.network("vit"), get_method("smmix", sample={"name": "cutmix"}))


@pytest.mark.parametrize("family", ["vit", "deit", "swin", "pvt", "pvt_v2", "timm_vit", "timm_swin"])
def test_smmix_losses(family):
    """Tokens pooled over the whole image, through the network's own classifier, are its own prediction where it pools them."""
    model = MixupModel(tiny.network(family), "smmix").train()
    images, targets = tiny.batch()
    state = model.states["smmix"]
    out = model(images, targets, MixKey(1, 0, 0))
    whole = CrossEntropy()(out.logits, out.targets).mean()
    assert out.loss > whole
    out.loss.backward()
    assert state.token_head.weight.grad.abs().sum() > 0
    assert_close(out.targets.sum(1), torch.ones(4))
    alone = MixupModel(model.backbone, "smmix", mix_args={"smmix": {"fine": 0.0, "consistency": 0.0}}).train()
    torch.manual_seed(0)
    out = alone(images, targets, MixKey(1, 0, 0))
    assert_close(out.loss, CrossEntropy()(out.logits, out.targets).mean())
    if family in ("swin", "pvt_v2", "timm_swin"):
        model.eval()
        logits, (output,) = watched(model.backbone, images, [output_of(state.last[0])])
        tokens = state.layout.maps(output, (tiny.SIDE, tiny.SIDE))
        pooled = pooled_parts(tokens, MixPlan.identity(4))[:, 0]
        assert_close(classifier_of(model.backbone)(pooled), logits, atol=1e-5, rtol=1e-5)


def test_smmix_leaves_its_token_head_behind(tmp_path):
    model = MixupModel(tiny.network("vit"), "smmix")
    model.save_pretrained(tmp_path)
    assert "token_head" not in " ".join(load_file(tmp_path / "model.safetensors"))
    assert_close(MixupModel.from_pretrained(tmp_path).states["smmix"].token_head.weight, model.states["smmix"].token_head.weight)


# -- TL-Align ---------------------------------------------------------------------------------------------------------------


def test_labels_travel_with_attention_by_hand():
    """A class token and two patches, the second pasted. One block: half of a token is its own, the rest what it attends to."""
    plan = MixPlan.pair(torch.tensor([1, 0]), Dense(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).expand(2, 2, 1, 2)), torch.full((2,), 0.5))
    attention = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]).expand(2, 1, 3, 3)
    signals = Signals(token_grid=torch.zeros(1, 2), attention_layers=attention)
    # of the first image: (0.2 * 0.5 + 0.8 * 1 + 0.5) / 2
    assert_close(AlignedLabels().weights(plan, signals)[:, 0], torch.full((2,), 0.7))
    second = Signals(token_grid=torch.zeros(1, 2), attention_layers=attention.repeat(1, 2, 1, 1))
    # (0.2 * 0.7 + 0.8 * 0.75 + 0.7) / 2, the first patch having 0.75 by then
    assert_close(AlignedLabels().weights(plan, second)[:, 0], torch.full((2,), 0.72))


@pytest.mark.parametrize("family", ["vit", "deit", "timm_vit"])
def test_tlalign_step(family):
    """The targets follow the network's own attention of all blocks, by transformers' own account."""
    network = tiny.sharpened(tiny.network(family))
    model = MixupModel(network, "tlalign").train()
    images, targets = tiny.batch()
    key = next(key for key in (MixKey(1, 0, step) for step in range(20)) if (model(images, targets, key).lam < 1).all())
    out = model(images, targets, key)
    assert_close(out.targets.sum(1), torch.ones(4))
    grid = Signals(token_grid=torch.zeros(4, 4))
    plan = METHODS["tlalign"].sample.plan(images.shape, key.own_rng(), grid)
    if family != "timm_vit":
        other = copy.deepcopy(network)
        other.set_attn_implementation("eager")
        with torch.no_grad():
            attention = other(pixel_values=blend(plan, images), output_attentions=True).attentions
        grid["attention_layers"] = torch.stack(attention, 1).mean(2)
        assert_close(out.lam, AlignedLabels().weights(plan, grid)[:, 0], atol=1e-5, rtol=1e-5)
    assert (out.lam - plan.weight[:, 0]).abs().max() > 0.02
    out.loss.backward()


@pytest.mark.parametrize("family", ["swin", "pvt", "pvt_v2", "timm_swin", "resnet"])
def test_tlalign_refuses_networks_that_merge_tokens(family):
    with pytest.raises(ValueError, match=r"one grid of tokens|attention that can be read"):
        MixupModel(tiny.network(family), "tlalign")


def test_tlalign_boxes_are_whole_tokens():
    plan = METHODS["tlalign"].sample.plan(torch.Size((64, 3, 32, 12)), keyed(1), Signals(token_grid=torch.zeros(8, 6)))
    assert (plan.mask.edges % torch.tensor([4, 4, 2, 2]) == 0).all()
    assert (plan.mask.edges <= torch.tensor([32, 32, 12, 12])).all()
    assert (plan.mask.area() > 0).double().mean() > 0.5


@pytest.mark.parametrize("name", ["mixpro", "smmix", "tlalign", "tokenmix"])
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (5, 4, 16, 12), (64, 3, 32, 32)])
def test_images_hold_the_law_by_area(name, shape):
    """Their own labels go by evidence; the plans of the images go by area, as all do."""
    for key in range(5):
        laws.onehot_images(METHODS[name].sample, AreaLabels(), shape, key)


# -- MixPro -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cells", "size"), [(4, (224, 224)), (7, (224, 224)), (4, (30, 50)), (3, (8, 8))])
def test_maskmix_weighs_by_pixels(cells, size):
    policy = get_method("mixpro", cells=cells).sample
    plan = policy.plan(torch.Size((16, 3, *size)), keyed(1), Signals())
    assert_close(plan.weight[:, 0], plan.dense_mask(size)[:, 0].mean((1, 2)))
    if size[0] % cells == 0:
        assert_close(plan.weight * cells**2, (plan.weight * cells**2).round())
    assert len({tuple(mask.flatten().tolist()) for mask in plan.dense_mask(size)[:, 0]}) > 8


def test_maskmix_keeps_the_first_cells():
    order = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    kept = kept_cells(order, torch.tensor([0.3, 0.75]))
    assert kept.int().tolist() == [[0, 1, 0, 1], [1, 1, 1, 0]]


def test_progressive_labels_trust_attention_as_the_network_learns():
    plan = MixPlan.pair(torch.tensor([1, 0]), Dense(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).expand(2, 2, 1, 2)), torch.full((2,), 0.5))
    targets = torch.eye(100)[:2]
    signals = Signals(attention=torch.tensor([[[0.9, 0.1]]]).expand(2, 1, 2), targets=targets)
    wrong, right = torch.zeros(2, 100), torch.zeros(2, 100)
    wrong[:, 50], right[:, :2] = 100, 100
    policy = ProgressiveLabels(smoothing=0.0)
    assert_close(policy.weights(plan, Signals(**signals, logits=wrong))[:, 0], torch.full((2,), 0.5))
    assert_close(policy.weights(plan, Signals(**signals, logits=right))[:, 0], torch.full((2,), 0.9))
    logits = torch.randn(2, 100, requires_grad=True)
    assert not policy.weights(plan, Signals(**signals, logits=logits)).requires_grad
    assert ProgressiveLabels(as_published=True).weights(plan, Signals(**signals, logits=logits)).requires_grad


@pytest.mark.parametrize("family", ["vit", "deit", "pvt"])
def test_mixpro_step(family):
    """The weights of a step are those of the formula, by the prediction and the attention of the mixed images."""
    network = tiny.sharpened(tiny.network(family))
    with torch.no_grad():
        classifier_of(network).weight.mul_(100)  # predictions that are sure of something
    model = MixupModel(network, "mixpro").train()
    images, targets = tiny.batch()
    out = model(images, targets, MixKey(1, 0, 3))
    method = METHODS["mixpro"]
    plan = method.sample.plan(images.shape, MixKey(1, 0, 3).own_rng(), Signals())
    _, (attention,) = watched(network.eval(), blend(plan, images), [GridAttention(network, "importance").tap((tiny.SIDE, tiny.SIDE))])
    signals = Signals(attention=attention, logits=out.logits, targets=targets)
    assert_close(out.lam, method.label.weights(plan, signals)[:, 0], atol=1e-4, rtol=1e-4)
    assert (out.lam - plan.weight[:, 0]).abs().max() > 0.005
    out.loss.backward()


# -- SUMix ------------------------------------------------------------------------------------------------------------------


def test_sumix_weighs_by_hand():
    """Distances of 0 and log 4 at the images' own classes make shares of 1 : 4 into 1 : 1, and a share of nothing stays one."""
    distance = torch.zeros(2, 2, 3)
    distance[0, 1, 2] = math.log(4)
    weights = weighed(torch.tensor([[0.2, 0.8], [1.0, 0.0]]), distance, torch.tensor([[0, 2], [1, 1]]))
    assert_close(weights, torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    # batches so large that e to the power of the distance is 0 in float32
    assert weighed(torch.tensor([[0.5, 0.5]]), torch.full((1, 2, 3), 4096.0), torch.tensor([[0, 1]])).isfinite().all()


@pytest.mark.parametrize("family", ["resnet", "vit", "timm_vit"])
@pytest.mark.parametrize("sample", ["cutmix", "mixup", "resizemix"])
def test_sumix_step(family, sample):
    model = MixupModel(tiny.network(family), get_method("sumix", sample={"name": sample})).train()
    images, targets = tiny.batch()
    out = model(images, targets, MixKey(1, 0, 1))
    assert out.loss > CrossEntropy()(out.logits, out.targets).mean()
    assert_close(out.targets.sum(1), torch.ones(4))
    out.loss.backward()
    assert model.states["sumix"].uncertainty.weight.grad.abs().sum() > 0


def test_sumix_takes_pairs():
    with pytest.raises(ValueError, match="weighs two images, got the plan of Vanilla"):
        MixupModel(tiny.network("resnet"), get_method("sumix", sample={"name": "vanilla"})).train()(*tiny.batch(), MixKey(1, 0, 0))
