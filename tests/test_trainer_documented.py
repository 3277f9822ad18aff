"""Trainers from the documentation of transformers, with callback and loss added, or with MixupTrainer instead of Trainer."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from torchvision.transforms import v2
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    AutoModelForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
)

from hf_mixup import MixupCallback, MixupCollator, MixupLoss, MixupTrainer
from hf_mixup.data.processor import ImageFormat
from refusals import refuses
from small import Images, arguments, difference, vit, weights
from test_collator import plain_arguments


def added() -> dict:
    """All that a Trainer needs to mix."""
    return {"callbacks": [MixupCallback(MixupCollator(["mixup", "cutmix"]))], "compute_loss_func": MixupLoss()}


# -- run_image_classification.py ----------------------------------------------------------------------------------------------


def pictures(count, seed=0) -> Dataset:
    images = Images(count, seed=seed)
    shown = [Pictures.fromarray(pixels.mul(64).add(96).clamp(0, 255).byte().permute(1, 2, 0).numpy()) for pixels in images.pixels]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c", "d"])})
    return Dataset.from_dict({"image": shown, "label": images.labels.tolist()}, features=features)


to_pixels = v2.Compose([v2.Resize((16, 16)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def transforms(batch):
    batch["pixel_values"] = [to_pixels(image.convert("RGB")) for image in batch["image"]]
    return batch


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    labels = torch.tensor([example["label"] for example in examples])
    return {"pixel_values": pixel_values, "labels": labels}


def compute_metrics(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


@pytest.mark.parametrize("kind", ["stock", "callback", "mixup", "vanilla"])
def test_image_classification(tmp_path, kind):
    train, evaluation = pictures(20), pictures(10, seed=1)
    train.set_transform(transforms)
    evaluation.set_transform(transforms)
    settings = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1,
                "remove_unused_columns": False, "per_device_eval_batch_size": 10}  # fmt: skip
    labels = train.features["label"].names
    network = vit(id2label=dict(enumerate(labels)), label2id={name: number for number, name in enumerate(labels)})
    ours = kind in ("mixup", "vanilla")
    args = arguments(tmp_path, mix=[kind], **settings) if ours else plain_arguments(tmp_path, **settings)
    run = (MixupTrainer if ours else Trainer)(
        model=network,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=compute_metrics,
        processing_class=ImageFormat(16).processor(),
        data_collator=collate_fn,
        **(added() if kind == "callback" else {}),
    )
    seen = {True: [], False: []}
    network.register_forward_pre_hook(lambda module, _, inputs: seen[module.training].append(inputs["pixel_values"]), with_kwargs=True)
    result = run.train()
    run.save_model()
    run.log_metrics("train", result.metrics)
    run.save_metrics("train", result.metrics)
    run.save_state()
    metrics = run.evaluate()
    run.log_metrics("eval", metrics)
    run.save_metrics("eval", metrics)

    plain, shown = (torch.stack([row["pixel_values"] for row in data]) for data in (train, evaluation))
    assert [len(batch) for batch in seen[True]] == [8, 8, 4] * 2
    as_it_is = (torch.cat(seen[True])[:, None] == plain).flatten(2).all(2).any(1)
    assert as_it_is.all() == (kind in ("stock", "vanilla")), "training is mixed where it is asked for"
    assert all(torch.equal(batch, shown) for batch in seen[False]), "evaluation is not"
    assert np.isfinite(result.training_loss)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6"]
    saved = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert saved.config.id2label == dict(enumerate(labels))
    with torch.no_grad():
        right = saved(shown).logits.argmax(-1) == torch.tensor([row["label"] for row in evaluation])
    assert metrics["eval_accuracy"] == pytest.approx(right.double().mean().item())


# -- audio classification -----------------------------------------------------------------------------------------------------


def ast():
    torch.manual_seed(0)
    config = ASTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_mel_bins=32, max_length=48, num_labels=4)  # fmt: skip
    return ASTForAudioClassification(config), [{"input_values": torch.randn(48, 32), "labels": row % 4} for row in range(16)], None


def wav2vec2():
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=4,
        mask_time_prob=0.0, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
    )  # fmt: skip
    rows = [{"input_values": torch.randn(900 + 10 * row).tolist(), "label": row % 4} for row in range(16)]
    return Wav2Vec2ForSequenceClassification(config), rows, Wav2Vec2FeatureExtractor()


@pytest.mark.parametrize("make", [ast, wav2vec2])
def test_sound_trains_mixed_and_the_loss_is_the_networks_own(tmp_path, make):
    network, data, extractor = make()
    before = weights(network)
    for run in (
        MixupTrainer(network, arguments(tmp_path, mix=["mixup"], max_steps=1), train_dataset=data, processing_class=extractor),
        Trainer(network, plain_arguments(tmp_path, max_steps=1), train_dataset=data, processing_class=extractor, **added()),
    ):
        run.train()
        assert difference(before, weights(network)) > 0
        before = weights(network)
    # hard labels, nothing mixed: the loss of the network itself
    network, data, extractor = make()
    before, found = weights(network), []
    for keep in ({}, {"compute_loss_func": MixupLoss()}):
        network, data, extractor = make()
        run = Trainer(network, plain_arguments(tmp_path, max_steps=2), train_dataset=data, processing_class=extractor, **keep)
        run.train()
        found.append(weights(network))
    assert difference(*found) < 1e-6
    assert difference(found[0], before) > 0


# -- semantic segmentation ----------------------------------------------------------------------------------------------------


def test_segmentation_with_soft_masks_or_another_loss_is_refused_and_untouched_without_us(tmp_path):
    config = SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=4)
    network = SegformerForSemanticSegmentation(config)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(4, (32, 32))} for _ in range(16)]
    before = weights(network)
    for mix in ("mixup", "vanilla"):
        with refuses("whole images, videos, sounds or texts, got SegformerForSemanticSegmentation; for a network that labels pixels"):
            MixupTrainer(network, arguments(tmp_path, mix=[mix]), train_dataset=data)
    plain = plain_arguments(tmp_path, max_steps=1)
    runs = [
        (Trainer(network, plain, train_dataset=data, **added()), "label maps need one image in every pixel, got 'mixup'"),
        (
            Trainer(network, plain, train_dataset=data, data_collator=MixupCollator("cutmix"), compute_loss_func=MixupLoss()),
            "got them in MixupLoss",
        ),
    ]
    for run, sentence in runs:
        with refuses(sentence):
            run.train()
    network.load_state_dict(
        {**network.state_dict(), **{name: before[name] for name, _ in network.named_buffers()}}
    )  # a pass moves statistics
    assert difference(before, weights(network)) == 0
    Trainer(network, plain, train_dataset=data).train()
    assert difference(before, weights(network)) > 0
