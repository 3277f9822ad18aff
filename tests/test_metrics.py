"""Metrics: computed by hand, compared with a second library, and as `evaluate` uses them."""

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_mixup.evaluation.measures import Brier, CalibrationError, NegativeLogLikelihood, TopK, all_measures
from hf_mixup.evaluation.metrics import classification_metrics, confidence_bins

# ten predictions of two classes: confidence of class 0, and whether that is right
CONFIDENCE = [0.95, 0.95, 0.85, 0.85, 0.85, 0.85, 0.65, 0.65, 0.55, 0.55]
RIGHT = [1, 1, 1, 1, 0, 0, 1, 0, 1, 1]


def predictions(confidence=CONFIDENCE, right=RIGHT):
    first = np.array(confidence, np.float32)
    return np.stack([first, 1 - first], 1), 1 - np.array(right)


def random_predictions(count=1000, classes=7, sharpness=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    probabilities = (sharpness * torch.randn(count, classes, generator=rng)).softmax(1)
    return probabilities, torch.multinomial(probabilities.sqrt(), 1, generator=rng)[:, 0]


def test_calibration_error_by_hand():
    """Bins of width 0.1 hold 2, 4, 2 and 2 predictions with gaps 0.05, 0.35, 0.15 and 0.45: (0.1 + 1.4 + 0.3 + 0.9) / 10. The gaps
    are not monotone in the confidence, and bins are empty, where sorting them first would give another number."""
    probabilities, references = predictions()
    assert CalibrationError().compute(predictions=probabilities, references=references)["ece"] == pytest.approx(0.27, abs=1e-6)
    bins = confidence_bins(probabilities, references)
    assert bins.count.tolist() == [0, 0, 0, 0, 0, 2, 2, 0, 4, 2]
    np.testing.assert_allclose(bins.accuracy, [0, 0, 0, 0, 0, 1, 0.5, 0, 0.5, 1])


def test_equal_masses_by_hand():
    """Two halves: mean confidences 0.65 and 0.89. The edge falls among the four of confidence 0.85, which are right half the
    time: (0.5 + 1 + 2) / 5 are right below, (4 * 0.5 - 0.5 + 2) / 5 above."""
    probabilities, references = predictions()
    bins = confidence_bins(probabilities, references, 2, equal_mass=True)
    assert bins.count.tolist() == [5, 5]
    np.testing.assert_allclose(bins.confidence, [0.65, 0.89], atol=1e-6)
    np.testing.assert_allclose(bins.accuracy, [0.7, 0.7], atol=1e-6)
    assert bins.error == pytest.approx(0.12, abs=1e-6)


def test_equal_masses_do_not_depend_on_the_order():
    probabilities, references = (part.numpy() for part in random_predictions())
    probabilities = probabilities.round(1)  # many ties
    order = np.random.default_rng(0).permutation(len(references))
    one, other = (
        confidence_bins(p, r, 10, equal_mass=True) for p, r in ((probabilities, references), (probabilities[order], references[order]))
    )
    assert one.error == pytest.approx(other.error, abs=1e-12)
    assert set(one.count) == {100}


def test_edges_and_certainty_have_a_bin():
    """A confidence on an edge belongs to the bin below it, and certainty to the last."""
    probabilities, references = predictions([0.5, 0.6, 0.7, 1.0], [1, 1, 1, 1])
    assert confidence_bins(probabilities, references).count.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("bins", [10, 15])
@pytest.mark.parametrize("sharpness", [0.3, 2.0, 20.0])
def test_calibration_error_is_that_of_torchmetrics(bins, sharpness):
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities, references = random_predictions(sharpness=sharpness)
    ours = confidence_bins(probabilities.numpy(), references.numpy(), bins).error
    theirs = multiclass_calibration_error(probabilities, references, num_classes=7, n_bins=bins, norm="l1").item()
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_calibrated_classifier_has_next_to_no_error():
    rng = torch.Generator().manual_seed(0)
    probabilities = torch.randn(100_000, 5, generator=rng).softmax(1)
    references = torch.multinomial(probabilities, 1, generator=rng)[:, 0]
    for equal_mass in (False, True):
        assert confidence_bins(probabilities.numpy(), references.numpy(), equal_mass=equal_mass).error < 0.01


def test_other_measures_are_those_of_torch():
    probabilities, references = random_predictions()
    given = {"predictions": probabilities.numpy(), "references": references.numpy()}
    assert NegativeLogLikelihood().compute(**given)["nll"] == pytest.approx(
        torch.nn.functional.nll_loss(probabilities.log(), references).item(), rel=1e-5
    )
    onehot = torch.nn.functional.one_hot(references, 7)
    assert Brier().compute(**given)["brier"] == pytest.approx((probabilities - onehot).square().sum(1).mean().item(), rel=1e-5)
    for k in (1, 3):
        best = probabilities.topk(k).indices
        assert TopK(k).compute(**given)[f"top{k}"] == pytest.approx((best == references[:, None]).any(1).float().mean().item())


def test_impossible_predictions_stay_finite():
    given = {"predictions": [[1.0, 0.0]], "references": [1]}
    assert 80 < NegativeLogLikelihood().compute(**given)["nll"] < 90
    assert Brier().compute(**given)["brier"] == 2


def test_evaluate_combines_them_offline(monkeypatch):
    import socket

    def refused(*_):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refused)
    probabilities, references = random_predictions(100)
    together = evaluate.combine([TopK(1), TopK(5), CalibrationError(15), CalibrationError(equal_mass=True)])
    for rows in range(0, 100, 30):  # in batches, as a loop over data does
        together.add_batch(predictions=probabilities[rows : rows + 30].numpy(), references=references[rows : rows + 30].numpy())
    found = together.compute()
    assert found["ece"] == pytest.approx(confidence_bins(probabilities.numpy(), references.numpy(), 15).error, abs=1e-7)
    assert set(found) == {"top1", "top5", "ece", "ece_mass"}
    whole = all_measures().compute(predictions=probabilities.numpy(), references=references.numpy())
    assert set(whole) == {"top1", "top5", "ece", "ece_mass", "nll", "brier"}
    assert whole["top5"] == found["top5"]


def test_refuses_measures_of_nothing():
    with pytest.raises(ValueError, match="bins must be a whole number of at least 1, got 0"):
        CalibrationError(0)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
        TopK(0)


def test_a_network_that_gives_nan_is_never_right():
    scores = np.array([[np.nan, 1.0, 2.0], [np.nan] * 3, [0.0, 3.0, 1.0]], np.float32)
    for classes in ([2, 0, 1], [0, 1, 1], [0, 2, 1]):
        found = classification_metrics(EvalPrediction(scores, np.array(classes)))
        assert (found["top1"], found["top5"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
