"""Common losses, with their labels and metrics: class weights, focal, several labels, several heads, regression."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_mixup import METHODS, MixupCallback, MixupCollator, MixupLoss, MixupModel, MixupTrainer
from hf_mixup.core.losses import BCE, MSE, CrossEntropy, Focal, MultiHead
from hf_mixup.core.plan import onehot
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.evaluation.metrics import TrainerMetrics, mixed_accuracy, multi_label_metrics, training_accuracy
from refusals import refuses
from small import Images, arguments, losses, trainer, vit
from test_collator import plain_arguments


def soft(rows=6, classes=4):
    return torch.softmax(torch.randn(rows, classes), 1)


def labelled(label, count=24):
    """Random images with the label that a function gives a row."""
    pixels = Images(count).pixels
    return [{"pixel_values": pixels[row], "labels": label(row)} for row in range(count)]


def test_class_weights_are_those_of_torch():
    logits, targets, weight = torch.randn(6, 4), soft(), (1.0, 0.5, 3.0, 0.0)
    expected = F.cross_entropy(logits, targets, weight=torch.tensor(weight), label_smoothing=0.1)
    assert_close(CrossEntropy(0.1, weight)(logits, targets).mean(), expected)
    with refuses("weight needs one number for each of the 4 classes, got 3"):
        CrossEntropy(weight=(1.0, 2.0, 3.0))(logits, targets)
    for bad in ((), (1, -1), (0, 0), "ab"):
        with refuses("weight must be a tuple of numbers of at least 0"):
            CrossEntropy(weight=bad)


def test_class_weights_taken_first_in_evaluation_serve_in_training():
    loss, logits = CrossEntropy(weight=(0.25, 1.75)), torch.randn(3, 2, requires_grad=True)
    with torch.inference_mode():
        loss(torch.randn(3, 2), onehot(torch.tensor([0, 1, 0]), 2))
    loss(logits, onehot(torch.tensor([0, 1, 0]), 2)).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_focal_is_the_paper_formula():
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    assert_close(Focal(2.0)(logits, onehot(labels, 4)), (-((1 - p) ** 2) * p.log()).float())
    assert_close(Focal(0.0)(logits, soft_ := soft()), CrossEntropy()(logits, soft_))
    sure = torch.tensor([[200.0, -200.0]], requires_grad=True)
    Focal(0.5)(sure, torch.tensor([[1.0, 0.0]])).sum().backward()
    assert torch.isfinite(sure.grad).all()


def test_weights_of_bce_are_those_of_torch():
    logits, targets = torch.randn(6, 3), torch.rand(6, 3)
    given = {"weight": torch.tensor([1.0, 2.0, 0.5]), "pos_weight": torch.tensor([4.0, 1.0, 0.1])}
    expected = F.binary_cross_entropy_with_logits(logits, targets, **given)
    assert_close(BCE(weight=(1.0, 2.0, 0.5), pos_weight=(4.0, 1.0, 0.1))(logits, targets).mean(), expected)


def test_several_heads_have_a_cross_entropy_each():
    loss, logits, labels = MultiHead((2, 3), weight=(1.0, 0.5)), torch.randn(4, 5), torch.tensor([[0, 2], [1, 0], [1, 1], [0, 1]])
    expected = F.cross_entropy(logits[:, :2], labels[:, 0]) + 0.5 * F.cross_entropy(logits[:, 2:], labels[:, 1])
    loss.check(labels, 4, 5)
    assert_close(loss(logits, loss.targets(labels, 5)).mean(), expected)
    for bad, message in [
        (torch.tensor([[0, 3]] * 4), r"labels must be from 0 to 2, got 3 at row 0 of the batch, column 1"),
        (torch.tensor([0, 1, 0, 1]), r"labels must be class numbers \(B, 2\), one for each head"),
        (torch.zeros(4, 3, dtype=torch.int64), "one column for each of the 2 heads, got 3"),
    ]:
        with refuses(message):
            loss.check(bad, 4, 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
def test_class_numbers_of_every_dtype(dtype):
    labels, images = torch.tensor([0, 1, 1, 0]).to(dtype), torch.randn(4, 3, 16, 16)
    wide = labels.long()
    model = MixupModel(vit(), "cutmix").train()
    assert_close(model(images, labels, MixKey(0, 0, 0)).targets, model(images, wide, MixKey(0, 0, 0)).targets)
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    assert_close(MixupCollator("vanilla", num_labels=4)(rows)["labels"], onehot(wide, 4))
    logits = torch.randn(4, 4)
    assert_close(MixupLoss()(logits, labels), F.cross_entropy(logits, wide))


CASES = {
    "mse": (1, lambda row: float(row), "mse", {"mse", "mae"}),
    "mse of integers": (1, lambda row: row, "mse", {"mse", "mae"}),
    "mse of two": (2, lambda row: [float(row), 1.0], "mse", {"mse", "mae"}),
    "bce": (3, lambda row: [1.0, float(row % 2), 0.0], "bce", {"mAP", "exact_match", "f1"}),
    "bce of integers": (3, lambda row: [1, row % 2, 0], "bce", {"mAP", "exact_match", "f1"}),
    "one yes or no": (1, lambda row: row % 2, "bce", {"mAP", "exact_match", "f1"}),
    "heads": (5, lambda row: [row % 2, row % 3], {"name": "multihead", "classes": [2, 3]}, {"accuracy", "accuracy_0", "accuracy_1", "exact_match"}),
    "focal": (4, lambda row: row % 4, '{"name": "focal", "weight": [1, 1, 5, 1]}', {"accuracy", "top1", "top5"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_trains_measures_saves_and_loads(tmp_path, case):
    num_labels, label, loss, measures = CASES[case]
    run = trainer(tmp_path, vit(num_labels=num_labels), labelled(label), labelled(label, 10), loss=loss, max_steps=2, logging_steps=1)
    run.train()
    found = run.evaluate()
    assert {f"eval_{name}" for name in measures} <= found.keys()
    assert np.isfinite(found["eval_loss"])
    assert ("train_accuracy" in run.state.log_history[0]) == ("mse" not in measures)
    run.save_model(tmp_path / "out")
    assert MixupModel.from_pretrained(tmp_path / "out").choice == run.mixup_model.choice


def test_regression_mixes_its_numbers_and_reports_the_squared_error(tmp_path):
    data = labelled(float, 8)
    model = MixupModel(vit(num_labels=1), "mixup", loss="mse").train()
    images, labels = Images(8).pixels, torch.arange(8.0)
    out = model(images, labels, MixKey(0, 0, 0))
    partner = model.choice.methods[0].sample.plan(images.shape, MixKey(0, 0, 0).own_rng(), {})
    assert_close(out.targets[:, 0], (partner.weight * labels[partner.index]).sum(1))
    assert_close(out.losses, (out.logits - out.targets).square()[:, 0])
    with torch.no_grad():
        logits = model.eval()(images).logits
    assert model(images, labels).loss.item() == pytest.approx(F.mse_loss(logits[:, 0], labels).item(), rel=1e-6)
    with refuses(r"labels must be finite, got .* at row \d"):
        trainer(
            tmp_path, vit(num_labels=1), [{**e, "labels": float("nan") if i == 1 else 0.0} for i, e in enumerate(data)], loss="mse"
        ).train()
    with refuses("works with methods that mix by images only, got 'puzzlemix'"):
        trainer(tmp_path, vit(num_labels=1), data, loss="mse", mix=["puzzlemix"])
    with refuses("CrossEntropy needs at least 2 outputs, got num_labels=1"):
        trainer(tmp_path, vit(num_labels=1), data)


@pytest.mark.parametrize(("metric", "greater"), [("mse", False), ("eval_mae", False), ("eval_loss", False), ("top1", True)])
def test_the_best_model_of_a_regression_has_the_least_error(tmp_path, metric, greater):
    assert arguments(tmp_path, metric_for_best_model=metric).greater_is_better is greater
    assert arguments(tmp_path, metric_for_best_model=metric, greater_is_better=not greater).greater_is_better is not greater


def test_regression_in_a_stock_trainer(tmp_path):
    seen = []
    loss = MixupLoss(loss=MSE())

    def watched(outputs, labels, num_items_in_batch=None):
        seen.append((torch.is_grad_enabled(), tuple(labels.shape)))
        return loss(outputs, labels, num_items_in_batch)

    run = Trainer(
        vit(num_labels=1), plain_arguments(tmp_path, max_steps=2), train_dataset=labelled(float), eval_dataset=labelled(float, 8),
        compute_loss_func=watched, callbacks=[MixupCallback(MixupCollator("mixup"))],
    )  # fmt: skip
    run.train()
    run.evaluate()
    assert set(seen) == {(True, (8, 1)), (False, (8,))}


def test_several_label_columns_by_name(tmp_path):
    data = [
        {"pixel_values": image, "family": row % 2, "genus": row % 3, "file": f"{row}.png"}
        for row, image in enumerate(Images(16).pixels)
    ]  # fmt: skip
    changes = {"loss": {"name": "multihead", "classes": [2, 3]}, "label_names": ["family", "genus"], "max_steps": 2}
    run = trainer(tmp_path, vit(num_labels=5), data, data[:6], **changes)
    run.train()
    assert run.predict(data[:6]).label_ids.tolist() == [[row % 2, row % 3] for row in range(6)]


@pytest.mark.parametrize("names", [["genuss"], ["family", "genuss"]])
def test_names_of_labels_that_are_not_there_are_refused(tmp_path, names):
    """Otherwise the column `label` is trained in their place."""
    data = [{"pixel_values": image, "label": 0, "family": row % 2, "genus": row % 3} for row, image in enumerate(Images(8).pixels)]
    run = trainer(tmp_path, vit(num_labels=3), data, data, label_names=names, max_steps=1)
    for act in (run.train, run.evaluate):
        with refuses("label_names must be columns of the data, got 'genuss'"):
            act()
    assert run.predict([{"pixel_values": row["pixel_values"]} for row in data]).label_ids is None


@pytest.mark.parametrize("stock", [True, False])
def test_a_mixup_collator_does_not_read_label_names(tmp_path, stock):
    """Otherwise `label` is trained, and `genus` evaluated."""
    data = [{"pixel_values": image, "label": 0, "genus": row % 3} for row, image in enumerate(Images(8).pixels)]
    collator = MixupCollator("mixup", num_labels=3)
    with refuses(r"label_names must be left out with a MixupCollator, which reads 'labels' or 'label', got \['genus'\]"):
        if stock:
            args = TrainingArguments(tmp_path, max_steps=1, label_names=["genus"], report_to="none", use_cpu=True)
            Trainer(vit(num_labels=3), args, None, data, compute_loss_func=MixupLoss(), callbacks=[MixupCallback(collator)]).train()
        else:
            trainer(tmp_path, vit(num_labels=3), data, data_collator=collator, label_names=["genus"], max_steps=1)


def test_metrics_of_several_labels_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.integers(-3, 4, (50, 4)).astype(np.float32) + 0.5
    wanted = rng.random((50, 4)) < 0.4
    found = multi_label_metrics(scores, wanted.astype(np.float32))
    assert found["mAP"] == pytest.approx(average_precision_score(wanted, scores, average="macro"))
    assert found["f1"] == pytest.approx(f1_score(wanted, scores > 0, average="micro"))
    assert found["exact_match"] == (wanted == (scores > 0)).all(1).mean()
    perfect = multi_label_metrics(np.where(wanted, 5.0, -5.0), wanted.astype(np.float32))
    assert perfect == {"mAP": 1, "exact_match": 1, "f1": 1}


def test_metrics_of_batches_lists_and_chosen_classes_are_those_of_the_whole():
    scores, references = np.random.default_rng(0).normal(size=(20, 7)).astype(np.float32), np.arange(20) % 7
    whole = TrainerMetrics()(EvalPrediction(scores, references))
    assert whole["accuracy"] == whole["top1"] == (scores.argmax(1) == references).mean()
    by_batch = TrainerMetrics()
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        result = by_batch(EvalPrediction(torch.from_numpy(scores[part]), torch.from_numpy(references[part])), compute_result=start == 16)
        assert (result == {}) == (start < 16)
    assert result == whole
    lists = EvalPrediction([scores[:8], scores[8:]], [references[:8], references[8:]])
    assert TrainerMetrics()(lists) == whole
    assert TrainerMetrics()(EvalPrediction(scores.argmax(1), references)) == {"accuracy": whole["top1"], "top1": whole["top1"]}


@pytest.mark.parametrize("changes", [{"batch_eval_metrics": True}, {"eval_do_concat_batches": False}], ids=str)
def test_the_trainer_measures_the_same_in_every_way(tmp_path, changes):
    evaluation = Images(20, seed=1)
    expected = trainer(tmp_path, evaluation=evaluation).evaluate()
    found = trainer(tmp_path, evaluation=evaluation, per_device_eval_batch_size=8, **changes).evaluate()
    assert {k: found[k] for k in ("eval_accuracy", "eval_top1", "eval_top5")} == {
        k: expected[k] for k in ("eval_accuracy", "eval_top1", "eval_top5")
    }


def test_chosen_classes_save_memory(tmp_path):
    run = MixupTrainer(
        vit(), arguments(tmp_path), eval_dataset=Images(12), preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)
    )
    assert run.evaluate()["eval_accuracy"] == trainer(tmp_path, evaluation=Images(12)).evaluate()["eval_accuracy"]


def test_training_accuracy_fits_the_loss():
    several, one = torch.tensor([[1.0, 0, 1], [0, 1, 1], [0, 0, 0]]), torch.tensor([[1.0], [0.0]])
    assert_close(training_accuracy(BCE(), several * 8 - 4, several, several=True), torch.ones(3))
    assert_close(training_accuracy(BCE(), one * -8 + 4, one), torch.zeros(2))
    assert training_accuracy(MSE(), one, one) is None
    heads = MultiHead((2, 3))
    targets = heads.targets(torch.tensor([[1, 2]]), 5)
    assert_close(training_accuracy(heads, targets, targets), torch.ones(1))
    assert_close(training_accuracy(heads, targets.flip(1), targets), torch.zeros(1))


def test_accuracy_of_two_equal_halves_has_no_order():
    targets = torch.tensor([[0.5, 0.5, 0.0]])
    assert_close(mixed_accuracy(torch.tensor([[2.0, 1.0, 0.0]]), targets), torch.ones(1))
    assert_close(mixed_accuracy(torch.tensor([[1.0, 2.0, 0.0]]), targets), torch.ones(1))
    assert_close(mixed_accuracy(torch.tensor([[0.0, 1.0, 2.0]]), targets), torch.tensor([0.5]))


@pytest.mark.parametrize(("loss", "label"), [(BCE(), lambda r: [1.0, float(r % 2), 0, 0]), (CrossEntropy(), lambda r: [0.25 * (r % 5), 1 - 0.25 * (r % 5), 0, 0])], ids=["bce", "ce"])  # fmt: skip
def test_honest_soft_labels_of_an_evaluation_are_no_fault(tmp_path, recwarn, loss, label):
    run = Trainer(
        vit(), plain_arguments(tmp_path, max_steps=2), train_dataset=labelled(label), eval_dataset=labelled(label, 8),
        compute_loss_func=MixupLoss(loss=loss), callbacks=[MixupCallback(MixupCollator("mixup", num_labels=4))],
    )  # fmt: skip
    run.train()
    run.evaluate()
    assert not [w for w in recwarn if "MixupCallback" in str(w.message)]


def test_class_weights_reach_the_gradient(tmp_path):
    plain, weighted = (trainer(tmp_path, mix=["cutmix"], loss=loss, max_steps=2, logging_steps=1) for loss in (None, {"name": "crossentropy", "weight": [5, 1, 1, 1]}))  # fmt: skip
    plain.train()
    weighted.train()
    assert losses(plain) != losses(weighted)


def test_bce_smooths_the_union_of_summed_labels():
    """SpliceMix sums labels: three images of a class are one label."""
    logits, union = torch.randn(2, 4), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    summed = union * torch.tensor([3.0, 2, 1, 1])
    for loss in (BCE(), BCE(smoothing=0.1), BCE(target_threshold=0.2), BCE(pos_weight=(1.0, 2.0, 3.0, 1.0), smoothing=0.3)):
        assert torch.equal(loss(logits, summed), loss(logits, union))


def test_a_plain_call_smooths_the_labels_of_each_head():
    labels = torch.cat([torch.eye(2)[[0, 1, 0, 1]], torch.eye(3)[[0, 1, 2, 0]]], 1)
    method = METHODS["mixup"].replaced(loss=MultiHead((2, 3), smoothing=0.1))
    images = torch.randn(4, 3, 8, 8)
    targets = method(images, labels, 5, keyed(1))[1]
    plain = METHODS["mixup"](images, labels, 5, keyed(1))[1]
    assert_close(targets, 0.9 * plain + 0.1 / torch.tensor([2.0, 2, 3, 3, 3]))
