"""Evaluation images equal the output of the checkpoint's image processor. Training images have the same range, order of channels and aspect ratio."""

import numpy as np
import pytest
import timm
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, TimmWrapperImageProcessor, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_mixup.data.processor import ImageFormat
from hf_mixup.evaluation.robustness import PixelModel
from hf_mixup.networks.backbones import from_scratch
from images import COLOURS, evaluate, folder, picture, train
from refusals import refuses

IMAGES = {"square": (70, 70), "wide": (90, 45), "tall": (33, 100), "tiny": (7, 5)}
IMAGES = {name: picture(*size, (150, 110, 70), spread=60) for name, size in IMAGES.items()}


def square(side):
    return {"height": side, "width": side}


# of each class a setting like that of its checkpoints, and another; the sizes are small ones
SETTINGS = {
    "BeitImageProcessor": [{"size": square(48)}, {"size": square(56), "do_center_crop": True, "crop_size": square(48), "resample": 2}],
    "BitImageProcessor": [
        {"size": {"shortest_edge": 55}, "crop_size": square(48)},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 48, "width": 32}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]},
    ],
    "CLIPImageProcessor": [
        {"size": {"shortest_edge": 48}, "crop_size": square(48)},
        {"size": {"shortest_edge": 48, "longest_edge": 64}, "crop_size": square(48), "resample": 2},
    ],
    "ConvNextImageProcessor": [{"size": {"shortest_edge": 48}, "crop_pct": 0.875}, {"size": {"shortest_edge": 384}}],
    "DeiTImageProcessor": [{"size": square(55), "crop_size": square(48)}, {"size": square(438), "crop_size": square(384)}],
    "DonutImageProcessor": [{"size": {"height": 60, "width": 48}}, {"size": square(48), "do_thumbnail": False, "do_pad": False, "do_center_crop": True, "crop_size": square(48)}],
    "EfficientNetImageProcessor": [
        {"size": square(48), "resample": 0, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.47853944, 0.4732864, 0.47434163]},
        {"size": square(48), "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False, "do_normalize": False},
    ],
    "Gemma3ImageProcessor": [{"size": square(48)}, {"size": square(32), "resample": 3}],
    "ImageGPTImageProcessor": [{"size": square(32), "do_color_quantize": False}, {"size": square(32), "do_color_quantize": False, "do_normalize": False}],
    "LevitImageProcessor": [{"size": {"shortest_edge": 48}, "crop_size": square(48)}, {"size": square(55), "crop_size": square(48)}],
    "MobileNetV1ImageProcessor": [{"size": {"shortest_edge": 55}, "crop_size": square(48)}, {"size": square(48), "do_center_crop": False}],
    "MobileNetV2ImageProcessor": [{"size": {"shortest_edge": 55}, "crop_size": square(48)}, {"size": square(48), "do_center_crop": False, "do_rescale": False}],
    "MobileViTImageProcessor": [{"size": {"shortest_edge": 48}, "crop_size": square(56)}, {"size": {"shortest_edge": 48}, "crop_size": square(48), "do_flip_channel_order": False}],
    "PerceiverImageProcessor": [{"size": square(48), "crop_size": square(55)}, {"size": square(48), "do_center_crop": False}],
    "PoolFormerImageProcessor": [{"size": {"shortest_edge": 48}, "crop_size": square(48)}, {"size": square(48), "crop_size": square(48), "crop_pct": 0.8}],
    "PPLCNetImageProcessor": [{"resize_short": 55, "crop_size": 48}, {"resize_short": None, "size": {"height": 48, "width": 64}, "do_center_crop": False}],
    "PvtImageProcessor": [{"size": square(48)}, {"size": square(48), "resample": 2, "do_rescale": False, "do_normalize": False}],
    "SegformerImageProcessor": [{"size": square(64)}, {"size": {"height": 32, "width": 64}}],
    "SiglipImageProcessor": [{"size": square(48)}, {"size": square(48), "do_center_crop": True, "crop_size": square(40)}],
    "TextNetImageProcessor": [{"size": {"shortest_edge": 64}, "size_divisor": 32}, {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": square(64)}],
    "ViTImageProcessor": [{"size": {"height": 32, "width": 64}}, {"do_resize": False, "do_rescale": False}],
    "DINOv3ViTImageProcessor": [{"size": square(48)}, {"size": square(48), "do_normalize": False}],
}  # fmt: skip
# they give no images: patches, and numbers of colours
REFUSED = {"Siglip2ImageProcessor": {}, "ImageGPTImageProcessor": {"clusters": [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]}}
CONFIGURATIONS = {f"{name[:-14]}-{place}": (name, fields) for name, both in SETTINGS.items() for place, fields in enumerate(both)}
every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS)

TIMM = [
    "resnet50.a1_in1k",
    "resnet18.a1_in1k",
    "deit_tiny_patch16_224.fb_in1k",
    "convnext_tiny.in12k_ft_in1k_384",
    "vit_base_patch16_siglip_224.webli",
    "resnet10t.c3_in1k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "efficientnet_b0.ra_in1k",
    "beit_base_patch16_224.in22k_ft_in22k_in1k",
    "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    "mobilenetv3_large_100.ra_in1k",
    "vit_base_patch16_clip_224.openai",
    "inception_v3.tv_in1k",
    "regnety_032.ra_in1k",
    "cait_xxs24_224.fb_dist_in1k",
    "xception41.tf_in1k",
    "nfnet_l0.ra2_in1k",
    "mobilevit_s.cvnets_in1k",
    "levit_128.fb_dist_in1k",
    "hgnetv2_b0.ssld_stage1_in22k_in1k",
    "tf_efficientnet_b0.ns_jft_in1k",
    "vit_small_patch14_dinov2.lvd142m",
]


def built(configuration):
    name, fields = CONFIGURATIONS[configuration]
    return getattr(transformers, name)(**fields)


def given(processor, image):
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def same(one, other):
    assert one.shape == other.shape
    assert torch.allclose(one.float(), other.float(), rtol=0, atol=1e-5), (one.float() - other.float()).abs().max()


def test_the_table_holds_every_class():
    kinds = [IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) for kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES]
    names = {kind.get("torchvision", kind.get("pil")) for kind in kinds if kind}
    assert names - {"TimmWrapperImageProcessor"} <= {*SETTINGS, *REFUSED}
    assert len(CONFIGURATIONS) >= 40


@every_configuration
def test_evaluation_is_the_processor(tmp_path, configuration):
    """Of images of any shape; and what is saved is that processor, which gives the same again."""
    processor = built(configuration)
    form = ImageFormat.of_processor(processor)
    form.processor().save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    for image in IMAGES.values():
        wanted = given(processor, image)
        same(form.eval_transform()(image), wanted)
        same(given(again, image), wanted)


@pytest.mark.parametrize("name", [*TIMM, "squash", "border", "borders", "not square"])
def test_evaluation_is_timm_s(name):
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name if name in TIMM else TIMM[0]).to_dict())
    side = 64 if "in1k_384" in name else config["input_size"][1] // 4
    config["input_size"] = (3, side, side)  # quicker, and the shares stay
    config |= {
        "squash": {"crop_mode": "squash"},
        "border": {"crop_mode": "border"},
        "borders": {"crop_mode": "border", "crop_pct": 1.0, "interpolation": "bilinear"},
        "not square": {"input_size": (3, 32, 64)},
    }.get(name, {})
    theirs = timm.data.create_transform(**config, is_training=False)
    form = ImageFormat.of_processor(TimmWrapperImageProcessor(config))
    assert form.timm_config() == config
    for image in IMAGES.values():
        same(form.eval_transform()(image), theirs(image))


def test_timm_rounds_down():
    """235 pixels of resnet50.a1_in1k, 248 of DeiT, before the crop of 224."""
    for name, resized in (("resnet50.a1_in1k", 235), ("deit_tiny_patch16_224.fb_in1k", 248)):
        config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        image = picture(resized, resized, spread=60)
        pixels = ImageFormat.of_processor(TimmWrapperImageProcessor(config)).eval_transform(normalise=False)(image)
        edge = (resized - 224) / 2
        top = round(edge)
        inside = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, top : top + 224, top : top + 224] / 255
        assert torch.allclose(pixels, inside, atol=1e-6)


@every_configuration
def test_training_has_its_range_order_and_aspect_ratio(configuration):
    """An image of one colour is the same in training and evaluation; the steps of ramps have the same proportion, within a third."""
    form = ImageFormat.of_processor(built(configuration))
    if form.size is None:
        with refuses("must give images of one size, got one whose size depends on the image"):
            form.train_transform()
        return
    plain = Image.new("RGB", (80, 60), (200, 120, 30))
    middle = [side // 2 for side in form.sides]
    wanted = form.eval_transform()(plain)[:, middle[0], middle[1]]
    for crop in ("pad", "none", "resized"):
        made = form.train_transform(crop=crop)(plain, 1)
        assert made.shape[1:] == form.sides
        assert torch.allclose(made[:, middle[0], middle[1]], wanted, atol=1e-4 * wanted.abs().max().clamp(min=1)), crop
    ramp = np.zeros((120, 240, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, 240)[None], np.linspace(0, 255, 120)[:, None]
    ramp = Image.fromarray(ramp)

    def proportion(transform, key=0):
        pixels = (transform(ramp, key) * torch.tensor(form.std).view(-1, 1, 1) + torch.tensor(form.mean).view(-1, 1, 1))[
            list(np.argsort(form.order or range(3)))
        ]
        reach = min(form.sides) // 8
        area = pixels[:, middle[0] - reach : middle[0] + reach + 1, middle[1] - reach : middle[1] + reach + 1]
        across, down = (area[0, :, -1] - area[0, :, 0]).mean(), (area[1, -1] - area[1, 0]).mean()
        return float(across * 240 / (down * 120))

    seen = proportion(form.eval_transform())
    assert proportion(form.train_transform(False, crop="none")) == pytest.approx(seen, rel=0.1)
    for key in range(4):
        assert 0.65 < proportion(form.train_transform(False, crop="resized", scale=(0.5, 1.0)), key) / seen < 1.55


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (40, 40), (300, 200)])
@pytest.mark.parametrize("side", [16, 64, 80])
def test_one_field_of_view(size, side):
    """From scratch: training without resized crops sees what evaluation sees, and the processor saved gives that."""
    form = ImageFormat.of_images(None, "", side, train_crop="none")
    image = picture(*size, spread=5)
    image.paste((250, 10, 10), (0, 0, size[0] // 8, size[1] // 8))
    evaluated, trained = form.eval_transform()(image), form.train_transform(False, crop="none")(image)
    same(given(form.processor(), image), evaluated)
    assert (evaluated - trained).abs().max() < 0.1
    ends = form.eval_transform(normalise=False)(image)
    assert bool((ends[0, 0, 0] > 0.8) & (ends[1, 0, 0] < 0.3)) is (side <= 64 or size[0] == size[1])


def test_square_images_are_drawn_as_before():
    """A resized crop of a square image does not depend on whether evaluation squashes."""
    image = picture(50, 50, spread=60)
    crops = [ImageFormat(40, squash=squash).train_transform(crop="resized")(image, 3) for squash in (True, False)]
    assert torch.equal(*crops)


@pytest.mark.parametrize("name", REFUSED)
def test_what_gives_no_images_is_refused_by_name(name):
    with refuses(f"{name} must give"):
        ImageFormat.of_processor(getattr(transformers, name)(**REFUSED[name]))


def test_what_cannot_be_followed_is_refused_by_name():
    with refuses("CLIPImageProcessor must be able to process images of 3 channels, got ValueError .*longest_edge=48.*; check"):
        ImageFormat.of_processor(transformers.CLIPImageProcessor(size={"longest_edge": 48}, do_center_crop=False))
    with refuses("image_mean must be followed by MobileViTImageProcessor, got one that normalises by"):
        ImageFormat.of_processor(built("MobileViT-0"), mean=[0.4, 0.5, 0.6])
    with refuses("image_size needs an image processor that gives images of one size, got ViTImageProcessor"):
        ImageFormat.of_processor(built("ViT-1"), 32)
    with refuses("image_mean of the image processor must have a value for each of 4 channels"):
        ImageFormat.of_processor(built("Bit-1"), channels=4)

    class Grey(transformers.ViTImageProcessor):
        def _preprocess(self, images, **kwargs):
            return super()._preprocess([image.float().mean(0, keepdim=True).expand(3, -1, -1) for image in images], **kwargs)

    with refuses("Grey must scale and shift each channel separately, got one that does more"):
        ImageFormat.of_processor(Grey(size=square(32)))


@pytest.mark.parametrize(
    ("configuration", "resized"),
    [
        ("Bit-0", {"shortest_edge": 37}),
        ("DeiT-1", square(36)),
        ("Levit-0", {"shortest_edge": 32}),
        ("ViT-0", square(32)),
        ("MobileViT-0", {"shortest_edge": 27}),
        ("ConvNext-0", {"shortest_edge": 32}),
        ("PPLCNet-0", None),
    ],
)
def test_another_size_keeps_the_share(configuration, resized):
    form = ImageFormat.of_processor(built(configuration), 32)
    assert form.size == 32
    assert resized is None or {key: side for key, side in dict(form.own.size).items() if side} == resized
    if resized is None:
        assert (form.own.resize_short, dict(form.own.crop_size)["height"]) == (37, 32)
    for image in IMAGES.values():
        same(form.eval_transform()(image), given(form.processor(), image))


@pytest.mark.parametrize("configuration", ["MobileViT-0", "EfficientNet-0", "PPLCNet-0", "ViT-0", "DINOv3ViT-0", "MobileNetV2-1"])
def test_attacks_see_pixels(configuration):
    """Pixels in [0, 1] in the image's own order, which `PixelModel` turns into what the processor gives; images are as they were."""

    class Network(torch.nn.Module):
        def forward(self, pixel_values):
            return transformers.modeling_outputs.ImageClassifierOutput(logits=pixel_values.flatten(1))

    form = ImageFormat.of_processor(built(configuration))
    model = PixelModel(Network(), form.mean, form.std, order=form.order)
    for image in IMAGES.values():
        pixels = form.eval_transform(normalise=False)(image)
        wanted = given(form.own, image)
        assert torch.allclose(model(pixels[None])[0], wanted.flatten(), atol=1e-4 * max(1, float(wanted.abs().max())))
        looked_at = form.unnormalised(wanted[None])[0]
        assert torch.allclose(looked_at, pixels.clamp(0, 1), atol=1e-4)
    plain = form.eval_transform(normalise=False)(Image.new("RGB", (80, 80), (255, 0, 51)))
    assert torch.allclose(plain[:, plain.shape[1] // 2, plain.shape[2] // 2], torch.tensor([1.0, 0.0, 0.2]), atol=1e-5)
    zero = form.own is not None and torch.tensor(form.neutral).view(1, -1, 1, 1).expand(1, 3, *form.sides)
    assert model(zero).abs().max() < 1e-4


def test_a_network_taught_by_its_processor(tmp_path):
    """A MobileViT sees BGR in [0, 1]: both scripts find the accuracy that it has, and what is saved is its processor."""
    torch.manual_seed(0)
    names = dict(enumerate(COLOURS))
    config = transformers.MobileViTConfig(
        image_size=32, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 64], num_attention_heads=2, num_labels=3,
        id2label=names, label2id={name: row for row, name in names.items()}, hidden_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    network = transformers.MobileViTForImageClassification(config)
    processor = transformers.MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size=square(32))
    images = [picture(40, 40, colour, seed) for seed in range(20) for colour in COLOURS.values()]
    pixels, labels = processor(images=images, return_tensors="pt")["pixel_values"], torch.arange(60) % 3
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average of a few passes
    with torch.no_grad():
        for _ in range(3):
            network.train()(pixels)
        # the trunk stays as it was drawn, the head is fitted by least squares
        features = network.eval().mobilevit(pixels).pooler_output
        mean, spread = features.mean(0), features.std(0) + 1e-6
        scaled = torch.nn.functional.pad((features - mean) / spread, (0, 1), value=1.0).double()
        wanted = torch.nn.functional.one_hot(labels, 3).double() * 10
        head = torch.linalg.solve(scaled.T @ scaled + torch.eye(scaled.shape[1]), scaled.T @ wanted).T.float()
        network.classifier.weight.copy_(head[:, :-1] / spread)
        network.classifier.bias.copy_(head[:, -1] - (head[:, :-1] / spread) @ mean)
        assert torch.equal(network(pixels).logits.argmax(1), labels)
    network.save_pretrained(tmp_path / "net")
    processor.save_pretrained(tmp_path / "net")
    data = folder(tmp_path / "data", 6)
    assert evaluate(tmp_path / "net", tmp_path / "evaluated", "--validation_dir", data, "--protocols", "occlusion")["clean"]["top1"] == 1
    words = ("--model_name_or_path", tmp_path / "net", "--train_dir", data, "--validation_dir", data, "--num_train_epochs", 0)
    assert train(tmp_path / "out", *words)["eval_top1"] == 1
    saved = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert saved.to_dict() == AutoImageProcessor.from_pretrained(tmp_path / "net").to_dict()


@pytest.mark.parametrize("architecture", ["cifar_resnet20", "resnet10t"])
def test_round_trip(tmp_path, architecture):
    """Trained on a folder of images that are not square, then loaded in every way: one accuracy, the same logits."""
    data, held_out = folder(tmp_path / "data", 8, (48, 36)), folder(tmp_path / "held", 3, (36, 60))
    words = ("--train_dir", data, "--validation_dir", held_out, "--architecture", architecture, "--image_size", 32, "--mix", "vanilla")
    words = (*words, "--max_steps", 12, "--per_device_train_batch_size", 12, "--learning_rate", 3e-3, "--horizontal_flip", "false")
    trained = train(tmp_path / "out", *words)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    form = ImageFormat.of_checkpoint(tmp_path / "out")
    classify = pipeline("image-classification", str(tmp_path / "out"), device="cpu", top_k=3)
    loaders = {"ours": form.eval_transform(), "processor": lambda image: given(processor, image)}
    networks = {name: lambda images: model(pixel_values=images).logits for name in loaders}
    if architecture == "resnet10t":
        alone = tmp_path / "alone"  # timm below 1.0.29 reads training_args.bin of a run's folder as the weights
        alone.mkdir()
        for name in ("config.json", "model.safetensors"):
            (alone / name).write_bytes((tmp_path / "out" / name).read_bytes())
        whole = Version(timm.__version__) >= Version("1.0.29")
        theirs = timm.create_model(f"local-dir:{tmp_path / 'out' if whole else alone}", pretrained=True).eval()
        networks["timm"] = theirs
        loaders["timm"] = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs), is_training=False)
        assert not (tmp_path / "out/preprocessor_config.json").exists()  # the network's own config says it
    paths = sorted(held_out.rglob("*.png"))
    labels = [list(COLOURS).index(path.parent.name) for path in paths]
    with torch.no_grad():
        logits = {
            name: torch.cat([networks[name](load(Image.open(path))[None]) for path in paths]).float() for name, load in loaders.items()
        }
    for found in logits.values():
        assert torch.allclose(found, logits["processor"], atol=1e-4)
        assert float((found.argmax(1) == torch.tensor(labels)).float().mean()) == pytest.approx(trained["eval_top1"])
    for path, found in zip(paths, logits["processor"], strict=True):
        scores = {entry["label"]: entry["score"] for entry in classify(str(path))}
        assert [scores[name] for name in COLOURS] == pytest.approx(found.softmax(0).tolist(), abs=1e-4)
    evaluated = evaluate(tmp_path / "out", tmp_path / "evaluated", "--validation_dir", held_out, "--protocols", "occlusion")
    assert evaluated["clean"]["top1"] == pytest.approx(trained["eval_top1"])
    assert evaluated["clean"]["nll"] == pytest.approx(trained["eval_loss"], abs=1e-4)


def test_timm_networks_keep_the_crop_mode():
    form = ImageFormat(32, squash=True)
    network = from_scratch("resnet10t", 3, 32)
    from hf_mixup.networks.backbones import describe_for_timm

    describe_for_timm(network, **form.of_timm().timm_config())
    again = ImageFormat.of_processor(TimmWrapperImageProcessor(network.config.pretrained_cfg))
    assert again.squash
    for image in IMAGES.values():
        same(again.eval_transform()(image), form.of_timm().eval_transform()(image))
