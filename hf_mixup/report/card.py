"""Model cards, filled from the files in a run's folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mixup import __version__
from hf_mixup.core.hub import repository_name
from hf_mixup.core.losses import CrossEntropy
from hf_mixup.core.policy import AreaLabels
from hf_mixup.core.secrets import redacted
from hf_mixup.method import CONFIG_NAME, needs_of_model
from hf_mixup.methods import METHODS, get_method
from hf_mixup.networks.backbones import ARCHITECTURES, TASKS, task_of
from hf_mixup.report import plots
from hf_mixup.report.run_folder import CARD_NAME, CURVE_NAME, EVALUATION_NAME, GALLERY_NAME, LOG_NAME, RESULTS_NAME
from hf_mixup.steps import Standard

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"

# name in `all_results.json`: (type in a model-index, name for people)
MEASURES = {
    "eval_top1": ("accuracy", "top-1 accuracy"),
    "eval_top5": ("top_5_accuracy", "top-5 accuracy"),
    "eval_loss": ("loss", "loss"),
    "eval_nll": ("nll", "negative log-likelihood"),
    "eval_ece": ("expected_calibration_error", "expected calibration error"),
    "eval_brier": ("brier_score", "Brier score"),
    "eval_mce": ("mean_corruption_error", "mean corruption error"),
}
# what networks answer that do not choose one of their classes, by their problem_type
LIMITS = {
    "regression": "It gives a number for any image, also for one of another kind than those it was trained on",
    "multi_label_classification": "It gives each of its {} classes a score of its own; the scores do not sum to 1",
}
NO_MEASURES = ("_runtime", "_per_second", "_compilation_time")
# types of the metrics from `evaluated`
EVALUATED = (
    "accuracy", "top_5_accuracy", "expected_calibration_error", "expected_calibration_error_equal_mass", "nll", "brier_score",
    "fgsm_accuracy", "pgd_accuracy", "mean_corruption_error", "mean_error_all", "mce_alexnet", "occlusion_accuracy",
)  # fmt: skip
MARKS = ("<!-- evaluation -->", "<!-- /evaluation -->")
COLUMNS = {
    "epoch": "epoch",
    "train_loss": "training loss",
    "train_accuracy": "training accuracy (of mixtures)",
    "eval_loss": "loss",
    "eval_top1": "top-1",
    "eval_top5": "top-5",
}
PACKAGES = ("hf_mixup", "transformers", "torch", "timm", "datasets", "accelerate")


def write_model_card(
    folder: str | Path,
    *,
    model_name: str | None = None,
    repo: str | None = None,
    dataset: str | None = None,
    dataset_id: str | None = None,
    split: str | None = None,
    command: str | None = None,
    base_model: str | None = None,
    license: str | Mapping[str, str] | None = None,
    language: str | None = None,
    tags: Sequence[str] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    results: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `README.md`, and `training_curve.png`, into the folder of a run.

    Numbers come only from its files: `all_results.json`, or the last evaluation of `train_log.jsonl`; `evaluation.json`, if it belongs to these
    weights; `mixup_config.json`, `config.json`. The arguments add facts that the files do not have.

    Args:
        model_name: name in the title; that of the folder if None.
        repo: Hub id of the model.
        dataset, dataset_id, split: the evaluation data: name for people, Hub id if it has one, split.
        command: the command that trained the model.
        base_model: Hub id or folder of the checkpoint that training started from; None for a network from scratch.
        license: of the weights, or `license` with `license_name` and `license_link`. If None: that of the base model, if its folder has a card
            with one; otherwise the card names no licence.
        tags: further tags.
        hyperparameters: the most important settings, by name.
        rows: one for each epoch; those of `train_log.jsonl` if None.
        results: measures of these weights, by the names of a Trainer; those of the files if None.

    Returns:
        the path of the card.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    folder = Path(folder)
    config, network = (json.loads((folder / name).read_text()) for name in (CONFIG_NAME, "config.json"))
    rows = _rows(folder) if rows is None else rows
    results = _results(folder, rows, results)
    methods = [method["name"] for method in config["methods"]]
    problem = network.get("problem_type")
    labels = len(network.get("id2label") or network.get("label_names") or ()) or network.get("num_classes") or 2
    measured = [(key, *_measure(key), value) for key, value in results.items() if key != "eval_top5" or labels > 5]
    model_name = model_name or folder.absolute().name
    base = base_model and repository_name(base_model)
    base_model = None if base is None or Path(base).exists() else base  # a local path is useless to other people
    timm, task = network["model_type"] == "timm_wrapper", task_of(network["model_type"])
    licence = {"license": license} if isinstance(license, str) else dict(license or {}) or (licence_of(base) if base else {})
    data = ModelCardData(
        language=language,
        **licence,
        library_name="transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys([task, "hf_mixup", *(["timm"] if timm else []), *methods, *tags])),
        datasets=[dataset_id] if dataset_id else None,
        metrics=list(dict.fromkeys(kind for _, kind, _, _ in measured if kind != "loss")) if problem in LIMITS else ["accuracy"],
        base_model=base_model,
        model_name=model_name,
        eval_results=[
            EvalResult(task, dataset_id or _slug(dataset), dataset, kind, value, metric_name=name, dataset_split=split)
            for _, kind, name, value in measured
        ]
        if dataset and measured
        else None,
    )
    mixers = {"mixblock": "MixBlock", "adaptivemask": "AdaptiveMask"}
    here = repo or "path/or/hub-id/of/this/model"
    size, shapes, embedding = _measured(folder, network, TASKS[task][1])
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        title=plain(model_name),
        repo=json.dumps(here),
        task=task,
        auto=TASKS[task][1].__name__,
        network=plain(_architecture(network)),
        base=f"[{plain(base_model)}](https://huggingface.co/{base_model})" if base_model else base and "a local checkpoint",
        dataset=dataset and _linked(plain(dataset), dataset_id),
        split=split and plain(split),
        methods=" + ".join(methods),
        config=json.dumps(config, indent=2),
        command=command and fenced(wrapped(command), "bash"),
        results=[(plain(name), f"{value:.4f}") for _, _, name, value in measured],
        facts=[
            *((plain(name), plain(str(value))) for name, value in {**_facts(folder, network), **size}.items()),
            *((f"paper of {name}", link) for name, link in _papers(network, methods).items()),
        ],
        channels=_channels(network),
        shapes=shapes,
        embedding=embedding,
        watched=_watched(),
        hyperparameters=[(plain(name), plain(str(value))) for name, value in (hyperparameters or {}).items()],
        epochs=_table(rows),
        curve=_curve(folder, rows),
        gallery=(folder / GALLERY_NAME).is_file(),
        ours=network["model_type"]
        in {config.model_type for config, _ in ARCHITECTURES.values() if config.__module__.startswith("hf_mixup")},
        timm=timm and json.dumps(f"hf-hub:{here}"),
        state=(folder / "mixup").is_dir(),
        mixers=[name for place, name in mixers.items() if (folder / "mixup" / place).is_dir()],
        licence=licence.get("license"),
        limit=LIMITS.get(problem, "It names one of its {} classes for any image, also for one that shows none of them").format(labels),
        sure=problem not in LIMITS,
        unmeasured="" if problem == "regression" else _unmeasured(results),
        versions=_versions(),
        citations="\n\n".join(filter(None, [*map(bibtex, methods), _architecture_paper(network), *_software(timm)])),
        marks=MARKS,
    )
    evaluation = _evaluation(folder)
    if evaluation is not None:
        _merge(card, evaluation)
    return _saved(card, folder)


def licence_of(repo_or_folder: str | Path, **hub: Any) -> dict[str, str]:
    """The licence in the card of a checkpoint; an empty dictionary if there is none.

    Args:
        hub: with `token`, the card may be loaded from the Hub; otherwise only a folder is read.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    path = Path(repo_or_folder, CARD_NAME)
    if not path.is_file() and not hub:
        return {}
    try:
        card = ModelCard.load(path if path.is_file() else str(repo_or_folder), **({} if path.is_file() else hub))
    except (OSError, ValueError, HfHubHTTPError):
        return {}
    found = {name: getattr(card.data, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if value} if found["license"] else {}


def _saved(card: ModelCard, folder: Path) -> Path:
    """Writes the card without secret tokens, and returns its path."""
    path = folder / CARD_NAME
    path.write_text(redacted(str(card)), encoding="utf-8")
    return path


# -- papers ---------------------------------------------------------------------------------------------------------------


def bibtex(method: str) -> str | None:
    """The BibTeX entry of a method's paper, or None."""
    papers = json.loads((TEMPLATES / "papers.json").read_text())
    return _bibtex(method, *papers[method], get_method(method).paper) if method in papers else None


def _bibtex(key: str, authors: str, title: str, venue: str, year: int, arxiv: str | None) -> str:
    fields = {"title": f"{{{title}}}", "author": authors, "booktitle": venue, "year": year}
    fields |= {"eprint": arxiv, "archivePrefix": "arXiv"} if arxiv else {}
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return "@{}{{{},\n{}\n}}".format("inproceedings" if venue else "misc", f"{key}{year}", ",\n".join(lines))


def _family(network: Mapping[str, Any]) -> tuple[str, list] | None:
    """The key and the entry of a network in `architectures.json`, by its name, or None."""
    name = _architecture(network).lower().removeprefix("cifar").removeprefix("_")
    families = json.loads((TEMPLATES / "architectures.json").read_text())
    # `resnet50` and `ResNetForImageClassification` are resnets, `resnetv2_50` is not
    found = [key for key in families if re.match(rf"{key}(?:[\d_]|for|$)", name)]
    return (key := max(found, key=len), families[key]) if found else None


def _architecture_paper(network: Mapping[str, Any]) -> str | None:
    found = _family(network)
    return found and _bibtex(found[0], *found[1])


def _papers(network: Mapping[str, Any], methods: Sequence[str]) -> dict[str, str]:
    """Linked titles of the papers of the network and the methods, by what each paper describes."""
    titles = {name: entry[1] for name, entry in json.loads((TEMPLATES / "papers.json").read_text()).items()}
    found = _family(network)
    papers = {"the network": (found[1][1], found[1][4])} if found else {}
    papers |= {name: (titles[name], get_method(name).paper) for name in methods if name in titles}
    return {name: f"[{title}](https://arxiv.org/abs/{number})" if number else title for name, (title, number) in papers.items()}


def _software(timm: bool) -> list[str]:
    ours = f"@software{{hf_mixup,\n  title = {{hf_mixup: mixup methods for Hugging Face}},\n  version = {{{__version__}}}\n}}"
    theirs = (
        "@misc{timm,\n  title = {PyTorch Image Models},\n  author = {Wightman, Ross},\n  year = {2019},\n"
        "  doi = {10.5281/zenodo.4414861},\n  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}\n}"
    )
    return [ours, *([theirs] if timm else [])]


# -- text -----------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Escapes text so that Markdown and HTML show it unchanged, on one line, also in a table."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # an underscore or a hyphen inside a word needs no escape
    return re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w)|^[-+=])", r"\\\1", text)


def fenced(text: str, language: str) -> str:
    """A code block for any text, also with backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def wrapped(command: str, width: int = 96) -> str:
    """Breaks a long command into several lines, before options."""
    try:
        words = shlex.split(command)
    except ValueError:  # not a shell command
        return command
    if len(command) <= width or "\n" in command:
        return command
    lines = [""]
    for place, word in enumerate(words):
        option = shlex.join(itertools.takewhile(lambda w: not w.startswith("--"), words[place + 1 :]))
        if word.startswith("--") and len(f"{lines[-1]} {word} {option}") > width:
            lines.append(" ")
        lines[-1] += f" {shlex.quote(word)}"
    return " \\\n".join(lines)[1:]


def _linked(name: str, dataset_id: str | None) -> str:
    return f"[{name}](https://huggingface.co/datasets/{dataset_id})" if dataset_id else name


def methods_rows() -> list[tuple[str, str, str, str]]:
    """For each method: name, parts, needs, and the arXiv number of its paper, or an empty string."""
    unsaid = {AreaLabels(), CrossEntropy(), Standard()}
    rows = []
    for method in METHODS.values():
        parts = [part for part in (method.sample, method.label, method.loss, method.step) if part not in unsaid]
        needs = "the model" if needs_of_model(method) else "images"
        rows.append((method.name, " + ".join(type(part).__name__ for part in parts), needs, method.paper or ""))
    return rows


# -- facts from the files ---------------------------------------------------------------------------------------------------


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / LOG_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _results(folder: Path, rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any] | None) -> dict[str, float]:
    if found is None:
        path = folder / RESULTS_NAME
        last = next((row for row in reversed(rows) if "eval_loss" in row), {})
        found = json.loads(path.read_text()) if path.is_file() else last
    wanted = {key: value for key, value in found.items() if key.startswith("eval_") and not key.endswith(NO_MEASURES)}
    if "eval_top1" in wanted:
        wanted.pop("eval_accuracy", None)  # the same number under the name of other Trainers
    numbers = {key: float(value) for key, value in wanted.items() if isinstance(value, (int, float))}
    return dict(sorted(numbers.items(), key=lambda item: list(MEASURES).index(item[0]) if item[0] in MEASURES else len(MEASURES)))


def _measure(key: str) -> tuple[str, str]:
    name = key.removeprefix("eval_")
    return MEASURES.get(key, (name, name.replace("_", " ")))


def _unmeasured(results: Mapping[str, float]) -> str:
    calibrated = any("ece" in key or "calibration" in key for key in results)
    robust = any(part in key for key in results for part in ("fgsm", "pgd", "corruption", "mce", "occlusion"))
    lacking = [name for name, known in (("calibration", calibrated), ("robustness", robust)) if not known]
    return f"{' and '.join(lacking)} {'were' if len(lacking) > 1 else 'was'} not measured".capitalize() if lacking else ""


def _architecture(network: Mapping[str, Any]) -> str:
    return network.get("architecture") or (network.get("architectures") or [network["model_type"]])[0]


def _facts(folder: Path, network: Mapping[str, Any]) -> dict[str, Any]:
    sides = _sides(folder, network)
    names = list((network.get("id2label") or {}).values()) or network.get("label_names") or []
    return {
        "type": f"{task_of(network['model_type']).replace('-', ' ')}, and features for other tasks",
        "architecture": _architecture(network),
        **({"code": "its own; read it, then load it with trust_remote_code=True"} if network.get("auto_map") else {}),
        **({"image size": f"{sides[0]} x {sides[1]} pixels"} if sides else {}),
        "classes": f"{len(names)}: {', '.join(map(str, names[:10]))}{', ...' if len(names) > 10 else ''}" if names else "not named",
    }


def _measured(folder: Path, network: Mapping[str, Any], kind: Any) -> tuple[dict[str, str], list[str], tuple[str, str] | None]:
    """From a copy of the network without weights, made by transformers' class `kind`: size and cost; shapes of feature maps; how to get the embedding, and its shape."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig
    from transformers.initialization import meta_device_safe_creation_ops

    aten = torch.ops.aten

    class Activations(TorchDispatchMode):
        """Counts the outputs of convolutions and matrix products, as timm's cards do."""

        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket in (aten.convolution, aten.addmm, aten.mm, aten.bmm, aten.baddbmm):
                self.count += out.numel()
            return out

    facts, shapes, embedding = {}, [], None
    sides = _sides(folder, network) if task_of(network["model_type"]) == "image-classification" else None
    try:
        # older releases of timm read numbers from tensors while they build a network
        with torch.device("meta"), meta_device_safe_creation_ops(), torch.no_grad():
            model = kind.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False)).eval()
            facts["parameters"] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"
            if sides:
                image = torch.zeros(1, _channels(network), *sides)
                with FlopCounterMode(display=False) as counter, Activations() as activations:
                    model(pixel_values=image)
                facts["cost of an image"] = f"{counter.get_total_flops() / 2e9:.3f} GMACs, {activations.count / 1e6:.2f} M activations"
                states = model(pixel_values=image, output_hidden_states=True).hidden_states or ()
                groups = [(shape, len(list(same))) for shape, same in itertools.groupby(tuple(state.shape) for state in states)]
                shapes = [f"{shape}" + (f", {count} of them" if count > 1 else "") for shape, count in groups]
                line = "model.classifier = torch.nn.Flatten()"
                if network["model_type"] == "timm_wrapper":
                    line = "model.timm_model.reset_classifier(0)"
                    model.timm_model.reset_classifier(0)
                elif hasattr(model, "classifier"):
                    model.classifier = torch.nn.Flatten()
                else:
                    return facts, shapes, None
                embedding = line, f"{tuple(model(pixel_values=image).logits.shape)}"
    except (ImportError, NotImplementedError, RuntimeError, ValueError):
        pass  # an architecture that cannot be built without its code, or counted: the card does not have these facts
    return facts, shapes, embedding


def _channels(network: Mapping[str, Any]) -> int:
    return (network.get("model_args") or {}).get("in_chans") or network.get("num_channels") or 3


def _sides(folder: Path, network: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the network's images, if they are told."""
    described = (network.get("pretrained_cfg") or {}).get("input_size")  # for a timm network, whose processor reads the size there
    if described is not None:
        return tuple(described[1:])
    path = folder / "preprocessor_config.json"
    if path.is_file():
        processor = json.loads(path.read_text())
        for size in (processor.get("crop_size") if processor.get("do_center_crop", True) else None, processor.get("size")):
            if isinstance(size, dict) and "height" in size:
                return size["height"], size["width"]
    side = network.get("image_size")
    return (side, side) if isinstance(side, int) else tuple(side) if isinstance(side, list) and len(side) == 2 else None


def _table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The log as a table, header first; empty for a run of one epoch."""
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    if len(rows) < 2:
        return []
    shown = [[f"{row[key]:.4f}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns] for row in rows]
    return [[COLUMNS[key] for key in columns], *shown]


def _curve(folder: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    if len(rows) > 1:
        try:
            plots.training_curve(folder / CURVE_NAME, rows)
        except (
            ImportError
        ) as error:  # matplotlib is missing; the card is written without the picture, so that a long run still gets its card
            logger.warning("the card has no training curve: %s", error)
    return (folder / CURVE_NAME).is_file()


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _watched() -> list[str]:
    """Addresses of the experiment trackers' pages for this run."""
    wandb, comet = sys.modules.get("wandb"), sys.modules.get("comet_ml")
    runs = [getattr(wandb, "run", None), comet and comet.get_running_experiment()]
    return [run.url for run in runs if run is not None and run.url]


def _slug(name: str | None) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", Path(name or "").name.lower()).strip("-") or "dataset"


# -- evaluation -----------------------------------------------------------------------------------------------------------


def write_evaluation(folder: str | Path, results: Mapping[str, Any]) -> None:
    """Writes the results of `run_evaluation.py` as `evaluation.json`, `evaluation.md` and pictures, and into the model card if there is one."""
    from huggingface_hub import ModelCard

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVALUATION_NAME).write_text(redacted(json.dumps(results, indent=2)) + "\n")
    images, settings = results["dataset"]["images"], results.get("settings", {}).get("corruptions", {})
    plots.reliability(folder / "reliability.png", {f"bins of {key}": value for key, value in results["calibration"].items()})
    if "corruptions" in results:
        count = None if settings.get("corrupted_dataset_name") else min(images, settings.get("max_samples") or images)
        plots.corruption_bars(folder / "corruptions.png", results["corruptions"]["top1"], results["clean"]["top1"], count)
    if "occlusion" in results:
        occlusion = results["occlusion"]
        plots.occlusion_curve(folder / "occlusion.png", occlusion["ratios"], occlusion["top1"], 1 / results["num_labels"], images)
    (folder / "evaluation.md").write_text(f"# Evaluation of {plain(results['model'])}\n\n{_section(results)}\n")
    if (folder / CARD_NAME).is_file():
        card = ModelCard.load(folder / CARD_NAME)
        _merge(card, results)
        _saved(card, folder)


def weights_hash(folder: str | Path) -> str | None:
    """A hash of the weights in a folder; None if it has none."""
    found = hashlib.sha256()
    files = sorted(path for ending in ("safetensors", "bin") for path in Path(folder).glob(f"*model*.{ending}"))
    for path in files:
        with open(path, "rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest() if files else None


def evaluated(results: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """A summary of the results: type of the metric, its name for people, value."""
    clean = results["clean"]
    rows = [
        ("accuracy", "top-1 accuracy", clean["top1"]),
        *([("top_5_accuracy", "top-5 accuracy", clean["top5"])] if results["num_labels"] > 5 else []),
        ("expected_calibration_error", "expected calibration error, bins of equal width", clean["ece"]),
        ("expected_calibration_error_equal_mass", "expected calibration error, bins of equal mass", clean["ece_mass"]),
        ("nll", "negative log-likelihood", clean["nll"]),
        ("brier_score", "Brier score", clean["brier"]),
    ]
    for name, attack in results.get("attacks", {}).items():
        steps = f", {attack['steps']} steps" if "steps" in attack else ""
        rows.append((f"{name}_accuracy", f"top-1 accuracy under {name.upper()}, eps {255 * attack['eps']:g}/255{steps}", attack["top1"]))
    damage = results.get("corruptions", {})
    for key, kind, text in (
        ("mean_error", "mean_corruption_error", "mean corruption error, 15 corruptions, unnormalised"),
        ("mean_error_all", "mean_error_all", "mean error over all corruptions measured"),
        ("mce_alexnet", "mce_alexnet", "mean corruption error relative to AlexNet"),
    ):
        if key in damage:
            rows.append((kind, text, damage[key]))
    if "occlusion" in results:
        rows.append(("occlusion_accuracy", "top-1 accuracy with half of the patches hidden", results["occlusion"]["top1"][5]))
    return rows


def _evaluation(folder: Path) -> dict[str, Any] | None:
    """The content of `evaluation.json`; None if the weights changed since."""
    path = folder / EVALUATION_NAME
    results = json.loads(path.read_text()) if path.is_file() else None
    return results if results is not None and results["weights"] == weights_hash(folder) else None


def _section(results: Mapping[str, Any]) -> str:
    table = "\n".join(["| measure | value |", "| --- | ---: |", *(f"| {text} | {value:.4f} |" for _, text, value in evaluated(results))])
    pictures = ["![Reliability diagrams](reliability.png)"]
    if "corruptions" in results:
        pictures.append("![Accuracy under every corruption](corruptions.png)")
    if "occlusion" in results:
        pictures.append("![Accuracy over the share of hidden patches](occlusion.png)")
    data = results["dataset"]
    about = f"{data['images']} images of {plain(data['name'])}, {plain(data['split'])}, measured by"
    return "\n\n".join([about, fenced(wrapped(results["command"]), "bash"), table, *pictures])


def _merge(card: ModelCard, results: Mapping[str, Any]) -> None:
    """Writes results into the model-index and between the marks, or at the end. They replace those of an earlier evaluation."""
    from huggingface_hub import EvalResult

    name, split = results["dataset"]["name"], results["dataset"]["split"]
    kept = [
        result
        for result in card.data.eval_results or []
        if (result.dataset_name, result.dataset_split) != (name, split) or result.metric_type not in EVALUATED
    ]
    kind = next((result.dataset_type for result in card.data.eval_results or [] if result.dataset_name == name), _slug(name))
    card.data.model_name = card.data.model_name or results["model"]
    card.data.eval_results = kept + [
        EvalResult("image-classification", kind, name, metric, value, metric_name=text, dataset_split=split)
        for metric, text, value in evaluated(results)
    ]
    before, _, rest = card.text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    card.text = "\n\n".join(filter(None, [before.rstrip(), MARKS[0], "## Evaluation", _section(results), MARKS[1], after.lstrip()]))
