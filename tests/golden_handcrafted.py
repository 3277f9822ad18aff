"""Checks of the hand-crafted methods against reference outputs. A case is a dict of tensors, named as in the reference."""

import torch
from torch.testing import assert_close

from hf_mixup.geometry import box_plan, centred_boxes
from hf_mixup.plan import MixPlan, Share, blend


def mixup(case):
    batch = len(case["x"])
    lam = case["lam"].double().reshape(-1).expand(batch)
    weight = torch.stack([lam, 1 - lam], 1).float()
    plan = MixPlan.pair(case["perm"].long(), Share(weight), lam)
    assert_close(blend(plan, case["x"]), case["out"], atol=1e-5, rtol=0)
    assert_close(case["y"].long()[plan.index[:, 1]], case["y_b"].long())


def cutmix(case):
    size = tuple(case["x"].shape[2:])
    side = (1 - case["lam"].double()).sqrt().reshape(1)
    edges = centred_boxes(side, case["c_row"].long().reshape(1), case["c_col"].long().reshape(1), size)
    plan = box_plan(case["perm"].long(), edges.expand(len(case["x"]), -1), size)
    assert_close(plan.dense_mask(size)[0, 1], case["mask_paste"].float().reshape(size))
    assert_close(plan.weight[:, 0], case["lam_adj"].float().expand(len(case["x"])), atol=1e-6, rtol=0)
    assert torch.equal(blend(plan, case["x"]), case["out"])


CHECKS = {"mixup": mixup, "cutmix": cutmix}
