"""The network of a run and the format of its images, from the arguments."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_mixup.arguments import DataArguments, MixupTrainingArguments, ModelArguments
from hf_mixup.core.checks import check_known
from hf_mixup.data.labels import network_classes
from hf_mixup.data.processor import ImageFormat, format_from_scratch, format_of_checkpoint
from hf_mixup.data.sources import ImageData, KnownClasses
from hf_mixup.methods import MethodChoice
from hf_mixup.networks.backbones import channels_of, check_takes, checkpoint_config, describe_for_timm, from_scratch, load_classifier
from hf_mixup.networks.families import is_timm
from hf_mixup.report.examples import default_architecture

# for images of more than 64 pixels, instead of the small networks
LARGE = {"cifar_resnet20": "resnet18", "vit_mini": "deit_tiny_patch16_224"}


def hub_of(model: ModelArguments) -> dict[str, Any]:
    """Arguments for reading the checkpoint."""
    return {name: getattr(model, name) for name in ("cache_dir", "token", "trust_remote_code")} | {"revision": model.model_revision}


def classes_of_checkpoint(model: ModelArguments, args: MixupTrainingArguments) -> KnownClasses | None:
    """The classes of the network to start from. Raises ValueError if there is none for a run that does not train."""
    if model.model_name_or_path is None:
        if args.do_train:
            return None
        asked = " and ".join(f"--{name}" for name in ("do_eval", "do_predict") if getattr(args, name))
        raise ValueError(
            f"a run without training needs a trained network, got {asked} without one; pass --model_name_or_path, or --do_train too."
        )
    names = network_classes(checkpoint_config(model.model_name_or_path, **hub_of(model)))
    return KnownClasses(names, fresh=model.ignore_mismatched_sizes, trains=trains(args))


def trains(args: MixupTrainingArguments) -> bool:
    """Whether the run takes a step."""
    return args.do_train and (args.max_steps > 0 or args.num_train_epochs > 0)


def build_model(
    model: ModelArguments, data: DataArguments, args: MixupTrainingArguments, images: ImageData
) -> tuple[PreTrainedModel, ImageFormat]:
    """The network and the format of its images."""
    labels = {"id2label": dict(enumerate(images.label_names)), "label2id": {name: i for i, name in enumerate(images.label_names)}}
    hub = hub_of(model)
    if model.model_name_or_path is not None:
        processor = model.image_processor_name or model.model_name_or_path
        network = load_classifier(
            model.model_name_or_path, image_size=data.image_size, config_name=model.config_name, num_labels=len(images.label_names),
            ignore_mismatched_sizes=model.ignore_mismatched_sizes, fresh_classifier=trains(args), **labels, **hub,
        )  # fmt: skip
        return described(network, format_of_checkpoint(data, processor, channels_of(network), **hub), data.train_image_size)
    form = format_from_scratch(data, images.train, images.image_column)
    if model.image_processor_name is not None:
        form = format_of_checkpoint(data, model.image_processor_name, form.channels, **hub)
    config = None
    if model.config_name is not None:
        config = AutoConfig.from_pretrained(model.config_name, **labels, **hub)
    elif model.model_type is not None:
        check_known("model_type", model.model_type, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
        config = AutoConfig.for_model(model.model_type, **labels)
    if config is not None:
        if hasattr(config, "image_size"):
            config.image_size = form.sides[0]
        network = AutoModelForImageClassification.from_config(config, trust_remote_code=model.trust_remote_code)
        return described(network, form, data.train_image_size)
    size = form.sides[0]
    architecture = model.architecture or default_network(args.method_choice(), size)
    network = from_scratch(architecture, len(images.label_names), size, channels=form.channels, drop_path=model.drop_path, **labels)
    return described(network, form.of_timm() if is_timm(network) and model.image_processor_name is None else form, data.train_image_size)


def default_network(choice: MethodChoice, size: int) -> str:
    """The architecture that these methods train, if no network is named, for images of `size` pixels a side."""
    small = default_architecture(choice)
    return LARGE[small] if size > 64 else small


def described(network: PreTrainedModel, form: ImageFormat, train_size: int | None) -> tuple[PreTrainedModel, ImageFormat]:
    """Returns both. For a timm network the format is written into its config, where timm and transformers read it."""
    for sides in (form.sides, *([] if train_size is None else [(train_size, train_size)])):
        check_takes(network, form.channels, *sides)
    if is_timm(network):
        describe_for_timm(network, **form.timm_config())
    return network, form
