"""Methods that change hidden states in the pass of the images: MoEx, MixStyle, NFM, PatchUp; and the policy of RICAP."""

import pytest
import torch
from torch.testing import assert_close

import tiny
from hf_mixup import MixupModel, get_method
from hf_mixup.core.policy import Signals
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.policies import RICAP
from hf_mixup.steps.hidden import changed_output
from hf_mixup.steps.patchup import block_chance, holes
from small import resnet, vit
from test_situations import batch, keys, stepped, still

KEY = MixKey(3, 0, 5, 0, 0, 100)
HIDDEN = ("mixstyle", "moex", "nfm", "patchup")


def outputs(name, network, key=KEY, images=None, **fields):
    own, labels = batch()
    torch.manual_seed(0)
    return MixupModel(still(network), get_method(name, **fields)).train()(own if images is None else images, labels, key)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("network", [resnet, vit])
def test_nfm_without_noise_is_manifold_mixup(network, layer):
    plain = outputs("manifoldmix", network(), layers=(layer,), alpha=1.0)
    quiet = outputs("nfm", network(), layers=(layer,), additive=0.0, multiplicative=0.0)
    noisy = outputs("nfm", network(), layers=(layer,))
    assert_close(quiet.logits, plain.logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(quiet.targets, plain.targets)
    assert torch.equal(noisy.targets, plain.targets)
    assert not torch.allclose(noisy.logits, plain.logits, atol=1e-3)


@pytest.mark.parametrize("network", [resnet, vit])
def test_moex_labels_by_its_share_and_changes_the_layer(network):
    clean, out = outputs("vanilla", network()), outputs("moex", network(), lam=0.7)
    assert_close(out.lam, torch.full((6,), 0.7))
    assert_close(out.targets.amax(1).min(), torch.tensor(0.7))
    assert not torch.allclose(out.logits, clean.logits, atol=1e-4)
    # the moments of an equal image change nothing
    images, _ = batch()
    same = images[:1].expand(6, -1, -1, -1)
    assert_close(outputs("moex", network(), images=same).logits, outputs("vanilla", network(), images=same).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("network", [resnet, vit])
def test_mixstyle_keeps_labels_and_has_a_coin_for_every_layer(network):
    _, labels = batch()
    clean = outputs("vanilla", network())
    off, on = (outputs("mixstyle", network(), probability=probability) for probability in (0.0, 1.0))
    assert torch.equal(off.logits, clean.logits)
    assert not torch.allclose(on.logits, clean.logits, atol=1e-4)
    for out in (off, on):
        assert torch.equal(out.targets, torch.nn.functional.one_hot(labels, 4).float())
        assert out.lam.eq(1).all()
    step = get_method("mixstyle").step
    parts = get_method("mixstyle").parts
    chosen = []
    for key in keys(200):
        plan = parts.sample.plan(torch.Size((6, 3, 16, 16)), key.own_rng(), Signals())
        chosen.append(tuple(change.place for change in step.changes(parts, plan, key, torch.Size((6, 3, 16, 16)))))
    assert {(), (0,), (1,), (0, 1)} == set(chosen)
    assert 60 < sum(len(places) for places in chosen) / 2 < 140


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_patchup_labels_by_what_stayed(hard, layer):
    """A network of means tells the share: every image is constant, and its value is its class."""
    network = tiny.network("cifar_resnet") if layer else resnet()
    images, targets = tiny.batch(6) if layer else (batch()[0], None)
    labels = targets.argmax(1) if layer else batch()[1]
    model = MixupModel(still(network), get_method("patchup", layers=(layer,), hard=hard)).train()
    shares = torch.cat([model(images, labels, key).lam for key in keys(6)])
    assert (shares < 1).any()
    assert (shares >= 0).all()
    assert len(shares.unique()) > 6  # blocks of its own for every image


def test_hard_patchup_of_everything_is_the_partner():
    """Blocks that cover whole maps: the mixture is the partner, in a network without class token, and so are its labels."""
    images, labels = batch()
    torch.manual_seed(0)
    model = MixupModel(still(resnet()), get_method("patchup", layers=(1,), hard=True, gamma=1.0, block=1)).train()
    out = model(images, labels, KEY)
    partner = get_method("patchup").sample.plan(images.shape, KEY.own_rng(), Signals()).index[:, 1]
    clean = outputs("vanilla", resnet())
    assert_close(out.logits, clean.logits[partner], atol=1e-5, rtol=1e-4)
    assert torch.equal(out.targets, clean.targets[partner])
    assert out.lam.eq(0).all()


def test_blocks_are_squares_in_the_wanted_share():
    centres = torch.zeros(1, 1, 9, 9)
    centres[0, 0, 4, 2] = 1
    made = holes(centres, 5)[0, 0]
    assert made.sum() == 25
    assert made[2:7, 0:5].all()
    # of one block at a time, values are changed about as often as gamma says
    chance = block_chance(0.1, 3, (32, 32))
    share = holes((torch.rand(50, 4, 32, 32, generator=keyed(1)) < chance).float(), 3).mean()
    assert share == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", HIDDEN)
def test_changes_are_drawn_from_the_key_and_reach_every_image(name):
    one, same, other = (
        outputs(name, resnet(), key, **({"probability": 1.0} if name == "mixstyle" else {})) for key in (KEY, KEY, KEY._replace(step=6))
    )
    assert torch.equal(one.logits, same.logits)
    assert not torch.equal(one.logits, other.logits)
    processes = outputs(name, resnet(), KEY._replace(rank=1), **({"probability": 1.0} if name == "mixstyle" else {}))
    assert not torch.equal(one.logits, processes.logits)


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("family", ["vit", "deit", "swin", "convnext", "timm_vit", "timm_swin", "timm_convnext", "efficientnet", "pvt_v2"])
def test_every_family_takes_them_with_gradients(name, family):
    images, targets = tiny.batch()
    model = MixupModel(still(tiny.network(family)), get_method(name, **({"probability": 1.0} if name == "mixstyle" else {}))).train()
    out, found = stepped(model, images, targets.argmax(1), KEY)
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_tokens_before_the_patches_stay_where_they_have_no_style():
    network = tiny.network("deit")
    model = MixupModel(network, get_method("mixstyle", layers=(1,), probability=1.0)).train()
    state, hidden = model.states["mixstyle"], torch.randn(4, 18, 16)
    parts = get_method("mixstyle", layers=(1,), probability=1.0)
    plan = parts.sample.plan(torch.Size((4, 3, 64, 64)), KEY.own_rng(), Signals())
    (change,) = parts.step.changes(parts.parts, plan, KEY, torch.Size((4, 3, 64, 64)))
    out = changed_output(state.layout, (hidden,), (64, 64), change)[0]
    assert torch.equal(out[:, :2], hidden[:, :2])
    assert not torch.allclose(out[:, 2:], hidden[:, 2:])


def test_settings_are_checked():
    for name, fields in (
        ("moex", {"lam": 1.5}), ("moex", {"eps": 0.0}), ("mixstyle", {"probability": 2.0}), ("nfm", {"additive": -1.0}), ("patchup", {"block": 4}),
        ("patchup", {"gamma": 2.0}), ("ricap", {"alpha": 0.0}), ("nfm", {"layers": (-1,)}), ("moex", {"layers": ()}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            get_method(name, **fields)
    for name in HIDDEN:
        with pytest.raises(ValueError, match="layers must be from 0 to 2"):
            MixupModel(resnet(), get_method(name, layers=(7,)))
        with pytest.raises(ValueError, match="needs a sample policy that mixes pairs of whole images, got CutMix"):
            MixupModel(resnet(), get_method(name, sample={"name": "cutmix"}))


# -- RICAP ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sample", "batch"])
def test_ricap_patches_are_crops_of_their_sources(mode):
    """Images whose pixels tell image, row and column: every pixel of a patch comes from its image, at one distance for the whole patch."""
    batch_size, height, width = 6, 9, 13
    rows, cols = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = torch.stack([torch.stack([torch.full_like(rows, i), rows, cols]) for i in range(batch_size)]).float()
    corners = set()
    for key in range(20):
        plan = RICAP(mode=mode).plan(images.shape, keyed(key), Signals(images=images))
        patched, mask = plan.sources[0], plan.dense_mask((height, width)).bool()
        assert_close(plan.weight, mask.float().mean((2, 3)))
        for i in range(batch_size):
            for k in range(4):
                if mask[i, k].any():
                    inside = patched[i][:, mask[i, k]]
                    assert inside[0].eq(plan.index[i, k]).all()
                    assert (inside[1] - rows[mask[i, k]]).unique().numel() == 1
                    assert (inside[2] - cols[mask[i, k]]).unique().numel() == 1
            corners.add((key, int(mask[i, 0].sum()), int(mask[i, 0].any(1).sum())))
    assert len({corner[1:] for corner in corners}) > 10
    assert (max(sum(1 for corner in corners if corner[0] == key) for key in range(20)) == 1) == (mode == "batch")


def test_ricap_crops_come_from_anywhere():
    images = torch.arange(8.0).expand(4, 1, 8, 8).clone()
    starts = set()
    for key in range(100):
        plan = RICAP(alpha=5.0).plan(images.shape, keyed(key), Signals(images=images))
        starts.add(int(plan.sources[0][0, 0, 0, 0]))
    assert starts >= {0, 1, 2, 3}
