"""Trains a classifier of sounds with mixing. Without arguments it trains a tiny AST on noisy melodies that it makes.

`--dataset_name` takes data sets with a column of sounds (WAV files, 16 bits) and one of classes, `--model_name_or_path` any checkpoint for audio
classification: of spectrograms, such as AST, or of waveforms, such as Wav2Vec2.
"""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, AutoFeatureExtractor

from hf_mixup import MixupTrainer, MixupTrainingArguments
from hf_mixup.cli.tasks import TaskArguments, column_of, data_sets, load_splits, named, numbered, script, train, with_classes
from hf_mixup.data.made import MELODIES, RATE, melodies
from hf_mixup.networks.backbones import load_classifier


def main(argv: list[str], prog: str = "run_mixup_audio.py") -> dict[str, float]:
    return train(argv, prog, "Trains a classifier of sounds with mixing.", ["mixup"], build)


def build(task: TaskArguments, args: MixupTrainingArguments) -> tuple[MixupTrainer, str]:
    data, evaluation, names, read = made() if task.dataset_name is None else loaded(task, args.seed)
    names, number = numbered(task, names)
    labels = named(names)
    if task.model_name_or_path is None:
        network, extractor = from_scratch(**labels)
    else:
        network = load_classifier(task.model_name_or_path, num_labels=len(names), ignore_mismatched_sizes=True, **labels)
        extractor = AutoFeatureExtractor.from_pretrained(task.model_name_or_path)

    def example(row: Any) -> dict[str, Any]:
        sound, rate, label = read(row)
        if rate != extractor.sampling_rate:
            raise ValueError(
                f"sounds must have the network's {extractor.sampling_rate} samples a second, got {rate}; resample the data set, or use another checkpoint."
            )
        features = extractor(sound, sampling_rate=rate, return_tensors="np")
        return {**{name: value[0] for name, value in features.items()}, "labels": number.get(label, label)}

    sets = data_sets(task, data, evaluation, example, args.seed)
    trainer = MixupTrainer(network, args, **sets, processing_class=extractor)
    return trainer, task.dataset_name or "melodies"


def made() -> tuple[list, list, list[str], Any]:
    """Noisy melodies: training rows, evaluation rows, names of the classes, and the function that reads a row."""
    train, evaluation = (list(zip(*melodies(count, seed), strict=True)) for count, seed in ((480, 0), (240, 1)))
    return train, evaluation, list(MELODIES), lambda row: (row[0], RATE, row[1])


def loaded(task: TaskArguments, seed: int) -> tuple[Any, Any, list[str], Any]:
    from datasets import Audio, ClassLabel

    train, evaluation = load_splits(task, seed)
    sounds = column_of(train, task.input_column_name, Audio, "sounds")
    label = column_of(train, task.label_column_name, ClassLabel, "labels")
    train, evaluation = (data.cast_column(sounds, Audio(decode=False)) for data in (train, evaluation))
    return *with_classes(train, evaluation, label), lambda row: (*decoded(row[sounds]), row[label])


def decoded(file: dict[str, Any]) -> tuple[np.ndarray, int]:
    """A waveform (samples,) float32, the mean of its channels, and its sampling rate."""
    try:
        with wave.open(io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]) as sound:
            bits, channels, rate, samples = 8 * sound.getsampwidth(), sound.getnchannels(), sound.getframerate(), sound.readframes(-1)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"sounds must be WAV files, got {file['path']} ({error}); convert them.") from None
    if bits != 16:
        raise ValueError(f"sounds must be WAV files of 16 bits, got {bits} in {file['path']}; convert them.")
    return np.frombuffer(samples, dtype="<i2").reshape(-1, channels).mean(1, dtype=np.float32) / 32768, rate


def from_scratch(**labels: Any) -> tuple[ASTForAudioClassification, ASTFeatureExtractor]:
    """A tiny AST, and its feature extractor: spectrograms with 48 steps of 10 ms and 32 frequencies."""
    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=48, mean=1.5, std=1.6)
    config = ASTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, num_mel_bins=32, max_length=48, patch_size=8,
        frequency_stride=8, time_stride=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **labels,
    )  # fmt: skip
    return ASTForAudioClassification(config), extractor


if __name__ == "__main__":
    script(main, __file__)
