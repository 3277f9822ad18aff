"""Draws mixtures of images: `hf-mixup visualize --mix mixup cutmix`, or `--all`.

A column a mixture: the two images, the mask, what the network is shown, the mixed label. Without images of yours, of two photographs; with
`--inputs videos`, `spectrograms` or `waveforms`, of small data sets that are made here.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from PIL import Image

from hf_mixup import MixupModel
from hf_mixup.arguments import FOR_TRAINING, DataArguments, parse_json
from hf_mixup.cli.parser import Parser
from hf_mixup.cli.refusals import log_to_screen, run
from hf_mixup.core.checks import check_between, check_count, check_known
from hf_mixup.data.dataset import ImageDataset
from hf_mixup.data.labels import NUMBER, network_classes
from hf_mixup.data.made import MELODIES, RATE, digit_pictures, digit_videos, melodies
from hf_mixup.data.pixels import read_image
from hf_mixup.data.processor import ImageFormat, format_from_scratch, format_of_checkpoint
from hf_mixup.data.sources import KnownClasses, load_images
from hf_mixup.method import CONFIG_NAME
from hf_mixup.methods import METHODS, MethodChoice
from hf_mixup.networks.backbones import channels_of, check_takes, checkpoint_config, from_scratch, load_classifier
from hf_mixup.report.examples import LAMS, Recordings, default_architecture, drawn, masks_of_mixers, pairs_of_every_method, varied
from hf_mixup.report.plots import gallery, masks_by_lam, overview
from hf_mixup.report.run_folder import RunFolder

# arguments that have no effect beside another
IDLE = {
    "all": ("alpha", "mix_args", "activations", "masks", "count"),
    "masks": ("mix", "alpha", "mix_args", "activations", "count"),
    "images": ("dataset_name", "train_dir", "validation_dir"),
}
# arguments of data that have an effect on any images
OF_FORMAT = ("image_size", "channels", "image_mean", "image_std", "crop_ratio")
logger = logging.getLogger("visualize_mixup")


@dataclass
class PictureArguments:
    """What to draw."""

    mix: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Methods, one mixture of each in turn. Default: those of the checkpoint, or mixup and cutmix. Choices: {', '.join(METHODS)}."
        },
    )
    all: bool = field(default=False, metadata={"help": "One picture of the same two images mixed by every method."})
    alpha: list[float] | None = field(default=None, metadata={"help": "Alpha of each method, or one value for all."})
    mix_args: str | None = field(default=None, metadata={"help": "Other hyper-parameters by method, as JSON."})
    inputs: str = field(
        default="images",
        metadata={
            "help": "What is mixed: images, videos, spectrograms or waveforms.",
            "choices": ["images", "videos", "spectrograms", "waveforms"],
        },
    )
    images: list[str] | None = field(default=None, metadata={"help": "Image files, at least two, instead of a data set."})
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "The network that methods look at, a folder or a repository of the Hub. Default: an untrained network."},
    )
    activations: bool = field(
        default=False,
        metadata={"help": "Add the checkpoint's class activation maps of the mixed images, for the class with the largest share."},
    )
    masks: bool = field(default=False, metadata={"help": "Draw the masks of the checkpoint's mixer for three pairs at several lam."})
    count: int = field(default=6, metadata={"help": "Number of columns, one mixture each."})
    seed: int = field(default=0, metadata={"help": "Seed of all random draws."})
    output: str = field(default="runs/mixtures.png", metadata={"help": "The picture to write."})

    def __post_init__(self):
        check_count(1, count=self.count)
        check_between(1, 100, count=self.count)  # a picture of more columns is too wide for matplotlib
        check_count(0, seed=self.seed)
        check_between(0, 2**63 - 1, seed=self.seed)
        if Path(self.output).is_dir():
            raise ValueError(
                f"output must be the name of a picture, got {self.output!r}, a folder; put a name such as mixtures.png behind it."
            )
        RunFolder(Path(self.output).parent).check("the folder of output")


def photographs() -> dict[str, Image.Image]:
    """The centres of the two photographs in scikit-learn."""
    from sklearn.datasets import load_sample_image

    shown = {"temple": (load_sample_image("china.jpg"), 60, 20, 400), "flower": (load_sample_image("flower.jpg"), 90, 0, 427)}
    return {name: Image.fromarray(np.array(a[top : top + side, left : left + side])) for name, (a, left, top, side) in shown.items()}


def named(paths: list[str], channels: int) -> tuple[list[str], list]:
    """The pictures and their names: that of the file, with its folders if several files have the same name."""
    pictures = []
    for path in paths:
        try:
            pictures.append(read_image(path, channels))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"images must be files that can be read, got {path} ({error}); check the path.") from None
    parts = [Path(path).absolute().with_suffix("").parts for path in paths]
    names = [own[-1] for own in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) if names.count(name) > 1 else name for own, name in zip(parts, names, strict=True)]
    return names, pictures


def read(data: DataArguments, args: PictureArguments, form: ImageFormat | None) -> tuple[torch.Tensor, list[int], list[str], ImageFormat]:
    """Normalised images, their classes, the classes' names, and the format."""
    if data.dataset_name or data.train_dir or data.validation_dir:
        known, numbers = None, False
        if args.checkpoint is not None:  # the network's saliency depends on the class
            config = checkpoint_config(args.checkpoint)
            known, numbers = KnownClasses(network_classes(config), trains=False), config.problem_type == NUMBER
        images = load_images(data, args.seed, training=False, known=known, regression=numbers)
        form = form or format_from_scratch(data, images.evaluation, images.image_column)
        batch = varied(ImageDataset(images.evaluation, images.image_column, images.label_column, form.eval_transform()), max(args.count, 2))
        if len(batch) < 2:
            raise ValueError(f"mixing needs at least 2 images, got {len(batch)} in {images.evaluation_split!r}; take a larger split.")
        return torch.stack([e["pixel_values"] for e in batch]), [e["labels"] for e in batch], images.label_names, form
    if args.images is not None and len(args.images) < 2:
        raise ValueError(f"mixing needs at least 2 images, got {len(args.images)}; give another one.")
    if form is None:
        data.image_size = data.image_size or 128
        form = format_from_scratch(data)
    names, pictures = named(args.images, form.channels) if args.images else map(list, zip(*photographs().items(), strict=True))
    pixels = torch.stack([form.eval_transform()(picture) for picture in pictures])
    return pixels, list(range(len(names))), names, form


def made(inputs: str, count: int, seed: int) -> tuple[torch.Tensor, list[int], list[str], Recordings]:
    """Moving digits, or sounds whose pitch follows a melody: inputs, their classes, the classes' names, and how they are shown."""
    if inputs == "videos":
        pictures, classes = digit_pictures()[0]
        videos, shown = digit_videos(pictures, count, seed, frames=6, side=16)
        return torch.from_numpy(videos), classes[shown].tolist(), list(map(str, range(10))), Recordings()
    sounds, classes = melodies(count, seed)
    if inputs == "waveforms":
        return torch.from_numpy(sounds), classes.tolist(), list(MELODIES), Recordings()
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor(num_mel_bins=64, max_length=48, mean=1.5, std=1.6)
    return extractor(list(sounds), sampling_rate=RATE, return_tensors="pt")["input_values"], classes.tolist(), list(MELODIES), Recordings()


def check_seen(choice: MethodChoice) -> None:
    """Raises ValueError for a method that mixes words, or only inside the network: pictures would show the inputs unmixed."""
    for method in choice.methods:
        layers = getattr(method.step, "layers", (0,))  # 0 is the input
        if 0 not in layers or method.name == "wordmixup":
            raise ValueError(
                f"a picture needs a method that mixes images, videos or sounds, got {method.name!r}, which mixes words or hidden states of the network; choose "
                "another one with --mix."
            )


def draw_recordings(args: PictureArguments, choice: MethodChoice) -> int:
    """Draws mixtures of sounds or videos; returns how many."""
    inputs, labels, names, form = made(args.inputs, max(args.count, 8), args.seed)
    torch.manual_seed(args.seed)
    model = MixupModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs[0].numel(), len(names))), choice)
    columns = drawn(model, inputs, torch.tensor(labels), form, args.seed, args.count, masks=True)
    gallery(args.output, columns, names)
    return len(columns)


def parser(prog: str = "visualize_mixup.py") -> Parser:
    data = ["dataset_name", "dataset_config_name", "train_dir", "validation_dir", "image_column_name", "label_column_name", "image_size"]
    groups = {"picture": list(PictureArguments.__dataclass_fields__), "data": data}
    return Parser(
        (DataArguments, PictureArguments), prog, "[...]", __doc__.splitlines()[0], groups, [*groups["picture"], *data], without=FOR_TRAINING
    )


def main(argv: list[str], prog: str = "visualize_mixup.py") -> None:
    reader = parser(prog)
    typed = reader.typed(argv)
    reader.help_if_asked(typed)
    for name, others in IDLE.items():
        for other in others:
            if typed.get(name) and typed.get(other):
                raise ValueError(f"--{other} has no effect with --{name}, got both; leave one out.")
    data, args = reader.built(typed)
    log_to_screen()
    with RunFolder(Path(args.output).parent).gone_if_refused():
        draw(data, args)


def draw(data: DataArguments, args: PictureArguments) -> None:
    """Draws the picture that the arguments ask for."""
    if ending := Path(args.output).suffix.lower():
        check_known("the ending of output", ending, [f".{name}" for name in FigureCanvasBase.get_supported_filetypes()])
    if args.mix is not None:
        check_seen(MethodChoice.build(args.mix))
    of_data = [field.name for field in fields(data) if getattr(data, field.name) != field.default]
    if args.inputs != "images":
        asked = [name for name in ("all", "masks", "activations", "images", "checkpoint") if getattr(args, name)] + of_data
        if asked:
            raise ValueError(f"--inputs {args.inputs} draws data that is made here, got --{asked[0]} too; leave one of them out.")
        choice = MethodChoice.build(args.mix or ["mixup", "cutmix"], alpha=args.alpha, mix_args=parse_json("mix_args", args.mix_args))
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s holds %d mixtures", args.output, draw_recordings(args, choice))
        return
    idle = [name for name in of_data if name not in OF_FORMAT]
    if idle and not {"dataset_name", "train_dir", "validation_dir"} & set(idle):
        raise ValueError(
            f"--{idle[0]} is for a data set, got {getattr(data, idle[0])!r} without one; pass --dataset_name, or leave it out."
        )
    if args.activations and args.checkpoint is None:
        raise ValueError("activation maps need a trained network, got no checkpoint; pass --checkpoint.")
    if args.masks and (args.checkpoint is None or not Path(args.checkpoint, CONFIG_NAME).is_file()):
        raise ValueError(
            f"masks need the folder of a run of a method with a mixer, such as automix, got {args.checkpoint}; pass --checkpoint with one."
        )
    form = network = None
    if args.checkpoint is not None:
        network = load_classifier(args.checkpoint, image_size=data.image_size)
        form = format_of_checkpoint(data, args.checkpoint, channels_of(network))
        check_takes(network, form.channels, *form.sides)
    pixels, labels, names, form = read(data, args, form)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)

    if args.all:
        columns = pairs_of_every_method(pixels[:2], form, args.seed, args.mix or [name for name in METHODS if name != "vanilla"], network)
        overview(args.output, columns, [names[labels[0]], names[labels[1]]])
    elif args.masks:
        found = masks_of_mixers(MixupModel.from_pretrained(args.checkpoint), pixels[:3], form)
        if not found:
            raise ValueError(f"masks need a method with a mixer, such as automix, got none in {args.checkpoint}; use another checkpoint.")
        columns = next(iter(found.values()))
        masks_by_lam(args.output, columns, LAMS)
    else:
        ours = args.checkpoint is not None and Path(args.checkpoint, CONFIG_NAME).is_file()
        numbers = isinstance(labels[0], float) or (network is not None and network.config.problem_type == NUMBER)
        if numbers and (args.mix is not None or not ours):
            raise ValueError(
                f"mixed numbers are drawn by the methods and the loss of a run, got labels such as {labels[0]:g}; pass --checkpoint with the folder "
                "of a run of regression, without --mix."
            )
        if args.mix is None and ours:
            if args.alpha is not None or args.mix_args is not None:
                raise ValueError(f"alpha and mix_args are for --mix, got them for the methods of {args.checkpoint}; give --mix too.")
            model = MixupModel.from_pretrained(args.checkpoint)
            check_seen(model.choice)
        else:
            choice = MethodChoice.build(args.mix or ["mixup", "cutmix"], alpha=args.alpha, mix_args=parse_json("mix_args", args.mix_args))
            torch.manual_seed(args.seed)
            if network is None:
                network = from_scratch(default_architecture(choice), max(len(names), 2), form.size, channels=form.channels)
            model = MixupModel(network, choice)
        if args.checkpoint is not None and not (data.dataset_name or data.train_dir or data.validation_dir):
            # images without a known label get the predicted one
            with torch.no_grad():
                said = model.eval()(pixels).logits
            labels = (said if numbers else said.argmax(1)).tolist()
            names = [str(model.config.id2label[c]) for c in range(model.num_labels)]
        columns = drawn(model, pixels, torch.tensor(labels), form, args.seed, args.count, masks=True, activations=args.activations)
        gallery(args.output, columns, names)
    logger.info("%s holds %d mixtures", args.output, len(columns))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], "visualize_mixup.py"))
