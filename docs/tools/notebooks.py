"""Writes the notebooks from the cells below, and runs them: `python docs/tools/notebooks.py`. Their outputs are small, and are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"

MIX = [
    ("markdown", "# Mix and look\n\nTwo photographs, a few methods, and what happens to pixels and labels. It runs on a CPU in seconds."),
    (
        "code",
        """import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

names = ["cat", "coffee"]
images = torch.stack([pil_to_tensor(Image.open(f"../pictures/{name}.jpg")) / 255 for name in names])
labels = torch.tensor([0, 1])
images.shape, labels""",
    ),
    ("markdown", "A method is called on a batch. Targets have one row for each image, and each row adds up to 1."),
    (
        "code",
        """from hf_mixup import get_method
from hf_mixup.core.rng import keyed

mixed, targets = get_method("cutmix")(images, labels, num_labels=2, generator=keyed(5))
targets""",
    ),
    (
        "markdown",
        "A *plan* describes how a method mixes: partners, lam and a mask.",
    ),
    (
        "code",
        """plan = get_method("cutmix").plan(images, generator=keyed(5))
mask = plan.dense_mask((224, 224))  # (images, sources, height, width): the share of each image in every pixel
print("partners", plan.partners.tolist(), " lam", [round(float(x), 2) for x in plan.lam], " masks", tuple(mask.shape))""",
    ),
    (
        "markdown",
        "Both in a picture. Blue is the own image, in the mask and in the bar of its label. Orange is the partner.",
    ),
    (
        "code",
        """import io
import os
from IPython.display import Image as Shown
from hf_mixup import blend, mix_targets
from hf_mixup.report.plots import gallery

def mixture(name, row=0):
    plan = get_method(name).plan(images, generator=keyed(5))
    return {
        "title": name, "own": images[row], "partner": images[plan.partners[row, 0]], "mask": plan.dense_mask((224, 224))[row, 0],
        "mixed": blend(plan, images)[row], "target": mix_targets(plan, labels, num_labels=2)[row], "own_class": int(labels[row]),
    }

def show(columns):
    gallery("mixtures.png", columns, names)
    stream = io.BytesIO()
    picture = Image.open("mixtures.png").convert("RGB")
    picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)).save(stream, format="jpeg", quality=75)
    os.remove("mixtures.png")
    return Shown(stream.getvalue(), format="jpg")

show([mixture("cutmix", row=0), mixture("cutmix", row=1)])""",
    ),
    ("markdown", "Several methods on the same pair. The same key gives the same draw."),
    (
        "code",
        """show([mixture(name) for name in ("mixup", "cutmix", "fmix", "gridmix", "resizemix", "smoothmix")])""",
    ),
    ("markdown", "How alpha changes lam. An image is nearly whole if the other image has less than a tenth of it."),
    (
        "code",
        """many = torch.zeros(4000, 1, 2, 2)
print(f"n = {len(many)} draws for each alpha")
for alpha in (0.2, 0.8, 1.0, 2.0):
    lam = get_method("mixup", alpha=alpha).plan(many, generator=keyed(0)).lam
    nearly_whole = ((lam > 0.9) | (lam < 0.1)).float().mean()
    print(f"alpha {alpha}: mean lam {lam.mean():.2f}, nearly whole {100 * nearly_whole:.0f} %")""",
    ),
]

HELP = [
    (
        "markdown",
        "# Did it help?\n\n"
        "A network is first trained on 1,000 real images without mixing. Then it is fine-tuned, once with and once without mixing, and both results are compared. The images are a part of CIFAR-10 from the Hub. Instead, the environment variable `CIFAR10` can name a folder with its parquet files. On two CPU cores it takes a few minutes.\n\n"
        "Do not expect a gain: few epochs are too few for mixing. The notebook shows how to find that out.",
    ),
    (
        "code",
        """import os
import torch
from datasets import load_dataset
from transformers import set_seed

data = load_dataset(os.environ.get("CIFAR10", "uoft-cs/cifar10"))
train, test = data["train"].select(range(1000)), data["test"].select(range(1000))

def prepare(rows):
    pixels = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(32, 32, 3) for image in rows["img"]]
    return {"pixel_values": [(p.permute(2, 0, 1) / 255 - 0.47) / 0.25 for p in pixels], "labels": rows["label"]}

train, test = train.with_transform(prepare), test.with_transform(prepare)
len(train), len(test)""",
    ),
    (
        "markdown",
        "Two runs from the same start: 4 epochs without mixing, then 4 more with `vanilla` (no mixing) or with `mixup` + `cutmix`.",
    ),
    (
        "code",
        """import copy
import logging
import warnings
import transformers
from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.networks.backbones import from_scratch

transformers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore")
EPOCHS = float(os.environ.get("EPOCHS", 4))

def run(network, seed, **mixing):
    args = MixupTrainingArguments(
        "runs/notebook", num_train_epochs=EPOCHS, per_device_train_batch_size=50, learning_rate=3e-3, lr_scheduler_type="cosine",
        seed=seed, report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no", **mixing,
    )
    trainer = MixupTrainer(network, args, train_dataset=train, eval_dataset=test)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return network, 100 * trainer.evaluate()["eval_top1"]

rows = []
for seed in (1, 2):
    set_seed(seed)
    network, start = run(from_scratch("cifar_resnet20", 10, 32), seed, mix="vanilla")
    _, plain = run(copy.deepcopy(network), seed, mix="vanilla")
    _, mixed = run(copy.deepcopy(network), seed, mix=["mixup", "cutmix"], alpha=[0.2, 1.0])
    rows.append((seed, start, plain, mixed))
print(f"top-1 accuracy in %, n = {len(test)} test images, {len(rows)} seeds")
print("seed  start  vanilla  mixup + cutmix")
for seed, start, plain, mixed in rows:
    print(f"{seed:4d}  {start:5.1f}  {plain:7.1f}  {mixed:14.1f}")""",
    ),
    ("markdown", "Compare seed by seed. Trust a gain only if it is larger than the differences between seeds."),
    (
        "code",
        """gains = [mixed - plain for _, _, plain, mixed in rows]
print(f"gain by mixing: {sum(gains) / len(gains):+.1f} points, from {min(gains):+.1f} to {max(gains):+.1f} (n = {len(gains)} seeds)")""",
    ),
    (
        "markdown",
        "On your own photographs the command line does the same, with tables and charts:\n\n"
        "```text\nhf-mixup benchmark --recipe finetune --mix vanilla mixup cutmix --seeds 3 -- --train_dir photos/train ...\n```",
    ),
]

AUTOMIX = [
    (
        "markdown",
        "# AutoMix and its masks\n\nAutoMix trains a small mask network together with the classifier. Here both train for a short time on the digits of scikit-learn, and you see the masks before and after.",
    ),
    (
        "code",
        """import os
import torch
import transformers
import warnings
from hf_mixup import MixupModel, MixupTrainer, MixupTrainingArguments
from hf_mixup.data.sources import digits
from hf_mixup.data.processor import ImageFormat
from hf_mixup.networks.backbones import from_scratch

transformers.utils.logging.set_verbosity_error()
warnings.filterwarnings("ignore")
torch.manual_seed(0)
form = ImageFormat(32)
transform = form.eval_transform()
train = [{"pixel_values": transform(row["image"]), "labels": row["label"]} for row in digits()["train"].select(range(400))]
model = MixupModel(from_scratch("cifar_resnet20", 10, 32), "automix", mix_args={"automix": {"mask_loss": 1.0}})
len(train), train[0]["pixel_values"].shape""",
    ),
    (
        "markdown",
        "The masks of three pairs at lam 0.1 to 0.9, from the untrained mask network. They are grey: every pixel has the same share.",
    ),
    (
        "code",
        """import io
from IPython.display import Image as Shown
from PIL import Image
from hf_mixup.report.examples import LAMS, masks_of_mixers
from hf_mixup.report.plots import masks_by_lam

pixels = torch.stack([train[row]["pixel_values"] for row in (3, 4, 7)])

def masks():
    columns = masks_of_mixers(model, pixels, form)["automix"]
    masks_by_lam("masks.png", columns, LAMS)
    stream = io.BytesIO()
    Image.open("masks.png").convert("RGB").resize((610, 610)).save(stream, format="jpeg", quality=75)
    os.remove("masks.png")
    return Shown(stream.getvalue(), format="jpg")

masks()""",
    ),
    (
        "code",
        """args = MixupTrainingArguments(
    "runs/automix", max_steps=int(os.environ.get("STEPS", 150)), per_device_train_batch_size=40, learning_rate=3e-3,
    mixer_learning_rate=0.03, report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
)
trainer = MixupTrainer(model, args, train_dataset=train)
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
masks()""",
    ),
    (
        "markdown",
        "This training is very short. The masks already differ from place to place, and their area, the share of the own image, rises with lam. In a long training they follow the shapes, and the area gets close to lam. The label uses lam, not the area.\n\nOn your own images `hf-mixup train --mix automix` draws such pictures into `masks/` of the run, up to ten times.",
    ),
]

NOTEBOOKS = {"mix_and_look": MIX, "did_it_help": HELP, "automix_masks": AUTOMIX}


def built(name: str) -> nbformat.NotebookNode:
    """The notebook, not run yet."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    book = nbformat.v4.new_notebook(cells=[make[kind](text) for kind, text in NOTEBOOKS[name]])
    for place, cell in enumerate(book.cells):
        cell["id"] = f"cell-{place}"
    book.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    return book


def run(book: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Runs the cells in a folder; raises CellExecutionError for a cell that fails."""
    NotebookClient(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # what libraries say on standard error is not of interest, and names paths of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return book


def main(names: list[str]) -> None:
    for name in names or NOTEBOOKS:
        nbformat.write(run(built(name), FOLDER), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
