"""Inputs are tensors with leading axes and a plane: sounds, spectrograms, videos, volumes, and their masks."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    AutoModelForAudioClassification,
    AutoModelForVideoClassification,
    BertConfig,
    BertForTokenClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    TimesformerConfig,
    TimesformerForVideoClassification,
    Trainer,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

import laws
from hf_mixup import METHODS, MixPlan, MixupCallback, MixupCollator, MixupLoss, MixupModel, MixupTrainer, blend, mix_targets
from hf_mixup.core.plan import Boxes, Dense, Share, blend_examples, mix_others
from hf_mixup.core.planes import plane_shape, planes
from hf_mixup.core.rng import MixKey, keyed
from hf_mixup.method import needs_of_model
from refusals import refuses
from small import arguments, difference, weights
from test_collator import plain_arguments
from test_laws import CELLS, CHANNELS, NOT_BY_AREA, UNDRAWN

# waveforms, spectrograms, images, videos (T, C), volumes (C, D)
SHAPES = [(5, 60), (4, 16, 12), (3, 4, 3, 8, 8), (4, 1, 6, 8, 8)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
IMAGE_ONLY = [name for name, method in METHODS.items() if not needs_of_model(method) and "maps" not in method.sample.needs]


def fits(name, shape):
    return shape[1] in CHANNELS.get(name, (shape[1],)) and not any(side % CELLS.get(name, 1) for side in shape[2:])


def test_planes_are_views_of_every_input():
    for shape, seen in (
        ((2, 3, 8, 6), (2, 3, 8, 6)), ((2, 9), (2, 1, 1, 9)), ((2, 9, 4), (2, 1, 9, 4)), ((2, 5, 3, 8, 6), (2, 15, 8, 6)), ((2,), (2, 1, 1, 1)),
    ):  # fmt: skip
        x = torch.randn(shape)
        assert planes(x).shape == plane_shape(x.shape) == seen
        assert planes(x).data_ptr() == x.data_ptr()


@every_shape
@pytest.mark.parametrize("name", sorted(METHODS))
def test_laws_hold_for_every_input(name, shape):
    """Laws 1 to 4 and 8: one-hot frames, bins and samples, in the input's own shape."""
    method, seen = METHODS[name], plane_shape(torch.Size(shape))
    if not fits(name, seen):
        pytest.skip("needs other channels or another size, which it says")
    laws.convex(method.sample, seen, whole=False)
    laws.own_first(method.sample, seen)
    targets = torch.rand(shape[0], 3, generator=keyed(1))
    for key in range(2):
        signals = laws.signals_for(seen, key)
        signals["images"] = signals["history"] = planes(targets[:, 0].view(-1, *[1] * (len(shape) - 1)).expand(shape))
        plan = laws.plan_of(method.sample, seen, key, signals)
        x = torch.randn(shape, generator=keyed(2))
        if plan.sources is None:
            mixed = blend(plan, x)
            assert mixed.shape == x.shape
            assert torch.equal(mixed, blend(plan, planes(x)).view(shape)), "one mask for every frame"
            assert blend(plan, x.bfloat16()).dtype == torch.bfloat16
            assert torch.equal(blend_examples(plan, list(x), torch.empty(shape)), mixed)
        if name not in NOT_BY_AREA and plan.sources is None:
            # every class is a recording that says how much of it every image is
            classes = [blend(plan, share.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()) for share in targets.T]
            means = torch.stack([whole.flatten(1).mean(1) for whole in classes], 1)
            assert_close(means, mix_targets(plan, targets), atol=1e-5 + laws.PIXEL / math.prod(seen[2:]) * (name == "fmix"), rtol=0)


@every_shape
@pytest.mark.parametrize("name", IMAGE_ONLY)
def test_calls_and_collators_mix_every_input(name, shape):
    x, labels = torch.randn(shape, generator=keyed(3)), torch.arange(shape[0])
    frames = len(shape) == 5 and shape[2] <= 4 and name == "saliencymix"  # which looks at each frame, and so at its channels
    if not frames and not fits(name, plane_shape(x.shape)):
        with refuses("use another method, such as CutMix"):
            METHODS[name](x, labels, 5)
        return
    rows = METHODS[name].step.rows
    mixed, targets = METHODS[name](x, labels, 5, keyed(4))
    assert mixed.shape == (len(rows) * shape[0], *shape[1:])
    assert targets.shape == (len(mixed), 5)
    key = "pixel_values" if x.ndim > 3 else "input_values"
    batch = MixupCollator(name, num_labels=5)([{key: one, "labels": row} for row, one in enumerate(x)])
    assert set(batch) == {key, "labels"}
    assert batch[key].shape == mixed.shape
    plan = METHODS[name].plan(x, labels, keyed(4))
    assert torch.equal(blend(plan, x), mixed[: len(x)])
    if name not in UNDRAWN:  # taken means effective: most rows are mixed, and no label says so of one that is not
        own = [METHODS[name](x, labels, 5, keyed(4, key))[0][: len(x)] == x for key in range(10)]
        changed = torch.stack([~same.flatten(1).all(1) for same in own]).double().mean()
        assert changed > 0.4, changed


@pytest.mark.parametrize("name", ["mixup", "cutmix", "fmix", "resizemix", "ricap"])
def test_videos_of_bytes_are_mixed_as_bytes(name):
    x = torch.randint(256, (4, 3, 3, 40, 40), dtype=torch.uint8, generator=keyed(5))
    collator = MixupCollator(name, num_labels=4)
    batches = []
    for one in (x, x.float() / 255):
        torch.manual_seed(2)
        batches.append(collator([{"pixel_values": row, "labels": number} for number, row in enumerate(one)]))
    assert batches[0]["pixel_values"].dtype == torch.uint8
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    assert (batches[0]["pixel_values"].float() - batches[1]["pixel_values"] * 255).abs().max() <= 0.5 + 1e-3


# -- masks ------------------------------------------------------------------------------------------------------------------


def test_a_mask_is_the_union_of_those_of_the_parts_that_show():
    mask = (torch.arange(6) < torch.tensor([[6], [2], [4], [1]])).long()
    partner = torch.tensor([1, 0, 3, 2])
    half = torch.tensor([0.5, 1.0, 0.0, 0.5])
    boxes = Boxes(torch.tensor([[0, 1, 0, 3], [0, 1, 2, 2], [0, 1, 0, 6], [0, 1, 5, 6]]), (1, 6))
    dense = torch.stack([boxes.dense((1, 6))[:, 0], boxes.dense((1, 6))[:, 1]], 1)
    expected = torch.stack([mask[0] | mask[1], mask[1], mask[3], mask[3] | mask[2]])
    for kind in (Share(torch.stack([half, 1 - half], 1)), boxes, Dense(dense)):
        plan = MixPlan.pair(partner, kind, half)
        made = mix_others(plan, {"attention_mask": mask, "padding_mask": mask.bool(), "row": torch.arange(4), "name": "a"})
        assert torch.equal(made["attention_mask"], expected)
        assert torch.equal(made["padding_mask"], expected.bool())
        assert torch.equal(made["row"], torch.arange(4))
        assert made["name"] == "a"
    alone = mix_others(MixPlan.identity(4), {"attention_mask": mask})
    assert torch.equal(alone["attention_mask"], mask)


def test_waveforms_of_several_lengths_are_padded_first_and_no_sample_of_a_mixture_is_masked():
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    data = [{"input_values": torch.ones(20 + 10 * row).tolist(), "label": row} for row in range(4)]

    def padded(examples):
        batch = extractor.pad([{"input_values": e["input_values"]} for e in examples], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([e["label"] for e in examples])}

    for name in ("mixup", "cutmix", "regmixup"):
        batch = MixupCollator(name, num_labels=4, base_collator=padded)(data)
        assert batch["attention_mask"].shape == batch["input_values"].shape
        assert bool((batch["input_values"] != 0).logical_not().logical_or(batch["attention_mask"].bool()).all())
    with refuses(r"input_values of a batch must have one size, got \(20,\), .*; give a base_collator that pads them"):
        MixupCollator("mixup", num_labels=4)(data)


# -- refusals ---------------------------------------------------------------------------------------------------------------


def test_which_column_is_mixed_is_clear_or_asked_for():
    both = [{"pixel_values": torch.randn(3, 8, 8), "input_values": torch.randn(20), "labels": row % 2} for row in range(4)]
    with refuses("only one column can be mixed, got pixel_values and input_values; choose one with input_name"):
        MixupCollator("mixup", num_labels=2)(both)
    batch = MixupCollator("mixup", num_labels=2, input_name="input_values")(both)
    assert not torch.equal(batch["input_values"], torch.stack([row["input_values"] for row in both]))
    assert torch.equal(batch["pixel_values"], torch.stack([row["pixel_values"] for row in both]))
    with refuses("examples must have a column 'signal', got"):
        MixupCollator("mixup", num_labels=2, input_name="signal")(both)


def test_patches_without_a_common_grid_are_refused():
    several = [{"pixel_values": torch.randn(10 + row, 48), "labels": row % 2} for row in range(4)]
    with refuses("got patches of images of several sizes, .*, which have no common grid"):
        MixupCollator("mixup", num_labels=2)(several)
    padded = [{"pixel_values": torch.randn(16, 48), "spatial_shapes": torch.tensor([4, 4]), "labels": row % 2} for row in range(4)]
    with refuses(r"must have one grid, got patches with spatial_shapes \(NaFlex\)"):
        MixupCollator("mixup", num_labels=2)(padded)


# -- networks ---------------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 4}
STILL = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "layerdrop": 0.0}


def ast():
    return ASTForAudioClassification(ASTConfig(**SMALL, num_mel_bins=16, max_length=24, patch_size=8, frequency_stride=8, time_stride=8))


def wav2vec2():
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            **SMALL, **STILL, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2, feat_extract_norm="layer",
            num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=8, mask_time_prob=0.0,
        )
    )  # fmt: skip


def videomae():
    return VideoMAEForVideoClassification(VideoMAEConfig(**SMALL, image_size=16, patch_size=8, num_frames=4))


def timesformer():
    return TimesformerForVideoClassification(TimesformerConfig(**SMALL, image_size=16, patch_size=8, num_frames=4))


def segformer():
    config = SegformerConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=4, drop_path_rate=0.0
    )
    return SegformerForSemanticSegmentation(config)


def tones(count):
    """Waveforms of different lengths."""
    return [{"input_values": torch.randn(300 + 20 * (row % 5), generator=keyed(row)).tolist(), "labels": row % 4} for row in range(count)]


def tensors(*shape):
    return lambda count: [
        {"pixel_values" if len(shape) > 2 else "input_values": torch.randn(shape, generator=keyed(row)), "labels": row % 4}
        for row in range(count)
    ]


def maps(count):
    return [
        {"pixel_values": torch.randn(3, 32, 32, generator=keyed(row)), "labels": torch.randint(4, (32, 32), generator=keyed(row, 1))}
        for row in range(count)
    ]


NETWORKS = {
    "ast": (ast, tensors(24, 16), AutoModelForAudioClassification),
    "wav2vec2": (wav2vec2, tones, AutoModelForAudioClassification),
    "videomae": (videomae, tensors(4, 3, 16, 16), AutoModelForVideoClassification),
    "timesformer": (timesformer, tensors(4, 3, 16, 16), AutoModelForVideoClassification),
    "segformer": (segformer, maps, None),
}
CLASSIFIERS = [name for name, (_, _, auto) in NETWORKS.items() if auto is not None]


def made(name):
    torch.manual_seed(0)
    return NETWORKS[name][0](), Wav2Vec2FeatureExtractor(return_attention_mask=True) if name == "wav2vec2" else None


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stock_trainer_mixes_trains_evaluates_plain_and_resumes(tmp_path, name):
    data, evaluation = NETWORKS[name][1](12), NETWORKS[name][1](4)
    pixels = name == "segformer"

    def run(folder, **changes):
        network, extractor = made(name)
        callback = MixupCallback(MixupCollator(["cutmix"] if pixels else ["mixup", "cutmix"]))
        return Trainer(
            network, plain_arguments(tmp_path / folder, per_device_train_batch_size=4, **{"max_steps": 4, **changes}), train_dataset=data,
            eval_dataset=evaluation, processing_class=extractor, callbacks=[callback], compute_loss_func=None if pixels else MixupLoss(),
        )  # fmt: skip

    whole = run("whole", save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    seen, key = {True: [], False: []}, whole.model.main_input_name
    whole.model.register_forward_pre_hook(
        lambda module, args, given: seen[module.training].append({k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}),
        with_kwargs=True,
    )
    whole.train()
    own = [torch.as_tensor(example[key]) for example in data]
    unchanged = [any(torch.equal(row[: len(one)], one) for one in own) for batch in seen[True] for row in batch[key]]
    assert sum(unchanged) < len(unchanged) / 2, "training is mixed"
    if pixels:
        assert all(batch["labels"].dtype == torch.int64 for batch in seen[True])
    if name == "wav2vec2":
        assert all("attention_mask" in batch for batch in seen[True])
    for batch in seen[False]:
        for row, example in zip(batch[key], evaluation, strict=True):
            one = torch.as_tensor(example[key])
            assert torch.equal(row[: len(one)], one), "evaluation is not"
    assert whole.state.log_history[-1]["train_loss"] > 0
    resumed = run("whole", max_steps=6)
    before = weights(resumed.model)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert resumed.state.global_step == 6
    assert difference(before, weights(resumed.model)) > 0


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_mixup_trainer_resumes_to_the_bit_and_saves_the_plain_network(tmp_path, name):
    data, evaluation = NETWORKS[name][1](12), NETWORKS[name][1](4)

    def run(folder, **changes):
        network, extractor = made(name)
        args = arguments(tmp_path / folder, mix=["mixup", "puzzlemix"], per_device_train_batch_size=4, max_steps=4, **changes)
        return MixupTrainer(network, args, train_dataset=data, eval_dataset=evaluation, processing_class=extractor)

    whole = run("whole", save_strategy="steps", save_steps=2)
    before = weights(whole.mixup_model.backbone)
    whole.train()
    assert difference(before, weights(whole.mixup_model.backbone)) > 0
    resumed = run("cut")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert difference(weights(whole.model), weights(resumed.model)) == 0
    predicted = torch.from_numpy(whole.predict(evaluation).predictions)
    whole.save_model(tmp_path / "out")
    plain, report = NETWORKS[name][2].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    inputs = whole.data_collator(evaluation)
    inputs.pop("labels")
    with torch.no_grad():
        assert_close(plain.eval()(**inputs).logits, predicted, atol=1e-6, rtol=1e-5)
    assert difference(weights(MixupModel.from_pretrained(tmp_path / "out")), weights(whole.mixup_model)) == 0


def test_a_mask_in_lists_reaches_training_and_evaluation_by_a_collator(tmp_path):
    data = [{"input_values": [0.5] * 300, "attention_mask": [1] * (280 + row) + [0] * (20 - row), "labels": row % 4} for row in range(4)]
    seen, network = [], made("wav2vec2")[0]
    network.register_forward_pre_hook(lambda module, args, given: seen.append(given.get("attention_mask")), with_kwargs=True)
    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=1)
    run = MixupTrainer(network, args, MixupCollator("mixup", num_labels=4), data, data)
    run.train()
    run.evaluate()
    assert [None if mask is None else mask.shape for mask in seen] == [(4, 300), (4, 300)]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_step_is_the_plan_the_blend_and_the_network(name):
    """The loss of a step is that of the network on the mixture that the key says, with the united mask."""
    network, extractor = made(name)
    network.eval()
    rows = NETWORKS[name][1](4)
    if extractor is None:
        inputs = {network.main_input_name: torch.stack([row[network.main_input_name] for row in rows])}
    else:
        inputs = dict(extractor.pad([{"input_values": row["input_values"]} for row in rows], return_tensors="pt"))
    labels = torch.arange(4)
    x = inputs.pop(network.main_input_name)
    model = MixupModel(network, "cutmix").train()
    model.backbone.eval()
    united = 0
    for key in (MixKey(3, 0, step) for step in range(3)):
        loss = model(**{network.main_input_name: x}, **inputs, labels=labels, mix_key=key).loss
        plan = METHODS["cutmix"].sample.plan(plane_shape(x.shape), key.own_rng(), {})
        beside = mix_others(plan, inputs)
        logits = network(**{network.main_input_name: blend(plan, x)}, **beside).logits
        assert_close(loss, -(mix_targets(plan, labels, 4) * logits.log_softmax(1)).sum(1).mean())
        united += sum(not torch.equal(rows, inputs[mask]) for mask, rows in beside.items())
    assert bool(united) == (name == "wav2vec2")


def test_methods_that_need_maps_of_images_say_so():
    for name in ("manifoldmix", "automix", "attentivemix", "transmix", "snapmix"):
        with pytest.raises(ValueError, match=r"^the network must have "):
            MixupModel(videomae(), name)
    with refuses("feature maps are known for networks of images only, got VideoMAEForVideoClassification"):
        MixupModel(videomae(), METHODS["patchup"].replaced(layers=("videomae",)))


def test_networks_that_do_not_classify_whole_inputs_are_refused():
    token = BertForTokenClassification(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    for network in (segformer(), token):
        with refuses(f"whole images, videos, sounds or texts, got {type(network).__name__}; for a network that labels pixels"):
            MixupModel(network, "mixup")
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=1, encoder_layers=1, decoder_layers=1, num_queries=2, dim_feedforward=8,
        encoder_feedforward_dim=8,
    )  # fmt: skip
    instances = Mask2FormerForUniversalSegmentation(config)
    data = [{"pixel_values": torch.randn(3, 32, 32), "mask_labels": torch.zeros(1, 32, 32), "class_labels": torch.tensor([0])}] * 4
    run = Trainer(instances, plain_arguments("unused"), train_dataset=data, callbacks=[MixupCallback(MixupCollator("cutmix"))])
    with refuses("got Mask2FormerForUniversalSegmentation, whose labels are boxes or masks of single instances"):
        run.train()
    with refuses("got mask_labels, masks of single instances"):
        MixupCollator("cutmix")(data)
    boxes = [{"pixel_values": torch.randn(3, 32, 32), "labels": {"boxes": torch.zeros(1, 4), "class_labels": torch.tensor([0])}}] * 4
    with refuses("got boxes, class_labels of every image, annotations that cannot be mixed", TypeError):
        MixupCollator("cutmix")(boxes)


@pytest.mark.parametrize("method", ["comixup", "puzzlemix", "guidedmixup"])
def test_saliency_of_waveforms_is_taken_in_training_too(method):
    """Networks for waveforms mark their input in training, which torch forbids for an input that has a gradient already."""
    network, _ = made("wav2vec2")
    model = MixupModel(network, METHODS[method]).train()
    encoder = network.wav2vec2.feature_extractor
    out = model(input_values=torch.randn(4, 400, generator=keyed(0)), labels=torch.arange(4), mix_key=MixKey(3, 0, 1))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert encoder.conv_layers[0].conv.weight.grad.abs().sum() > 0
    assert encoder._requires_grad is True, "as it was"


def test_saliency_of_a_video_is_the_mean_over_its_frames():
    """A video that stands still has the box of its picture, one whose frames differ that of all of them; one box for all frames."""
    pictures = torch.randn(6, 3, 16, 12, generator=keyed(4))
    method = METHODS["saliencymix"]
    still = method.plan(pictures[:, None].expand(-1, 4, -1, -1, -1).contiguous(), generator=keyed(1))
    assert torch.equal(still.mask.edges, method.plan(pictures, generator=keyed(1)).mask.edges)
    from hf_mixup.policies.saliencymix import blur8, bytes_of, fine_grained, gray8, peaks

    x = torch.randn(6, 4, 3, 16, 12, generator=keyed(5))
    plan = method.replaced(alpha=1.0).plan(x, generator=keyed(1))
    mean = torch.stack([fine_grained(blur8(gray8(bytes_of(frame, None, None)))) for frame in x.unbind(1)]).float().mean(0)
    row, col = (place[plan.partners[:, 0]] for place in peaks(mean))
    top, bottom, left, right = plan.mask.edges.unbind(1)
    some = (bottom > top) & (right > left)
    assert some.any()
    assert ((top <= row) & (row < bottom) & (left <= col) & (col < right))[some].all()
    mixed = blend(plan, x)
    assert torch.equal(mixed, torch.where(plan.mask.inside((16, 12))[:, None, None], x[plan.partners[:, 0]], x))
