"""Teachers see images that are normalised by their own image processor."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from torch.testing import assert_close

import tiny
from hf_mixup import METHODS, MixupModel, get_method
from hf_mixup.core.policy import LabelPolicy, Signals
from hf_mixup.core.rng import MixKey
from hf_mixup.method import Method
from hf_mixup.networks.signals.features import last_feature_map
from hf_mixup.networks.teachers import Normalisation, Teacher
from hf_mixup.policies import AttentiveMix
from refusals import refuses

PROCESSORS = {
    "vit": transformers.ViTImageProcessor(),
    "bit": transformers.BitImageProcessor(),
    "blue first, not normalised": transformers.MobileViTImageProcessor(),
    "normalised twice": transformers.EfficientNetImageProcessor(),
    "with an offset": transformers.EfficientNetImageProcessor(include_top=False, rescale_offset=True, rescale_factor=1 / 127.5),
    "not rescaled": transformers.ViTImageProcessor(do_rescale=False, image_mean=[100.0] * 3, image_std=[50.0] * 3),
    "not normalised": transformers.DeiTImageProcessor(do_normalize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_normalisation_is_what_the_processor_does(name):
    processor = PROCESSORS[name]
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    switched_off = {"do_resize": False, "do_center_crop": False}
    expected = processor(image, return_tensors="pt", **switched_off)["pixel_values"]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    normalisation = Normalisation.of_processor(processor)
    assert_close(normalisation.images(pixels), expected, atol=1e-5, rtol=1e-5)
    assert_close(normalisation.pixels(expected), pixels, atol=1e-5, rtol=1e-5)


def test_a_normalisation_of_videos():
    """Every frame of (B, T, C, H, W), as the processor makes them."""
    processor = transformers.VideoMAEImageProcessor(image_mean=[0.1, 0.2, 0.3], do_resize=False, do_center_crop=False)
    frames = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    expected = processor(list(frames), return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255
    normalisation = Normalisation.of_processor(processor)
    assert_close(normalisation.images(pixels), expected, atol=1e-5, rtol=1e-5)
    assert_close(normalisation.pixels(expected), pixels, atol=1e-5, rtol=1e-5)


def test_tokenizers_have_no_normalisation():
    assert Normalisation.of_processor(object()) is None


def teacher_folder(folder, processor):
    tiny.network("resnet").save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


def test_the_teacher_sees_its_own_normalisation(tmp_path):
    """A student whose images are normalised by one half, and a teacher by ImageNet's mean: the same pixels reach both."""
    path = teacher_folder(tmp_path, PROCESSORS["bit"])
    pixels = torch.rand(4, 3, tiny.SIDE, tiny.SIDE)
    own, given = (Normalisation.of_processor(PROCESSORS[name]) for name in ("bit", "vit"))
    model = MixupModel(tiny.network("vit"), get_method("attentivemix", teacher=path)).train()
    model.normalisation = given
    signals = model.states["attentivemix"].before(given.images(pixels), torch.eye(5)[:4])
    features = last_feature_map(tiny.network("resnet"), own.images(pixels))
    assert_close(signals["features"], features, atol=1e-4, rtol=1e-4)


def test_the_same_normalisation_changes_no_bit(tmp_path):
    teacher = Teacher(teacher_folder(tmp_path, PROCESSORS["vit"]))
    images = torch.randn(2, 3, 8, 8)
    teacher.given = Normalisation.of_processor(PROCESSORS["vit"])
    assert teacher.view(images) is images


def test_without_a_processor_images_are_shown_as_they_are(tmp_path):
    teacher = Teacher(teacher_folder(tmp_path, None))
    images = torch.randn(2, 3, 8, 8)
    assert teacher.view(images) is images


def test_an_unknown_normalisation_of_the_training_images_is_refused(tmp_path):
    path = teacher_folder(tmp_path, PROCESSORS["bit"])
    model = MixupModel(tiny.network("vit"), get_method("attentivemix", teacher=path)).train()
    images, targets = tiny.batch()
    with refuses("training images of unknown normalisation; give MixupTrainer the image processor as processing_class"):
        model(images, targets, MixKey(1, 0, 0))


@pytest.mark.parametrize("name", ["supermix", "tokenmix"])
def test_every_method_with_a_teacher_renormalises(name, tmp_path):
    """What the method draws with a teacher of another normalisation is what it draws with the same teacher on the same pixels."""
    fields = {"teacher": teacher_folder(tmp_path, PROCESSORS["bit"])}
    fields |= {"max_iter": 2} if name == "supermix" else {"scores": "activation"}
    pixels, (_, targets) = torch.rand(4, 3, tiny.SIDE, tiny.SIDE), tiny.batch()
    found = []
    for student in ("vit", "bit"):
        model = MixupModel(tiny.network("vit"), get_method(name, **fields)).train()
        model.normalisation = Normalisation.of_processor(PROCESSORS[student])
        found.append(model(model.normalisation.images(pixels), targets, MixKey(1, 0, 0)).targets)
    assert_close(*found, atol=1e-4, rtol=1e-3)
    assert METHODS[name]


@pytest.mark.parametrize(("name", "fields"), [("supermix", {"target": "teacher", "max_iter": 2}), ("tokenmix", {"scores": "activation"})])
def test_classes_of_a_teacher_are_matched_by_name(name, fields, tmp_path):
    """A teacher that has the same classes in another order says the same."""
    order = [3, 0, 4, 1, 2]  # the class of each output of the second teacher
    found = []
    for place in (range(tiny.NUM_LABELS), order):
        teacher = tiny.network("resnet").eval()
        with torch.no_grad():
            for value in teacher.classifier.parameters():
                value.copy_(value[list(place)])
        teacher.config.id2label = {output: f"class {own}" for output, own in enumerate(place)}
        teacher.save_pretrained(tmp_path / str(list(place)))
        student = tiny.network("vit")
        student.config.id2label = {number: f"class {number}" for number in range(tiny.NUM_LABELS)}
        model = MixupModel(student, get_method(name, teacher=str(tmp_path / str(list(place))), **fields)).train()
        found.append(model(*tiny.batch(), MixKey(1, 0, 0)).targets)
    assert_close(*found)
    assert not torch.equal(found[0], found[0][:, order])
    student.config.id2label[2] = "other"
    with refuses("a teacher must know the classes of the network by name, got .* without 'other'; rename"):
        MixupModel(student, get_method(name, teacher=str(tmp_path / str(order)), **fields))


def test_a_teacher_without_a_classifier_is_asked_for_features_only(tmp_path):
    tiny.network("resnet").resnet.save_pretrained(tmp_path)
    MixupModel(tiny.network("vit"), get_method("attentivemix", teacher=str(tmp_path)))
    for name, fields in (("supermix", {}), ("tokenmix", {"scores": "activation"})):
        with refuses("a teacher that is asked for classes must hold a classifier, got none in"):
            MixupModel(tiny.network("vit"), get_method(name, teacher=str(tmp_path), **fields))
    with refuses("a teacher that is asked for classes must hold a classifier, got none in"):
        MixupModel(tiny.network("vit"), "cutmix", teacher=str(tmp_path))


@dataclass(frozen=True)
class SeenByAnother(LabelPolicy):
    """Keeps the features that it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    teacher: str | None = None

    def weights(self, plan, signals):
        seen.append(signals["features"])
        return plan.weight


seen: list[torch.Tensor] = []


def test_two_policies_get_the_teachers_that_they_ask_for(tmp_path):
    first = teacher_folder(tmp_path / "a", None)
    other = tiny.network("resnet")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "b")
    method = Method("twotaught", AttentiveMix(teacher=first), SeenByAnother(teacher=str(tmp_path / "b")))
    model = MixupModel(tiny.network("vit"), method).train()
    images, targets = tiny.batch()
    seen.clear()
    model(images, targets, MixKey(1, 0, 0))
    assert_close(seen[0], last_feature_map(other, images))
    signals = model.states["twotaught"].before(images, targets)
    assert_close(signals["features"], last_feature_map(tiny.network("resnet"), images))
    assert isinstance(signals, Signals)
