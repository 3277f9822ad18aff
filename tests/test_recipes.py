"""Recipes and networks of the published tables: every row has a recipe, and each network is built as published."""

import copy
import functools
import json
import math
import sys
from dataclasses import fields, replace

import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

from hf_mixup import METHODS, MixupModel, MixupTrainer
from hf_mixup.arguments import MixupTrainingArguments, known_arguments
from hf_mixup.data.processor import ImageFormat
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.backbones import from_scratch
from hf_mixup.networks.names import TABLE_NAMES, same_architecture
from hf_mixup.recipes import read_recipe
from hf_mixup.report.benchmark import TABLE_METHODS, about, published, resolve
from hf_mixup.report.examples import default_architecture
from run_script import ROOT
from small import difference, resnet, trainer

RECIPES = ROOT / "training_scripts/recipes"
# those of run_mixup.py; those of run_pretraining.py are in test_pretraining.py
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("pretrain_"))
ROWS = published(ROOT / "model_cards/published_results.csv")
TESTED = sorted(name for name in NAMES if not (RECIPES / f"{name}.yaml").read_text().startswith("# not tested here"))

# benchmarks/README.md, section 3; None for the CIFAR variants' 3x3 stem
COUNTS = {
    ("ResNet-18", 1000, 224): 11_689_512, ("ResNet-34", 1000, 224): 21_797_672, ("ResNet-50", 1000, 224): 25_557_032,
    ("ResNet-101", 1000, 224): 44_549_160, ("ResNeXt-50-32x4d", 1000, 224): 25_028_904, ("ResNeXt-101-32x4d", 1000, 224): 44_177_704,
    ("EfficientNet-B0", 1000, 224): 5_288_548, ("MobileNetV2-1x", 1000, 224): 3_504_872, ("DeiT-T", 1000, 224): 5_717_416,
    ("DeiT-S", 1000, 224): 22_050_664, ("DeiT-B", 1000, 224): 86_567_656, ("PVT-T", 1000, 224): 13_229_288,
    ("PVT-S", 1000, 224): 24_485_864, ("Swin-T", 1000, 224): 28_288_354, ("ConvNeXt-T", 1000, 224): 28_589_128,
    ("MogaNet-T", 1000, 224): 5_197_332, ("ViT-S", 1000, 224): 48_772_840, ("ViT-L", 1000, 224): 304_326_632,
    ("ResNet-18", 10, 32): 11_173_962, ("ResNet-18", 100, 32): 11_220_132, ("ResNet-18", 200, 64): 11_271_432,
    ("ResNet-34", 10, 32): 21_282_122, ("ResNet-50", 10, 32): 23_520_842, ("ResNet-101", 10, 32): 42_512_970,
    ("ConvNeXt-T", 100, 32): 27_895_012, ("WRN-28-8", 100, 32): 23_409_092,
    ("ResNeXt-50-32x4d", 10, 32): 22_992_714, ("ResNeXt-50-32x4d", 100, 32): 23_177_124, ("ResNeXt-50-32x4d", 200, 64): 23_382_024,
}  # fmt: skip


@pytest.mark.parametrize(("name", "num_labels", "size"), COUNTS, ids=lambda value: str(value))
def test_parameter_counts(name, num_labels, size):
    with torch.device("meta"):
        network = from_scratch(name, num_labels, size)
    assert sum(p.numel() for p in network.parameters()) == COUNTS[name, num_labels, size]


def test_every_backbone_of_the_tables_is_known():
    assert {row["backbone"] for row in ROWS} <= set(TABLE_NAMES)
    assert {name for name, *_ in COUNTS} == set(TABLE_NAMES)


@pytest.mark.parametrize("name", ["MogaNet-T", "PVT-T", "ResNeXt-50-32x4d", "EfficientNet-B0", "ConvNeXt-T", "WRN-28-8"])
def test_saved_networks_load(name, tmp_path):
    size = 32 if name.startswith(("Res", "Conv", "WRN")) else 64
    torch.manual_seed(0)
    network = from_scratch(name, 10, size, drop_path=0.0 if name in ("ResNeXt-50-32x4d", "WRN-28-8") else 0.1).eval()
    network.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert difference(again.state_dict(), network.state_dict()) == 0
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, network(images).logits)


def test_moganet_is_initialised_and_learns():
    """Scales start small, drop path only acts in training, and one step of SGD lowers the loss."""
    torch.manual_seed(0)
    network = from_scratch("MogaNet-T", 4, 64, drop_path=0.5)
    block = network.stages[2][1]
    assert float(block.layer_scale1.scale.detach().std()) == 0
    assert float(block.layer_scale1.scale[0, 0]) == pytest.approx(1e-5)
    rates = [module.drop_path.rate for module in network.modules() if hasattr(module, "drop_path")]
    assert rates == pytest.approx([0.5 * place / 19 for place in range(20)])
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 4
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(images).logits, network(images).logits)
    network.train()
    loss = network(images, labels=labels).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())
    assert sum(p.grad.abs().sum() > 0 for p in network.parameters()) > 0.9 * len(list(network.parameters()))


def test_drop_path_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="drop_path must be 0 for 'cifar_resnet18'"):
        from_scratch("ResNet-18", 10, 32, drop_path=0.1)


def test_names_of_tables_stand_for_both_networks():
    assert same_architecture("ResNet-18", "cifar_resnet18")
    assert same_architecture("resnet18", "ResNet-18")
    assert not same_architecture("ResNet-18", "ResNet-34")
    assert not same_architecture("resnet18", "cifar_resnet18")


# -- recipes ----------------------------------------------------------------------------------------------------------------


def test_overlays(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "learning_rate: 1.0\nalpha: [1.0]\nfor_method:\n  cutmix: {alpha: [0.2]}\n  mixup+cutmix: {alpha: [0.8, 1.0]}\n"
        "for_backbone:\n  ResNet-18: {learning_rate: 2.0, for_method: {cutmix: {alpha: [0.3]}}}\nbenchmark: {measure: best}\n"
    )

    def read(*mix, architecture=None):
        return read_recipe("own", tmp_path, mix=list(mix), network=architecture)

    assert read("mixup") == {"learning_rate": 1.0, "alpha": [1.0]}
    assert read("cutmix") == {"learning_rate": 1.0, "alpha": [0.2]}
    assert read("mixup", "cutmix")["alpha"] == [0.8, 1.0]
    assert read("cutmix", architecture="cifar_resnet18") == {"learning_rate": 2.0, "alpha": [0.3]}
    assert read("mixup", architecture="ResNet-18") == {"learning_rate": 2.0, "alpha": [1.0]}
    (tmp_path / "own.yaml").write_text("for_backbone: {ResNet-18: {for_method: {cutmix: {alfa: [0.3]}}}}\n")
    with pytest.raises(ValueError, match="got 'alfa'; did you mean 'alpha'"):
        read("mixup")
    (tmp_path / "own.yaml").write_text("for_method: {cutmix: [0.2]}\n")
    with pytest.raises(ValueError, match="must map names to arguments under 'for_method'"):
        read("mixup")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_sound(name):
    """Every key is an argument, every overlay is for methods and networks that exist, every method that it names builds."""
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    blocks = [written.get("for_method", {})] + [b.get("for_method", {}) for b in written.get("for_backbone", {}).values()]
    for block in blocks:
        for mix in block:
            arguments = read_recipe(name, RECIPES, mix=mix.split("+"))
            choice(mix.split("+"), arguments)
    assert set(read_recipe(name, RECIPES, mix=["vanilla"])) <= known_arguments()


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "low.yaml").write_text(
        "learning_rate: 1.0\nweight_decay: 0.1\nfor_method: {cutmix: {alpha: [0.2]}}\nbenchmark: {measure: best}\n"
    )
    (tmp_path / "high.yaml").write_text("extends: low\nlearning_rate: 2.0\n")
    assert read_recipe("high", tmp_path, mix=["cutmix"]) == {"learning_rate": 2.0, "weight_decay": 0.1, "alpha": [0.2]}
    assert about("high", tmp_path) == {"measure": "best"}
    own = tmp_path / "folder/own.yaml"
    own.parent.mkdir()
    own.write_text("extends: low\nfor_method: {mixup: {alpha: [0.5]}}\n")  # a key is replaced whole
    assert "alpha" not in read_recipe(str(own), tmp_path, mix=["cutmix"])
    for base, message in (
        ("high", "must extend a recipe that extends none, got one that extends 'low'"),
        ("lwo", "got 'lwo'; did you mean 'low'"),
    ):
        (tmp_path / "higher.yaml").write_text(f"extends: {base}\n")
        with pytest.raises(ValueError, match=message):
            read_recipe("higher", tmp_path)


@pytest.mark.parametrize("data", ["digits100", "cifar10_500"])
def test_what_people_compare_with_stands_beside_every_method(data):
    """Label smoothing, RandAugment and random erasing, of any method, with all else alike; its loss keeps what it is."""
    for name in METHODS:
        plain, *others = (read_recipe(data + more, RECIPES, mix=[name]) for more in ("", "_smoothing", "_randaugment", "_erasing"))
        assert others == [
            plain | {"loss": {"smoothing": 0.1}}, plain | {"auto_augment": "rand-m9-mstd0.5-inc1"}, plain | {"random_erasing": 0.25}
        ]  # fmt: skip
        own, smoothed = (choice([name], arguments).methods[0].loss for arguments in (plain, others[0]))
        assert smoothed == replace(own, smoothing=0.1)


def test_what_the_small_transformer_trains_has_its_arguments_in_the_digits_recipe():
    """No network is typed there, so no `for_backbone` matches. With the arguments of the CNN it hardly learns."""
    written = yaml.safe_load((RECIPES / "digits.yaml").read_text())["for_method"]
    wanted = {name for name in METHODS if default_architecture(MethodChoice.build(name)) == "vit_mini"}
    assert "transmix" in wanted
    assert {name for name in wanted if written.get(name) != written["transmix"]} == set()


@functools.cache
def written_in(recipe) -> dict:
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())


def choice(mix, arguments) -> MethodChoice:
    build = {key: arguments.get(key) for key in ("mix_prob", "alpha", "mix_args", "mode", "loss")}
    return MethodChoice.build(mix, **build)


# printed alphas that the tables' text or the configurations override, or that never had an effect
OTHER_ALPHA = {
    "SmoothMix": "no effect", "TransMix": "DeiT-T: 0.1", "TokenMix": "of Mixup alone", "SMMix": "of Mixup alone",
}  # fmt: skip


def test_every_published_row_resolves():
    assert len(ROWS) == 752
    derived, recipes = set(), set()
    for row in ROWS:
        run = resolve(row, RECIPES)
        recipes.add(run.recipe)
        written = written_in(run.recipe)
        names = "+".join(run.mix)
        assert names in ("vanilla", "smoothmix") or names in written["for_method"], (run.recipe, names)  # SmoothMix has no alpha
        fine_tuned = row["setting"] == "finetune"
        assert ("model_name_or_path" in run.arguments) == fine_tuned
        assert ("--model_name_or_path" in run.words()) == fine_tuned
        assert not fine_tuned or row["backbone"].split("-")[0].lower() in run.arguments["model_name_or_path"]
        assert run.architecture == row["backbone"]
        assert run.arguments["num_train_epochs"] == int(row["epochs"])
        assert run.arguments["image_size"] in (32, 64, 224)
        assert {"dataset_name", "optim", "learning_rate", "weight_decay", "per_device_train_batch_size", "mode"} <= set(run.arguments)
        methods = choice(run.mix, run.arguments).methods
        assert [method.name for method in methods] == list(TABLE_METHODS[row["method"]])
        if run.derived_from:
            derived.add((row["setting"], row["backbone"] if row["setting"] == "deit" else "", row["method"]))
        cutting = row["backbone"] == "ResNet-18" and row["setting"] == "pytorch" and row["dataset"] == "imagenet1k"
        if (
            row["alpha"]
            and row["method"] not in OTHER_ALPHA
            and not (cutting and methods[0].name in ("cutmix", "saliencymix", "fmix", "resizemix"))
        ):
            assert [method.sample.alpha for method in methods] == pytest.approx([float(a) for a in row["alpha"].split(",")]), row
        elif cutting and row["method"] == "CutMix":
            assert methods[0].sample.alpha == 0.2
    assert {("basic", "", "AutoMix"), ("rsb_a2", "", "SAMix"), ("deit", "DeiT-T", "AutoMix"), ("deit", "PVT-S", "AutoMix")} <= derived
    assert {("deit", name, "SAMix") for name in ("DeiT-S", "Swin-T", "PVT-T", "ConvNeXt-T")} <= derived
    assert {("pytorch", "", "Co-Mixup"), ("pytorch", "", "SuperMix")} <= derived
    assert not {("pytorch", "", "AutoMix"), ("deit", "DeiT-S", "AutoMix"), ("basic", "", "PuzzleMix")} & derived
    with_a_table = {path.stem for path in RECIPES.glob("*.yaml") if "table" in (yaml.safe_load(path.read_text()).get("benchmark") or {})}
    assert recipes == with_a_table


@pytest.mark.slow
def test_every_published_row_builds():
    """Its methods on its network, of whose size there are no weights here; a teacher of the Hub is left out."""
    networks, seen = {}, set()
    for row in ROWS:
        run = resolve(row, RECIPES)
        network = (run.architecture, run.arguments["image_size"])
        if (run.mix, network) in seen:
            continue
        seen.add((run.mix, network))
        arguments = copy.deepcopy(run.arguments)
        if "attentivemix" in run.mix:
            arguments["mix_args"]["attentivemix"].pop("teacher")
        with torch.device("meta"):
            if network not in networks:
                networks[network] = from_scratch(*network[:1], 10, network[1])
            MixupModel(networks[network], choice(run.mix, arguments))
    assert len(seen) > 250


def test_what_a_network_has_of_its_own_follows_a_checkpoint():
    """A fine-tuned network is named by its checkpoint: the overlay of its table name would be lost."""
    rows = [row for row in ROWS if (row["dataset"], row["method"]) == ("aircraft", "AdAutoMix")]
    found = {row["backbone"]: resolve(row, RECIPES) for row in rows}
    betas = {name: run.arguments["mix_args"]["adautomix"]["beta"] for name, run in found.items()}
    assert betas == {"ResNet-18": 0.3, "ResNeXt-50-32x4d": 0.6}
    model, _, _, args = parsed(*found["ResNeXt-50-32x4d"].words(), "--output_dir", "/nowhere")
    assert model.model_name_or_path == "timm/resnext50_32x4d.tv_in1k"
    assert args.mix_args["adautomix"]["beta"] == 0.6
    # its image processor has its own crop and normalisation, and folders of images have no columns
    for recipe in ("imagenet_deit_s", "cifar100_basic"):
        _, data, *_ = parsed(
            "--recipe", recipe, "--model_name_or_path", "somebody/checkpoint", "--train_dir", "photos", "--output_dir", "/nowhere"
        )
        assert (data.crop_ratio, data.image_mean, data.image_std, data.dataset_name, data.label_column_name) == (None,) * 5


# -- what a recipe builds ---------------------------------------------------------------------------------------------------

# images of the data set; by recipe: learning rate, its end, steps of warm-up, epochs, images a step, decayed and not decayed tensors
IMAGES = {"cifar10": 50_000, "tiny-imagenet": 100_000, "imagenet-1k": 1_281_167, "inaturalist2018": 437_513, "digits": 100}
BUILT = {
    "cifar10_basic": (0.1, 0.0, 0, 400, 100, (62, 0)),
    "tiny_imagenet": (0.2, 0.0, 0, 400, 100, (62, 0)),
    "imagenet_pytorch_100ep": (0.1, 0.0, 0, 100, 256, (161, 0)),
    "imagenet_pytorch_300ep": (0.1, 0.0, 0, 300, 256, (161, 0)),
    "inaturalist2018": (0.1, 0.0, 0, 100, 256, (161, 0)),
    "imagenet_rsb_a2": (0.005, 1e-6, 5, 300, 2048, (58, 103)),
    "imagenet_rsb_a3": (0.008, 1e-6, 5, 100, 2048, (58, 103)),
    "imagenet_deit_t": (1e-3, 1e-5, 5, 300, 1024, (50, 102)),
    "imagenet_deit_s": (1e-3, 1e-5, 5, 300, 1024, (50, 102)),
    "imagenet_deit_b": (1e-3, 1e-5, 5, 300, 1024, (50, 102)),
    "imagenet_pvt_t": (1e-3, 1e-5, 5, 300, 1024, (59, 118)),
    "imagenet_pvt_s": (1e-3, 1e-5, 5, 300, 1024, (114, 219)),
    "imagenet_swin_t": (1e-3, 1e-5, 20, 300, 1024, (53, 120)),
    "imagenet_convnext_t": (4e-3, 1e-6, 20, 300, 4096, (63, 119)),
    "imagenet_moganet_t": (1e-3, 1e-6, 5, 300, 1024, (226, 404)),
}


# what else a setting has: clipping, drop path, repeated augmentation, EMA, automatic augmentation, erasing, crop ratio
ELSE = {
    "cifar10_basic": (0, 0, 1, None, None, 0, None),
    "tiny_imagenet": (0, 0, 1, None, None, 0, None),
    "imagenet_pytorch_100ep": (0, 0, 1, None, None, 0, 0.875),
    "imagenet_pytorch_300ep": (0, 0, 1, None, None, 0, 0.875),
    "inaturalist2018": (0, 0, 1, None, None, 0, 0.875),
    "imagenet_rsb_a2": (0, 0.05, 3, None, "rand-m7-mstd0.5-inc1", 0, 0.9492),
    "imagenet_rsb_a3": (0, 0, 1, None, "rand-m6-mstd0.5-inc1", 0, 0.9492),
    "imagenet_deit_t": (5, 0, 1, None, "rand-m9-mstd0.5-inc1", 0.25, 0.875),
    "imagenet_deit_s": (5, 0, 1, None, "rand-m9-mstd0.5-inc1", 0.25, 0.875),
    "imagenet_deit_b": (5, 0.1, 3, 0.99996, "rand-m9-mstd0.5-inc1", 0.25, 0.875),
    "imagenet_pvt_t": (0, 0.1, 3, None, "rand-m9-mstd0.5-inc1", 0.25, 0.875),
    "imagenet_pvt_s": (0, 0.1, 3, None, "rand-m9-mstd0.5-inc1", 0.25, 0.875),
    "imagenet_swin_t": (5, 0.2, 1, None, "rand-m9-mstd0.5-inc1", 0.25, 0.875),
    "imagenet_convnext_t": (0, 0.1, 1, 0.9999, "rand-m9-mstd0.5-inc1", 0.25, 0.875),
    "imagenet_moganet_t": (0, 0.1, 1, None, "rand-m7-mstd0.5-inc1", 0.25, 0.9032),
}


def test_recipes_have_what_is_published(tmp_path):
    assert (
        {name for name in TESTED if not name.startswith(("digits", "cifar10_small", "cifar10_500", "finetune", "from_scratch"))}
        == set(ELSE)
        == set(BUILT)
    )
    for name, wanted in ELSE.items():
        model, data, _, args = parsed("--recipe", name, "--output_dir", tmp_path)
        more = (args.ema_decay, data.auto_augment, data.random_erasing, data.crop_ratio)
        assert (args.max_grad_norm, model.drop_path, args.repeated_augmentation, *more) == wanted, name
        assert model.sync_bn is ("rsb" in name)
        smoothing = dict(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))["benchmark"]["table"]["setting"] == "deit"
        assert getattr(args.method_choice().methods[0].loss, "smoothing", 0) == (0.1 if smoothing else 0)


class Counted(torch.utils.data.Dataset):
    """As long as a data set, and empty."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def parsed(*words):
    sys.path.insert(0, str(ROOT / "training_scripts"))
    try:
        from run_mixup import parse
    finally:
        sys.path.pop(0)
    return parse([*map(str, words), "--use_cpu", "--fp16", "False", "--eval_strategy", "no"])


@pytest.mark.parametrize("name", BUILT)
def test_recipe_builds_as_published(name, tmp_path):
    """Network, optimizer, groups, schedule, transforms: without data, as one process that takes the batches of all."""
    lr, end, warmup, epochs, images_a_step, groups = BUILT[name]
    about = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    _, _, _, args = parsed("--recipe", name, "--output_dir", tmp_path)
    batch = args.per_device_train_batch_size * about["benchmark"]["processes"]
    assert batch * args.gradient_accumulation_steps == images_a_step
    model, data, _, args = parsed("--recipe", name, "--output_dir", tmp_path, "--per_device_train_batch_size", batch, "--mix", "cutmix")
    assert args.num_train_epochs == epochs
    form = ImageFormat(data.image_size, data.crop_ratio or 1.0)
    network = from_scratch(model.architecture, 10, form.size, drop_path=model.drop_path)
    images = IMAGES[data.dataset_name.split("/")[-1]]
    done = MixupTrainer(network, args, train_dataset=Counted(images))
    whole = images // batch if args.repeated_augmentation > 1 else math.ceil(images / batch)
    per_epoch = math.ceil(whole / args.gradient_accumulation_steps)
    done.create_optimizer_and_scheduler(per_epoch * epochs)
    assert (type(done.optimizer).__name__, args.optim) in (("SGD", "sgd"), ("AdamW", "adamw_torch"), ("Lamb", "lamb"))

    counts = [0, 0]
    for group in done.optimizer.param_groups:
        assert group["weight_decay"] in (0, args.weight_decay)
        counts[group["weight_decay"] == 0] += len(group["params"])
    assert tuple(counts) == groups
    if args.optim == "sgd":
        assert all(group["momentum"] == 0.9 for group in done.optimizer.param_groups)

    # by the epoch with SGD and LAMB, by the step with AdamW; a warm-up is laid over the curve
    curve = done.lr_scheduler.lr_lambdas[0]

    def at(step):
        return lr * curve(step)

    by_epoch = args.optim != "adamw_torch"
    half = epochs // 2 * per_epoch
    assert at(half) == pytest.approx((lr + end) / 2)
    assert (at(half + per_epoch - 1) == at(half)) is by_epoch
    last = epochs - 1 if by_epoch else epochs - 1 / per_epoch
    assert at(epochs * per_epoch - 1) == pytest.approx(end + (lr - end) * (1 + math.cos(math.pi * last / epochs)) / 2)
    if warmup:
        middle = warmup * per_epoch // 2
        reached = middle // per_epoch if by_epoch else middle / per_epoch
        share = middle / (warmup * per_epoch)
        assert at(0) < 2e-5 * lr
        assert at(middle) == pytest.approx((end + (lr - end) * (1 + math.cos(math.pi * reached / epochs)) / 2) * share, rel=1e-4)
    else:
        assert at(0) == lr


def test_averages_of_weights_follow_and_are_shipped(tmp_path):
    """The EMA is what is evaluated and saved; a resumed run has both; the average is `decay * ema + (1 - decay) * weights`."""
    changes = {"mix": ["cutmix"], "ema_decay": 0.9, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    done = trainer(tmp_path / "a", resnet(), **changes)
    before = {name: p.clone() for name, p in done.mixup_model.ema.network.named_parameters()}
    seen = []
    original = done.mixup_model.after_optimizer_step
    done.mixup_model.after_optimizer_step = lambda *args: (
        original(*args),
        seen.append({n: p.clone() for n, p in done.mixup_model.backbone.named_parameters()}),
    )
    done.train()
    for name, average in done.mixup_model.ema.network.named_parameters():
        expected = before[name]
        for weights in seen:
            expected = 0.9 * expected + 0.1 * weights[name]
        torch.testing.assert_close(average, expected)
    done.save_model(str(tmp_path / "saved"))
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert difference(plain.state_dict(), done.mixup_model.ema.network.state_dict()) == 0
    from hf_mixup import MixupModel

    again = MixupModel.from_pretrained(tmp_path / "saved")
    assert difference(again.state_dict(), done.mixup_model.state_dict()) == 0
    resumed = trainer(tmp_path / "b", resnet(), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert difference(resumed.mixup_model.state_dict(), done.mixup_model.state_dict()) == 0


def test_teachers_need_no_second_average(tmp_path):
    with pytest.raises(ValueError, match=r"ema_decay must be left out for automix, whose teacher already is an average .*, got 0\.9"):
        trainer(tmp_path, resnet(), mix=["automix"], ema_decay=0.9)


def test_an_average_of_half_precision_weights_moves():
    """A step of a thousandth is lost in bfloat16; the average is kept in float32."""
    from hf_mixup import MixupModel

    model = MixupModel(resnet().bfloat16(), "cutmix", ema_decay=0.999)
    before = {name: p.clone() for name, p in model.ema.named_parameters()}
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1.0)
    model.after_optimizer_step(0, 100)
    for name, average in model.ema.named_parameters():
        torch.testing.assert_close(average, before[name] + 0.001, atol=1e-5, rtol=0)
    assert model.eval()(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).logits.dtype == torch.float32


def test_a_run_with_an_average_is_trained_on_with_it(tmp_path):
    """The decay and the repeats are part of the saved model."""
    from hf_mixup import MixupModel

    first = MixupModel(resnet(), "cutmix", ema_decay=0.9, mix_repeat=3)
    first.save_pretrained(tmp_path / "saved")
    model = MixupModel.from_pretrained(tmp_path / "saved")
    assert (model.ema_decay, model.mix_repeat) == (0.9, 3)
    done = trainer(tmp_path / "run", model, mix=["cutmix"], ema_decay=0.9, mix_repeat=3, max_steps=2)
    done.train()
    assert difference(done.mixup_model.ema.network.state_dict(), done.mixup_model.backbone.state_dict()) > 0


@pytest.mark.parametrize(("then", "now"), [(0.9, None), (None, 0.9)])
def test_an_average_switched_on_or_off_is_refused_by_its_name(tmp_path, then, now):
    from hf_mixup import MixupModel

    MixupModel(resnet(), "cutmix", ema_decay=then).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"with(out)? an average of the weights \(EMA\), got ema_decay="):
        MixupModel(resnet(), "cutmix", ema_decay=now).restore(tmp_path)


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="one of warmup_epochs and warmup_steps"):
        MixupTrainingArguments(str(tmp_path), use_cpu=True, warmup_epochs=1, warmup_steps=10, lr_scheduler_type="cosine")
    with pytest.raises(ValueError, match="lr_scheduler_type='cosine'"):
        MixupTrainingArguments(str(tmp_path), use_cpu=True, warmup_epochs=1)
    args = MixupTrainingArguments(str(tmp_path), use_cpu=True, optim="lamb")
    assert json.loads(args.to_json_string())["optim"] == "lamb"
    assert {field.name for field in fields(args)} >= {"warmup_epochs", "ema_decay"}
