"""The fault table: bad input and settings get one sentence that says what was expected, what was seen and what to do.

The numbers are the rows of the table in CONTRIBUTING.md. Rows about resuming, processes, the Hub or signals have their tests in the files of these
subjects. All are named `test_row_NN`.
"""

import ast
import io
import logging
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer

from hf_mixup import METHODS, MixupCollator, MixupLoss, MixupModel, MixupTrainer, get_method
from hf_mixup.core.losses import BCE
from hf_mixup.core.rng import MixKey, beta
from hf_mixup.method import needs_of_model
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.signals.features import classifier_of
from refusals import refuses
from small import Images, arguments, network_for, trainer, vit

KEY = MixKey(0, 0, 0)


def batch(count=4, num_labels=4, size=16):
    return [{"pixel_values": torch.randn(3, size, size), "labels": i % num_labels} for i in range(count)]


def in_trainer(tmp_path, examples, **changes):
    """Trains on these examples with MixupTrainer."""
    run = trainer(tmp_path, data=examples, per_device_train_batch_size=max(2, len(examples)), max_steps=1, **changes)
    run.train()


def in_collator(tmp_path, examples, **changes):
    MixupCollator("cutmix", num_labels=4)(examples)


both_paths = pytest.mark.parametrize("path", [in_trainer, in_collator], ids=["trainer", "collator"])


def with_pixels(row, pixels, count=4):
    examples = batch(count)
    examples[row]["pixel_values"] = pixels
    return examples


def with_label(row, label, count=4):
    examples = batch(count)
    examples[row]["labels"] = label
    return examples


def test_row_01_batch_of_one_passes_unmixed(tmp_path, caplog):
    from hf_mixup.data import collator

    collator._logged.clear()
    collate = MixupCollator("cutmix", num_labels=4)
    with caplog.at_level(logging.WARNING, "hf_mixup.data.collator"):
        for _ in range(2):
            example = batch(1)
            mixed = collate(example)
            assert torch.equal(mixed["pixel_values"][0], example[0]["pixel_values"])
            assert mixed["labels"].tolist() == [[1, 0, 0, 0]]
    assert len(caplog.records) == 1
    model = MixupModel(vit(), "cutmix").train()
    image = torch.randn(1, 3, 16, 16)
    assert_close(
        model(image, torch.tensor([1]), mix_key=KEY).loss,
        torch.nn.functional.cross_entropy(model.backbone(image).logits, torch.tensor([1])),
    )
    with refuses("at least 2 images in a batch, got per_device_train_batch_size=1; raise it"):
        arguments(tmp_path, per_device_train_batch_size=1)
    arguments(tmp_path, per_device_train_batch_size=1, mix=["vanilla"])


def test_row_02_empty_batch():
    with refuses("at least 2 images in a batch, got 0"):
        MixupCollator("cutmix", num_labels=4)([])
    with refuses("at least 2 images in a batch, got 0"):
        METHODS["cutmix"](torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64), 4)


@pytest.mark.parametrize("count", [3, 5, 7])
def test_row_03_odd_batches_work(count):
    assert MixupCollator("mixup", num_labels=4)(batch(count))["labels"].shape == (count, 4)


@both_paths
@pytest.mark.parametrize("label", [4, -1])
def test_row_04_label_out_of_range(tmp_path, path, label):
    with refuses(rf"labels must be from 0 to 3, got {label} at row \d of the batch; correct the labels in the data set"):
        path(tmp_path, with_label(2, label))


@both_paths
def test_row_05_ignore_index(tmp_path, path):
    with refuses(r"got the ignore index -100 at row \d; it is not supported when mixing"):
        path(tmp_path, with_label(1, -100))


def test_row_06_num_labels_of_collator_and_model(tmp_path):
    with refuses("must agree on num_labels, got 5 and 4; make them equal"):
        MixupTrainer(vit(), arguments(tmp_path), data_collator=MixupCollator("cutmix", num_labels=5), train_dataset=Images())


@both_paths
def test_row_07_integer_images(tmp_path, path):
    """Bytes can be mixed by a collator, but no network sees them before something normalises them; other integers are never pixels."""
    for kind in (torch.uint8, torch.int16, torch.int64):
        examples = [{**example, "pixel_values": torch.zeros(3, 16, 16, dtype=kind)} for example in batch()]
        if path is in_collator and kind == torch.uint8:
            continue
        with refuses(f"images must be floating point, got {str(kind).removeprefix('torch.')}; normalise first", TypeError):
            path(tmp_path, examples)
    examples = [{**example, "pixel_values": torch.zeros(3, 16, 16, dtype=torch.uint8)} for example in batch()]
    with refuses("images must be floating point, got uint8; normalise first", TypeError):
        in_trainer(tmp_path, examples, data_collator=MixupCollator("cutmix", num_labels=4))


@both_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_row_08_pixels_that_are_no_numbers(tmp_path, path, bad):
    pixels = torch.randn(3, 16, 16)
    pixels[1, 2, 3] = bad
    with refuses(r"images must be finite, got NaN or infinity in rows \[.*\] of the batch; repair"):
        path(tmp_path, with_pixels(1, pixels))
    MixupCollator("cutmix", num_labels=4, check_finite=False)(with_pixels(1, pixels))


@both_paths
def test_row_09_images_of_several_sizes(tmp_path, path):
    with refuses(r"must have one size, got \(3, 16, 16\), \(3, 16, 20\); add Resize"):
        path(tmp_path, with_pixels(1, torch.randn(3, 16, 20)))


@both_paths
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 16), r"shape \(B, C, H, W\), got \(4, 16, 16\)"),
        ((16, 16, 3), r"channels first, \(B, C, H, W\), got \(4, 16, 16, 3\); use permute"),
    ],
    ids=["3-D", "channels last"],
)
def test_row_10_other_shapes(tmp_path, path, shape, message):
    with refuses(message):
        path(tmp_path, [{**example, "pixel_values": torch.randn(shape)} for example in batch()])


@pytest.mark.parametrize("channels", [1, 4])
def test_row_11_other_channels_work(channels):
    mixed, _ = METHODS["cutmix"](torch.randn(4, channels, 8, 8), torch.arange(4), 4)
    assert mixed.shape == (4, channels, 8, 8)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), "1", None, True])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_row_13_alpha(name, alpha):
    with refuses(r"alpha must be a positive, finite number, got .*; to train without mixing use the method 'vanilla'"):
        get_method(name, alpha=alpha)


def test_row_14_tiny_alpha():
    rng = torch.Generator().manual_seed(0)
    for alpha in (1e-4, 1e-3):
        lam = beta(alpha, 20_000, rng)
        assert torch.isfinite(lam).all()
        # Beta(a, a) has variance 1 / (4 (2a + 1)); two underflowing Gammas would give 0.5 again and again
        assert lam.std().item() == pytest.approx((1 / (4 * (2 * alpha + 1))) ** 0.5, rel=0.01)
        assert (lam == 0.5).sum() == 0


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [([0.5], "one probability for each of the 2 methods, got 1"), ([1.2, -0.2], "at least 0"), ([0.4, 0.4], "which sums to 0.8; rescale")],
)
def test_row_15_probabilities(tmp_path, probabilities, message):
    with refuses(message):
        MixupCollator(["mixup", "cutmix"], num_labels=4, mix_prob=probabilities)
    with refuses(message):
        arguments(tmp_path, mix_prob=probabilities)


def test_row_15_sums_are_not_compared_exactly():
    given = [0.1] * 10
    assert sum(given) != 1
    from hf_mixup.core.checks import check_probabilities

    check_probabilities(given, 10)
    assert given == [0.1] * 10, "the caller's list is not changed"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_method("cutmx"), "method must be a known name, got 'cutmx'; did you mean 'cutmix'"),
        (lambda: get_method("cutmix", alhpa=1), "got 'alhpa'; did you mean 'alpha'"),
        (lambda: MixupCollator(["mixup", "cut_mix"]), "got 'cut_mix'; did you mean 'cutmix'"),
        (lambda: MethodChoice.build("mixup", mix_args={"cutmix": {}}), "for the methods in use, got 'cutmix'"),
        (lambda: MethodChoice.build("mixup", mix_args={"mixup": {"mode": "sampel"}}), "mode must be a known name, got 'sampel'; did you mean 'sample'"),
        (lambda: MethodChoice.build(["mixup", "mixup"]), "name every method once"),
        (lambda: MethodChoice.build(["mixup", "cutmix"], alpha=[1, 2, 3]), "each of the 2 methods, got 3"),
        (lambda: MethodChoice.build([]), "at least one method, got none"),
        (lambda: get_method("mixup", loss="crossentrpy"), "loss must be a known name, got 'crossentrpy'; did you mean 'crossentropy'"),
        (lambda: get_method("mixup", loss={"name": "bce", "treshold": 1}), "got 'treshold'; did you mean"),
    ],
)  # fmt: skip
def test_row_16_unknown_names(make, message):
    with refuses(message):
        make()


def test_row_16_unknown_mix_args_of_the_command_line(tmp_path):
    with refuses(r"mix_args must be JSON such as .*, got '\{cutmix: 1\}'"):
        arguments(tmp_path, mix_args="{cutmix: 1}")


def test_row_19_multi_label_targets(tmp_path):
    many = [{**example, "labels": torch.tensor([1.0, 1, 0, 1])} for example in batch()]
    with refuses("sum to 1 for a cross-entropy loss, got a sum of 3 at row 0; for multi-label targets use the loss 'bce'"):
        in_trainer(tmp_path, many)
    in_trainer(tmp_path, many, loss="bce")
    mixed = MixupCollator("mixup", num_labels=4)(many)
    logits = torch.randn(4, 4)
    with refuses("for multi-label targets use the loss 'bce'"):
        MixupLoss()({"logits": logits}, mixed["labels"])
    assert torch.isfinite(MixupLoss(loss=BCE())({"logits": logits}, mixed["labels"]))


def test_row_20_soft_rows_that_are_no_distribution(tmp_path):
    with refuses(r"sum of 0\.9 at row \d"):
        in_trainer(tmp_path, [{**e, "labels": torch.tensor([0.5, 0.4 + 0.1 * (i != 1), 0, 0])} for i, e in enumerate(batch())])


def test_row_21_label_smoothing_factor(tmp_path):
    with refuses(r"label_smoothing_factor must be 0 when mixing, got 0.1; smooth the mixed target with --loss"):
        arguments(tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize(("column", "message"), [("pixel_values", "pixel_values"), ("labels", "'labels'")])
def test_row_22_missing_columns(tmp_path, column, message):
    examples = [{("renamed" if name == column else name): value for name, value in example.items()} for example in batch()]
    with refuses(rf"must have .*{message}.*got \[.*'renamed'"):
        in_collator(tmp_path, examples)
    with refuses(rf"must have .*{message}.*got \[.*\]; rename"):
        in_trainer(tmp_path, examples)


@pytest.mark.parametrize("labels", [["cat", "dog"], [0, None], [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]], ids=str)
def test_row_22_columns_that_hold_no_labels(labels):
    examples = [{**example, "labels": label} for example, label in zip(batch(2), labels, strict=True)]
    with refuses("labels must be class numbers, or soft labels of one length, got .*; convert names to class numbers", TypeError):
        MixupCollator("cutmix", num_labels=4)(examples)


def test_row_22_columns_dropped_by_the_trainer(tmp_path):
    from datasets import Dataset

    data = Dataset.from_dict({"pixels": [[0.0]] * 4, "labels": [0, 1, 2, 3]})
    with refuses(r"must have 'pixel_values' and 'labels', got \['labels', 'pixels'\]; rename"):
        in_trainer(tmp_path, data)


def test_row_23_corrupt_image(tmp_path):
    from datasets import Dataset, Features, Image, Value

    from hf_mixup.data.dataset import ImageDataset
    from hf_mixup.data.processor import ImageFormat

    digit = io.BytesIO()
    PIL.Image.new("L", (8, 8)).save(digit, "png")
    rows = {"image": [{"bytes": digit.getvalue()}] * 5 + [{"bytes": digit.getvalue()[:40]}], "label": [0, 1, 2, 3, 0, 1]}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
    data = ImageDataset(data, "image", "label", ImageFormat(16).eval_transform())
    with refuses(r"every row must hold a readable image, got an error at row 5 \(.*\); repair or drop that row"):
        in_trainer(tmp_path, data)


def streaming():
    """The images of `Images` as a streaming data set."""
    from datasets import Dataset

    data = Images()
    rows = Dataset.from_dict({"row": range(len(data))}).to_iterable_dataset()
    return rows.map(lambda example: data[example["row"]], remove_columns="row")


def test_row_24_streaming(tmp_path):
    with refuses(r"without length needs max_steps, got IterableDataset and -1; set"):
        trainer(tmp_path, data=streaming(), max_steps=-1)
    run = trainer(tmp_path, data=streaming(), max_steps=12, save_strategy="steps", save_steps=6)
    run.train()
    assert run.state.global_step == 12
    again = trainer(tmp_path, data=streaming(), max_steps=14)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 14


def test_row_24_streaming_in_a_stock_trainer(tmp_path):
    from hf_mixup import MixupCallback
    from test_collator import plain_arguments

    seen = []
    loss = MixupLoss()

    def watched(outputs, labels, num_items_in_batch=None):
        seen.append(labels)
        return loss(outputs, labels, num_items_in_batch)

    Trainer(
        vit(), plain_arguments(tmp_path, max_steps=10), train_dataset=streaming(), compute_loss_func=watched,
        callbacks=[MixupCallback(MixupCollator("cutmix", num_labels=4))],
    ).train()  # fmt: skip
    assert len(seen) == 10
    assert all((labels.max(1).values < 1).any() for labels in seen)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if needs_of_model(method)])
def test_row_31_a_network_that_says_nothing(name):
    """Without weights in its classifier every gradient and activation map is zero: a mixture comes out, and not 0 / 0."""
    model = MixupModel(network_for(name), name).train()
    with torch.no_grad():
        for network in (model.backbone, model.deployed):
            for parameter in classifier_of(network).parameters():
                parameter.zero_()
    outputs = model(torch.randn(4, 3, 16, 16), torch.arange(4), mix_key=KEY)
    assert torch.isfinite(outputs.loss)
    assert torch.isfinite(outputs.targets).all()
    outputs.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def test_training_without_a_key_names_the_trainer():
    with refuses("train with MixupTrainer, which passes it"):
        MixupModel(vit(), "cutmix").train()(torch.randn(4, 3, 16, 16), torch.arange(4))


def test_row_42_used_output_folder(tmp_path):
    from run_script import run_mixup

    (tmp_path / "old.txt").write_text("precious")
    done = run_mixup("--output_dir", tmp_path, "--max_steps", "1", check=False)
    assert done.returncode != 0
    assert "must be new or empty" in done.stderr
    assert "--resume_from_checkpoint" in done.stderr
    assert "--overwrite_output_dir" in done.stderr


def test_row_44_broken_torchvision(tmp_path):
    """A torchvision that does not fit the installed torch makes every import of transformers fail, with a riddle."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from hf_mixup import MixupTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "torch and torchvision must be a matching pair, got torch" in last
    assert "install both together" in last


def test_row_45_older_transformers(tmp_path, monkeypatch):
    """The number is the lower bound of setup.py."""
    bound = re.search(r'"transformers>=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.16.1")
    with refuses(rf"MixupTrainer needs transformers {re.escape(bound)} or newer, got 5\.16\.1; run `pip install", ImportError):
        trainer(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "6.0.0.dev0")
    trainer(tmp_path)


ROOT = Path(__file__).parents[1]


def test_every_row_of_the_table_has_a_test():
    named = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    tested = {int(row) for row in re.findall(r"^def test_row_(\d\d)_", named, re.MULTILINE)}
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## The fault table")[1]
    rows = [int(row) for row in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert rows == list(range(1, 46))
    assert tested == set(rows)


def written(message: ast.expr) -> str:
    """The text of a message in the source, with `{}` for what is filled in."""
    match message:
        case ast.Constant(value):
            return str(value)
        case ast.JoinedStr(values):
            return "".join(map(written, values))
        case ast.BinOp(left, _, right):
            return written(left) + written(right)
    return "{}"


def test_every_refusal_has_three_parts():
    """All messages that are raised anywhere, whether or not a test provokes them."""
    odd = []
    for path in [*(ROOT / "hf_mixup").rglob("*.py"), *(ROOT / "training_scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = written(node.exc.args[0])
                # a name that a module lacks is Python's own sentence; `{}` is made elsewhere, and told by the tests of the Hub
                if ast.unparse(node.exc.func) != "AttributeError" and message != "{}" and not re.search(r"[,;] got .+; .+", message):
                    odd.append(f"{path.name}:{node.lineno}: {message}")
    assert not odd, "\n".join(odd)
