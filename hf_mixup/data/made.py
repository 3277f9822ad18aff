"""Small data sets of sounds, videos and label maps, made by a seed from data in installed packages."""

from __future__ import annotations

import numpy as np

from hf_mixup.core.checks import needed

RATE = 16_000  # samples a second
MELODIES = ("rising", "falling", "up and down", "down and up", "steady", "alternating")
IGNORED = 255


def melodies(count: int, seed: int, seconds: float = 0.5, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Noisy tones whose pitch follows one of the `MELODIES`: waveforms (count, samples) float32, and classes (count,)."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, int(RATE * seconds), endpoint=False)
    courses = np.stack([time, 1 - time, 1 - np.abs(2 * time - 1), np.abs(2 * time - 1), np.full_like(time, 0.5), np.floor(4 * time) % 2], 0)
    labels = rng.permutation(np.arange(count) % len(MELODIES))
    lowest, octaves = rng.uniform(200, 800, (count, 1)), rng.uniform(0.5, 1.5, (count, 1))
    phase = 2 * np.pi * np.cumsum(lowest * 2 ** (octaves * courses[labels]), 1) / RATE
    loudness = rng.uniform(0.2, 1, (3, count, 1)) / np.arange(1, 4)[:, None, None]
    sound = sum(loudness[k] * np.sin((k + 1) * phase) for k in range(3))
    return (sound + noise * rng.standard_normal(sound.shape)).astype(np.float32), labels


def digit_pictures() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits, (8, 8) in [0, 1], and their classes, for training; and those of other writers, for evaluation."""
    needed("sklearn", "the digits")
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures, classes = (data.images / 16).astype(np.float32), data.target
    return (pictures[:1200], classes[:1200]), (pictures[1200:], classes[1200:])


def digit_videos(pictures: np.ndarray, count: int, seed: int, frames: int = 4, side: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Digits that move in a straight line over noise: (count, frames, 3, side, side) in [0, 1], and the index in `pictures` of each."""
    rng = np.random.default_rng(seed)
    videos = rng.uniform(0, 0.3, (count, frames, side, side)).astype(np.float32)
    shown = rng.integers(len(pictures), size=count)
    ends = rng.integers(side - 8 + 1, size=(count, 2, 2))  # start and end of the line: row and column
    for video, picture, (first, last) in zip(videos, pictures[shown], ends, strict=True):
        for frame, part in zip(video, np.linspace(0, 1, frames), strict=True):
            row, col = np.round(first + part * (last - first)).astype(int)
            frame[row : row + 8, col : col + 8] = np.maximum(frame[row : row + 8, col : col + 8], picture)
    return np.repeat(videos[:, :, None], 3, 2), shown


def digit_maps(pictures: np.ndarray, classes: np.ndarray, count: int, seed: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Two to four digits, at twice their size, on noise: images (count, 3, side, side) in [0, 1], and maps (count, side, side) int64, with 0 for
    the ground, 1 to 10 for the digits, `IGNORED` for their faint edges."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 0.3, (count, side, side)).astype(np.float32)
    maps = np.zeros((count, side, side), dtype=np.int64)
    for image, labels in zip(images, maps, strict=True):
        for chosen in rng.integers(len(pictures), size=rng.integers(2, 5)):
            ink = pictures[chosen].repeat(2, 0).repeat(2, 1)
            row, col = rng.integers(side - 16 + 1, size=2)
            place = np.s_[row : row + 16, col : col + 16]
            image[place] = np.maximum(image[place], ink)
            labels[place] = np.where(ink > 0.5, classes[chosen] + 1, np.where(ink > 0.2, IGNORED, labels[place]))
    return np.repeat(images[:, None], 3, 1), maps
