"""Checks of PuzzleMix and Co-Mixup against the authors' code. A case is a dict of tensors, named as there."""

import torch
from torch.nn.functional import one_hot
from torch.testing import assert_close

from hf_mixup.core.geometry import pooled_evidence
from hf_mixup.core.plan import blend, mix_targets
from hf_mixup.core.solvers import grid_energy, solve_grid
from hf_mixup.policies.comixup import compatibility, objective, peaks, shares_plan, solve_parts, unary
from hf_mixup.policies.puzzlemix import label_costs, mask_plan, perturbed, terms, transport


def puzzlemix(case):
    images, saliency, partner = case["img"], case["saliency"], case["perm"].long()
    mean, std = (tuple(case[key].flatten().tolist()) for key in ("mean", "std"))
    count, n_labels, t_size = (int(case[key]) for key in ("block_num", "n_labels", "t_size"))
    beta, gamma, eta, t_eps = (float(case[key]) for key in ("beta", "gamma", "eta", "t_eps"))

    own_hidden, partner_hidden, down, right = terms(images, saliency, partner, (count, count), beta, gamma, int(case["neigh_size"]), std)
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


def comixup(case):
    cost, compat, start = case["cost"].flatten(1)[None], case["A"][None], case["idx_init"].long().flatten(1)[None]
    count, grid = cost.shape[1], tuple(case["cost"].shape[1:])
    beta, gamma, thres, omega = (float(case[key]) for key in ("beta", "gamma", "thres", "omega"))
    there, members = torch.ones(1, count, dtype=torch.bool), torch.arange(count)[None]

    evidence, place = pooled_evidence(case["saliency"], grid), peaks(case["saliency"], 1)
    assert_close(-evidence, case["cost_before_prior"], atol=1e-6, rtol=0)
    assert_close(unary(evidence[None], case["alpha_prior"][None], float(case["eta"])), cost, atol=1e-6, rtol=0)
    assert_close((place[:, None] - place).abs().sum(2).float(), case["A_dist"], atol=1e-6, rtol=0)
    assert_close(compatibility(place[None], there, omega), compat, atol=1e-6, rtol=0)

    # the authors' result: what it costs, and the mixing it means
    official = case["mask_onehot"].flatten(1, 2)[None]
    first = one_hot(start, count).float()
    for shares, limit, key in (
        (official, None, "energy"),
        (official, thres, "energy_thres"),
        (first, None, "energy_init"),
        (first, thres, "energy_init_thres"),
    ):
        assert_close(objective(shares, cost, grid, beta, gamma, limit)[0].double(), case[key], rtol=1e-5, atol=1e-5)
    plan = shares_plan(official, members, grid, tuple(case["saliency"].shape[1:]))
    assert torch.equal(plan.index[:, 0], members[0])
    assert_close(mix_targets(plan, case["target"]), case["mixed_target"], atol=1e-6, rtol=0)
    if "img" in case:
        assert_close(blend(plan, case["img"]), case["mixed"], atol=1e-6, rtol=0)

    # ours, from the same start
    settings = {"beta": beta, "gamma": gamma, "thres": thres, "thres_type": str(case["thres_type"]), "niter": int(case["niter"])}
    shares = solve_parts(cost, compat, start, there, grid, **settings)
    assert objective(shares, cost, grid, beta, gamma)[0] < case["energy_init"]
    assert set(shares.unique().tolist()) <= {0.0, 0.5, 1.0}
    assert_close(shares.sum(3), torch.ones(1, count, grid[0] * grid[1]))


CHECKS = {"puzzlemix": puzzlemix, "comixup": comixup}
