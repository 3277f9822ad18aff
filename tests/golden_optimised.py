"""Checks of PuzzleMix, its saliency and Co-Mixup against the authors' code. A case is a dict of tensors, named as there."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.testing import assert_close

from hf_mixup.plan import blend
from hf_mixup.policies.puzzlemix import label_costs, mask_plan, perturbed, terms, transport
from hf_mixup.signals.saliency import clean_saliency, input_saliency
from hf_mixup.solvers import grid_energy, solve_grid


def puzzlemix(case):
    images, saliency, partner = case["img"], case["saliency"], case["perm"].long()
    mean, std = (tuple(case[key].flatten().tolist()) for key in ("mean", "std"))
    count, n_labels, t_size = (int(case[key]) for key in ("block_num", "n_labels", "t_size"))
    beta, gamma, eta, t_eps = (float(case[key]) for key in ("beta", "gamma", "eta", "t_eps"))

    own_hidden, partner_hidden, down, right = terms(images, saliency, partner, count, beta, gamma, int(case["neigh_size"]), std)
    assert_close(own_hidden, case["unary_a"], atol=1e-6, rtol=0)
    assert_close(partner_hidden, case["unary_b"], atol=1e-6, rtol=0)
    assert_close(down, case["pw_v"] + case["beta_norm"].float(), atol=1e-8, rtol=0)
    assert_close(right, case["pw_h"] + case["beta_norm"].float(), atol=1e-8, rtol=0)

    # the solver on our costs and on the authors' integer ones, both judged on the latter
    integer = [case[key].double() for key in ("unary_int", "w_v_int", "w_h_int")]
    costs = label_costs(own_hidden, partner_hidden, case["alpha"].expand(len(images)), n_labels, eta)
    assert_close(costs.double() * 1000 * count**2, integer[0], atol=1.5, rtol=1e-4)
    for problem in ((costs, down, right), integer):
        for iterations in (None, 150):
            energy = grid_energy(*integer, solve_grid(*(term.float() for term in problem), iterations))
            official, exact = case["energy_ref"], case["energy_exact"]
            assert (energy <= official + 2e-3 * official.abs()).all()
            assert energy.mean() <= official.mean() + 1e-4 * official.mean().abs()
            assert (energy >= exact - 1e-6 * exact.abs()).all()
            if iterations:
                assert (energy <= exact + 1e-3 * exact.abs()).all()

    # the mixing, given the authors' mask
    own = other = None
    if "noise" in case:
        adversarial = perturbed(images, case["noise"], mean, std)
        own, other = (adversarial if hit else None for hit in case["adv_mask"].tolist())
    plain = mask_plan(images, partner, case["mask_ref"], saliency, None, own=own, other=other)
    assert_close(plain.weight[:, 0], case["lam"], atol=1e-6, rtol=0)
    assert_close(blend(plain, images), case["mixed_no_transport"], atol=1e-6, rtol=0)
    for visible, evidence, reference in ((f"t_mask{i}", f"t_sal{i}", case[f"plan{i}"]) for i in (1, 2)):
        shown = case[visible] > 0
        source = transport(shown, case[evidence], t_eps)
        shown = shown.flatten(1)
        assert torch.equal(source[shown], reference.long().argmax(1)[shown])
    moved = mask_plan(images, partner, case["mask_ref"], saliency, t_eps, t_size, own, other)
    assert_close(blend(moved, images), case["mixed"], atol=1e-6, rtol=0)


class _Network(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )
        self.layers.load_state_dict({f"{layer}.{part}": case[f"{layer}_{part}"] for layer in (0, 2, 6) for part in ("weight", "bias")})

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layers(pixel_values))


def puzzlemix_saliency(case):
    network, images = _Network(case), case["x"]
    targets = nn.functional.one_hot(case["y"].long(), 10).float()
    saliency = input_saliency(network, images, targets)
    assert all(parameter.grad is None for parameter in network.parameters())
    # the authors' losses: the mean over the batch, and with clean_lam = 1 a BCE's 2 / num_labels of it; we take the sum
    assert_close(saliency / len(images), case["sal_clean0"], rtol=1e-4, atol=1e-8)
    kept, loss = clean_saliency(network, images, targets)
    assert_close(kept * 0.2 / len(images), case["sal_clean1"], rtol=1e-4, atol=1e-8)
    assert_close(loss.double(), case["loss_clean0"], rtol=1e-4, atol=0)
    assert_close(0.2 * loss.double(), case["loss_clean1"], rtol=1e-4, atol=0)
    gradient = torch.autograd.grad(loss, network.layers[6].weight)[0]
    assert_close(gradient, case["grad_fc_w_clean0"], rtol=1e-4, atol=1e-6)
    assert_close(0.2 * gradient, case["grad_fc_w_clean1"], rtol=1e-4, atol=1e-6)


CHECKS = {"puzzlemix": puzzlemix, "puzzlemix_saliency": puzzlemix_saliency}
