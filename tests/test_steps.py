"""Methods with their own training step: what it computes, by hand, and that it trains."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import roi_align

import tiny
from hf_mixup import MixupModel, get_method
from hf_mixup.core.plan import blend
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.labels import SaliencyLabels
from hf_mixup.networks.signals.features import last_feature_map
from hf_mixup.networks.signals.saliency import input_saliency
from hf_mixup.steps.alignmix import aligned_mix, transport
from hf_mixup.steps.supermix import search

# with fields that keep them short
OWN_STEPS = {"manifoldmix": {}, "alignmix": {}, "recursivemix": {}, "supermix": {"max_iter": 2}}


def model(family, name, **fields):
    return MixupModel(tiny.network(family), get_method(name, **fields)).train()


def planned(trained, images, key, **signals):
    """The plan that a step makes of this key."""
    return trained.choice.methods[0].sample.plan(images.shape, MixKey(*key).own_rng(), Signals(images=images, **signals))


@pytest.mark.parametrize("family", ["resnet", "vit"])
@pytest.mark.parametrize("name", OWN_STEPS)
def test_steps_reach_every_parameter_and_both_images(name, family):
    trained = model(family, name, **OWN_STEPS[name])
    images, targets = tiny.batch()
    moved = set()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    before = {key: value.clone() for key, value in trained.backbone.named_parameters()}
    for step in range(4):
        inputs = images.clone().requires_grad_()
        output = trained(inputs, targets, (1, 0, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        assert torch.isfinite(output.loss)
        assert_close(output.targets.sum(1), torch.ones(4))
        moved |= {int(row) for row in inputs.grad.flatten(1).abs().sum(1).nonzero()}
    assert moved == {0, 1, 2, 3}
    assert all(not torch.equal(value, before[key]) for key, value in trained.backbone.named_parameters())


def test_manifoldmix_of_the_images_is_mixup():
    images, targets = tiny.batch()
    for family in ("resnet", "vit"):
        manifold = model(family, "manifoldmix", layers=(0,))
        mixup = model(family, "mixup", alpha=2.0)
        for step in range(3):
            mine, its = manifold(images, targets, (1, 0, step)), mixup(images, targets, (1, 0, step))
            assert_close(mine.loss, its.loss)
            assert torch.equal(mine.logits, its.logits)
            assert torch.equal(mine.targets, its.targets)


def by_hand(network, images, layer, plan):
    """The logits of the network, cut after `layer` and put together again."""
    if network.config.model_type == "vit":
        body, hidden = network.vit.layers, network.vit.embeddings(images)
        head = nn.Sequential(network.vit.layernorm, Row(0), network.classifier)
    else:
        body, hidden = network.resnet.encoder.stages, network.resnet.embedder(images)
        head = nn.Sequential(network.resnet.pooler, network.classifier)
    for k, part in enumerate(body, 1):
        hidden = part(hidden) if network.config.model_type == "resnet" else part(hidden, None)
        if k == layer:
            own = plan.mask.value[:, 0].view(-1, *[1] * (hidden.ndim - 1))
            hidden = own * hidden + (1 - own) * hidden[plan.index[:, 1]]
    return head(hidden)


class Row(nn.Module):
    def __init__(self, row):
        super().__init__()
        self.row = row

    def forward(self, hidden):
        return hidden[:, self.row]


@pytest.mark.parametrize("family", ["resnet", "vit"])
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_manifoldmix_mixes_what_a_layer_gives(family, layer):
    trained = model(family, "manifoldmix", layers=(layer,))
    twin = copy.deepcopy(trained.backbone)
    images, targets = tiny.batch()
    plan = planned(trained, images, (1, 0, 5))
    output = trained(images, targets, (1, 0, 5))
    expected = by_hand(twin, images, layer, plan)
    assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)
    expected_loss = F.cross_entropy(expected, output.targets)
    assert_close(output.loss, expected_loss, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad(loss, net.parameters()) for loss, net in ((output.loss, trained.backbone), (expected_loss, twin))]
    for mine, its in zip(*gradients, strict=True):
        assert_close(mine, its, atol=1e-5, rtol=1e-3)


def test_manifoldmix_chooses_layers_evenly_and_alike_on_all_processes():
    chosen = [int(torch.randint(3, (), generator=MixKey(7, rank, step).step_rng())) for rank in (0, 1) for step in range(3000)]
    assert chosen[:3000] == chosen[3000:]
    counts = torch.tensor(chosen[:3000]).bincount(minlength=3)
    assert (counts - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5


def test_manifoldmix_names_layers():
    images, targets = tiny.batch()
    by_name = model("resnet", "manifoldmix", layers=("resnet.encoder.stages.1",))
    by_number = model("resnet", "manifoldmix", layers=(2,))
    assert torch.equal(by_name(images, targets, (1, 0, 0)).logits, by_number(images, targets, (1, 0, 0)).logits)
    with pytest.raises(ValueError, match="did you mean"):
        model("resnet", "manifoldmix", layers=("resnet.encoder.stage.1",))
    with pytest.raises(ValueError, match="from 0 to 4, the stages of ResNet"):
        model("resnet", "manifoldmix", layers=(0, 5))


@pytest.mark.parametrize("name", ["manifoldmix", "alignmix", "supermix"])
@pytest.mark.parametrize("sample", ["cutmix", "puzzlemix"])
def test_steps_that_mix_whole_images_refuse_masks(name, sample):
    with pytest.raises(ValueError, match=rf"{name} needs a sample policy that mixes .*whole images, got .*; use"):
        model("resnet", name, sample=sample)


def test_alignmix_mixes_aligned_features():
    trained = model("convnext", "alignmix", align_prob=1)  # no BatchNorm: images pass alone
    images, targets = tiny.batch(side=96)
    features = last_feature_map(trained.backbone, images)
    ways = set()
    for step in range(6):
        plan = planned(trained, images, (1, 0, step))
        partner, lam = plan.index[:, 1], plan.mask.value[:, 0]
        moved = transport(features, features[partner], 0.1, 20)
        output = trained(images, targets, (1, 0, step))
        found = []
        for own_places in (False, True):
            mixed = aligned_mix(features, features[partner], moved, lam, own_places).mean((2, 3))
            expected = trained.backbone.classifier(trained.backbone.convnext.layernorm(mixed))
            found.append(torch.allclose(output.logits, expected, atol=1e-5))
        assert sum(found) == 1
        ways.add(found[1])
    assert ways == {False, True}


@pytest.mark.parametrize("places", [1, 4, 49])
def test_transport_is_a_transport(places):
    own, other = torch.randn(2, 3, 8, places, 1)
    plan = transport(own, other, 1.0, 500)
    assert_close(plan.sum(1), torch.full((3, places), 1 / places))
    assert_close(plan.sum(2), torch.full((3, places), 1 / places), atol=1e-5, rtol=1e-3)
    # features that are only moved are brought back
    order = torch.randperm(places)
    plan = transport(4 * own, 4 * own[:, :, order], 0.1, 100)
    assert torch.equal(plan.argmax(1), order.expand(3, -1))


def test_aligned_patches_reach_a_class_token():
    trained = model("vit", "alignmix", align_prob=1)
    images, targets = tiny.batch()
    seen = []
    object.__setattr__(
        trained.choice.methods[0].step,
        "_aligned_output",
        lambda layout, output, *data: seen.append(output.detach().requires_grad_()) or seen[0],
    )
    trained(images, targets, (1, 0, 0)).loss.backward()
    assert (seen[0].grad.abs().sum((0, 2)) > 0).all()


def test_recursivemix_pastes_the_step_before_with_its_label_and_logits():
    trained = model("convnext", "recursivemix", alpha=1.0)
    images, targets = tiny.batch(8)
    first = trained(images[:4], targets[:4], (1, 0, 0))
    assert torch.equal(first.targets, targets[:4])  # there is nothing to paste yet
    assert_close(first.loss, F.cross_entropy(first.logits, targets[:4]))
    state = trained.states["recursivemix"]
    assert torch.equal(state.images, images[:4])

    twin = copy.deepcopy(trained)
    second = trained(images[4:], targets[4:], (1, 0, 3))
    plan = planned(twin, images[4:], (1, 0, 3), history=images[:4])
    top, bottom, left, right = plan.mask.edges[0].tolist()
    assert bottom - top > 8
    assert right - left > 8
    partner, lam = plan.index[:, 1], plan.weight[:, 0]
    mixed = images[4:].clone()
    mixed[:, :, top:bottom, left:right] = F.interpolate(images[:4][partner], (bottom - top, right - left))
    assert torch.equal(state.images, mixed)
    assert_close(lam, torch.full((4,), 1 - (bottom - top) * (right - left) / tiny.SIDE**2))
    assert_close(second.targets, lam[:, None] * targets[4:] + (1 - lam)[:, None] * targets[partner])

    features = twin.backbone.convnext(mixed, output_hidden_states=True).hidden_states[-1]
    features = twin.backbone.convnext.layernorm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    boxes = [torch.tensor([[left, top, right, bottom]], dtype=torch.float32)] * 4
    region = roi_align(features, boxes, 1, features.shape[2] / tiny.SIDE, aligned=True).flatten(1)
    expected = F.cross_entropy(twin.backbone(mixed).logits, second.targets) + 0.5 * (1 - lam[0]) * F.cross_entropy(
        twin.states["recursivemix"].fc_roi(region), first.logits[partner].detach().softmax(1)
    )
    assert_close(second.loss, expected, atol=1e-5, rtol=1e-4)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    mine = torch.autograd.grad(second.loss, parameters)
    for grad, its in zip(mine, torch.autograd.grad(expected, [p for p in twin.parameters() if p.requires_grad]), strict=True):
        assert_close(grad, its, atol=1e-5, rtol=1e-3)


def test_recursivemix_history_is_saved_and_resumed(tmp_path):
    images, targets = tiny.batch()
    trained = model("resnet", "recursivemix")
    for step in range(2):
        trained(images, targets, (1, 0, step))
    trained.save_pretrained(tmp_path)
    resumed = model("resnet", "recursivemix")
    resumed.restore(tmp_path)
    for step in (2, 3):
        mine, its = (net(images, targets, (1, 0, step)) for net in (trained, resumed))
        assert torch.equal(mine.loss, its.loss)
        assert torch.equal(mine.targets, its.targets)
    again = MixupModel.from_pretrained(tmp_path).train()
    assert len(again.states["recursivemix"].images) == 4


def test_recursivemix_history_keeps_its_size():
    trained = model("resnet", "recursivemix", alpha=1.0)
    images, targets = tiny.batch(6)
    trained(images[:4], targets[:4], (1, 0, 0))
    trained(images[4:], targets[4:], (1, 0, 3))
    state = trained.states["recursivemix"]
    assert len(state.images) == len(state.targets) == len(state.logits) == 4
    assert torch.equal(state.images[2:], images[2:4])
    assert not torch.equal(state.images[:2], images[4:])  # mixed, and so different
    trained(images, targets, (1, 0, 4)).loss.backward()
    assert len(state.images) == 4


def test_recursivemix_needs_its_images():
    with pytest.raises(ValueError, match="use 'recursivepaste'"):
        model("resnet", "recursivemix", sample="cutmix")


class Patches(nn.Module):
    """A teacher that sees another class in nearly every image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(48, 10)

    def forward(self, images):
        return 20 * self.fc(F.adaptive_avg_pool2d(images, 4).flatten(1))


def found_masks(count, **fields):
    """The images in sets of `count`, the shares, the teacher, and what was found."""
    settings = {"mask_size": 8, "lambda_s": 25.0, "sigma": 1, "max_iter": 30, "tol": 0.0, **fields}
    rng = torch.Generator().manual_seed(3)
    images, teacher = torch.randn(8, 3, 16, 16, generator=rng), Patches()
    share = torch.rand(8, count, generator=rng) + 0.3
    share = share / share.sum(1, keepdim=True)
    index = (torch.arange(8)[:, None] + torch.arange(count)) % 8
    return images[index], share, teacher, search(teacher, images, index, share, **settings)


@pytest.mark.parametrize("count", [2, 3])
def test_supermix_masks_show_the_teacher_what_was_drawn(count):
    images, share, teacher, found = found_masks(count)
    start = share[:, :, None, None].expand(-1, -1, 16, 16)
    assert_close(found.mask.sum(1), torch.ones(8, 16, 16))

    distinct = (found.soft > 0).sum(1) == count
    wanted = found.soft > 0

    def seen(mask):
        """The share of sets in which the teacher sees the classes of all images first."""
        best = teacher((mask[:, :, None] * images).sum(1)).topk(count).indices
        return wanted.gather(1, best).all(1)[distinct].double().mean()

    assert seen(found.mask) > seen(start)
    assert seen(found.mask) == found.success[distinct].double().mean() > 0.5
    assert (found.mask * (1 - found.mask)).mean() < (start * (1 - start)).mean()


def test_supermix_ends_early_and_leaves_finished_masks_alone():
    once, more = found_masks(2, tol=1.0)[3], found_masks(2, max_iter=4)[3]
    assert (once.steps, more.steps) == (1, 4)
    done = once.success
    assert 0 < done.sum() < 8
    assert torch.equal(more.mask_logits[done], once.mask_logits[done])
    assert not torch.equal(more.mask_logits[~done], once.mask_logits[~done])


def test_supermix_trains_on_masks_and_clean_images():
    images, targets = tiny.batch()
    trained = model("convnext", "supermix", max_iter=2)
    twin = copy.deepcopy(trained.backbone).eval()
    output = trained(images, targets, (1, 0, 0))
    plan = planned(trained, images, (1, 0, 0))
    found = search(lambda mixed: twin(pixel_values=mixed).logits, images, plan.index, plan.mask.value, 8, 25.0, 1, 2, 0.7)
    mixed = (found.mask[:, :, None] * images[plan.index]).sum(1)
    assert_close(output.logits, twin(pixel_values=mixed).logits)
    assert_close(output.targets, (plan.weight[:, :, None] * targets[plan.index]).sum(1))
    clean = F.cross_entropy(twin(pixel_values=images).logits, targets)
    assert_close(output.loss, F.cross_entropy(output.logits, output.targets) + clean)


@pytest.mark.parametrize(("name", "field"), [("supermix", "target"), ("attentivemix", None)])
def test_frozen_teachers_are_loaded_kept_frozen_and_used(name, field, tmp_path):
    teacher = tiny.network("cifar_resnet")
    teacher.save_pretrained(tmp_path / "teacher")
    images, targets = tiny.batch()
    fields = {"max_iter": 2, "target": "teacher"} if field else {"top_k": 3}
    trained = model("vit", name, teacher=str(tmp_path / "teacher"), **fields)
    frozen = {key: value.clone() for key, value in trained.states[name].state_dict().items()}
    assert len(frozen) == len(teacher.state_dict())
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        output = trained(images, targets, (1, 0, step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    for key, value in trained.states[name].state_dict().items():
        assert torch.equal(value, frozen[key]), key
    if name == "attentivemix":
        features = last_feature_map(teacher, images)
        plan = planned(trained, images, (1, 0, 1), features=features)
        assert_close(output.targets, (plan.weight[:, :, None] * targets[plan.index]).sum(1))
    else:
        assert (output.targets.max(1).values == 1).all()
    trained.save_pretrained(tmp_path / "run")
    resumed = MixupModel.from_pretrained(tmp_path / "run").train()
    mine, its = (net(images, targets, (1, 0, 5)) for net in (trained, resumed))
    assert_close(mine.loss, its.loss)


@pytest.mark.parametrize("name", ["saliencygrafting", "guidedmixup", "puzzlemix"])
def test_clean_images_are_trained_on_as_well(name):
    images, targets = tiny.batch()
    plain, both = (model("convnext", name, clean_lam=clean_lam) for clean_lam in (0.0, 0.5))
    one, two = (trained(images, targets, (1, 0, 0)) for trained in (plain, both))
    assert_close(two.logits, one.logits)
    clean = F.cross_entropy(plain.backbone(pixel_values=images).logits, targets)
    assert_close(two.loss, one.loss + 0.5 * clean)
    two.loss.backward()
    expected = torch.autograd.grad(one.loss + 0.5 * clean, plain.backbone.parameters())
    for mine, its in zip(both.backbone.parameters(), expected, strict=True):
        assert_close(mine.grad, its, atol=1e-6, rtol=1e-4)


def test_labels_by_saliency_for_any_policy_that_leaves_pixels_in_place():
    images, targets = tiny.batch()
    trained = model("convnext", "cutmix", label="saliencylabels")
    output = trained(images, targets, (1, 0, 1))
    saliency = input_saliency(trained.backbone, images, targets)
    weight = SaliencyLabels().weights(planned(trained, images, (1, 0, 1)), Signals(saliency=saliency))
    assert_close(output.lam, weight[:, 0])


def test_supermix_needs_a_teacher_that_can_label(tmp_path):
    with pytest.raises(ValueError, match="the target 'teacher' needs a teacher"):
        get_method("supermix", target="teacher")
    config = tiny.network("cifar_resnet").config
    config.num_labels = 7
    type(tiny.network("cifar_resnet"))(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"5 classes of the network, got .* with 7"):
        model("vit", "supermix", teacher=str(tmp_path), target="teacher")


@pytest.mark.parametrize("name", OWN_STEPS)
def test_steps_survive_gradient_checkpointing(name):
    images, targets = tiny.batch()
    plain, checkpointed = (model("vit", name, **OWN_STEPS[name]) for _ in range(2))
    backbone = checkpointed.backbone
    getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)()  # the name depends on the release
    for step in range(4):
        for trained in (plain, checkpointed):
            trained.zero_grad()
            trained(images, targets, (1, 0, step)).loss.backward()
        for mine, its in zip(plain.parameters(), checkpointed.parameters(), strict=True):
            assert torch.equal(mine.grad, its.grad) if mine.grad is not None else its.grad is None


@pytest.mark.parametrize("name", OWN_STEPS)
def test_armed_steps_leave_other_passes_alone(name):
    """After a step, and before its backward pass, the network is a plain one: for evaluation, and for another method."""
    network = tiny.network("resnet")
    plain = copy.deepcopy(network)
    trained = MixupModel(network, [get_method(name, **OWN_STEPS[name]), "cutmix"], [0.5, 0.5]).train()
    images, targets = tiny.batch()
    steps = [step for step in range(40) if trained.method_for(MixKey(1, 0, step)).name == name]
    for step in steps[:6]:
        loss = trained(images, targets, (1, 0, step)).loss
        plain.load_state_dict(network.state_dict())
        trained.eval()
        assert torch.equal(network(pixel_values=images).logits, plain.eval()(pixel_values=images).logits)
        trained.train()
        loss.backward()
    other = next(step for step in range(40) if trained.method_for(MixKey(1, 0, step)).name == "cutmix")
    plain.load_state_dict(network.state_dict())
    mixed = blend(get_method("cutmix").sample.plan(images.shape, MixKey(1, 0, other).own_rng(), None), images)
    assert torch.equal(trained(images, targets, (1, 0, other)).logits, plain.train()(pixel_values=mixed).logits)


@pytest.mark.parametrize("share_fc", [True, False])
def test_recursivemix_trains_weights_of_another_precision(share_fc):
    trained = model("resnet", "recursivemix", share_fc=share_fc).double()
    images, targets = tiny.batch()
    for step in range(2):
        output = trained(images.double(), targets, (1, 0, step))
        output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert torch.isfinite(output.loss)
