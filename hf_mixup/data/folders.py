"""Folders of images, one folder a class: its files and their classes."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from hf_mixup.core.checks import needed
from hf_mixup.data.labels import in_order, listed

needed("datasets", "reading a data set")
from datasets import ClassLabel, Dataset, Features, Image  # noqa: E402

logger = logging.getLogger(__name__)

# usual names of splits; they are not classes
SPLITS = ("train", "training", "validation", "val", "valid", "dev", "eval", "evaluation", "test", "testing")
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
# data that is read instead of images if there are more such files
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".feather", ".txt", ".xml", ".h5", ".hdf5", ".lance", ".npy", ".npz")
# formats that Pillow lists, but reads only with another program or not at all
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@cache
def image_extensions() -> frozenset[str]:
    """Extensions of the files that this Pillow reads, in lower case, such as `.png`."""
    from PIL import Image as Pillow
    from PIL import features

    # old versions of Pillow warn about formats that they do not know
    missing = {name.upper() for name in ("avif", "webp") if name not in features.modules or not features.check(name)}
    formats = set(Pillow.registered_extensions().items())
    return frozenset(extension for extension, form in formats if form in Pillow.OPEN and form not in UNREADABLE | missing)


def is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_extensions()


@dataclass
class Listing:
    """The contents of one folder. Paths of images are absolute and sorted.

    Attributes:
        images: paths of images by class folder.
        loose: images beside the class folders.
        others: number of other files by extension, for every class folder; the key '' is for files beside the class folders.
        hidden: folders with images whose names start with a dot. They are left out.
    """

    images: dict[str, list[str]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    others: dict[str, Counter] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)


def list_folder(folder: str | os.PathLike) -> Listing:
    """Lists the images below a folder, grouped by their first subfolder. Links are followed, except to a folder that contains them."""
    found = Listing()
    root = os.path.abspath(folder)
    for place, files in _walk(root, (os.path.realpath(root),)):
        inside = os.path.relpath(place, root)
        parts = [] if inside == os.curdir else inside.split(os.sep)
        kind = parts[0] if parts else ""
        images = found.images.setdefault(kind, []) if parts else found.loose
        hidden = next((depth for depth, part in enumerate(parts) if part.startswith(".")), None)
        if hidden is not None:
            above = os.path.join(root, *parts[: hidden + 1])
            if above not in found.hidden and any(map(is_image, files)):
                found.hidden.append(above)
            continue
        for name in files:
            if is_image(name):
                images.append(os.path.join(place, name))
            elif not name.startswith("."):
                found.others.setdefault(kind, Counter())[os.path.splitext(name)[1].lower() or name] += 1
    for paths in (*found.images.values(), found.loose):
        paths.sort()
    return found


def _walk(folder: str, chain: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yields every folder and the names of its files. `chain`: the real paths of the folders around it, to detect links that lead back."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            # for a link to itself the entry raises an error
            is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
            (folders if is_folder else files).append(entry.name)
    yield folder, files
    for name in sorted(folders):
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        if real not in chain:
            yield from _walk(path, (*chain, real))


def class_folders(folder: str | os.PathLike, argument: str, *, labelled: bool = True) -> Dataset:
    """The images of a folder with one folder for each class, with columns `image` and `label`, class by class.

    If all names are whole numbers, classes are in the order of the numbers, otherwise in alphabetical order.

    Args:
        argument: name of the argument with this folder, for errors.
        labelled: False allows images outside class folders. If there are any, there is no column `label`.

    Raises:
        ValueError: if it is not a folder, has no images, or has images beside the class folders. The message names the place.
    """
    path = Path(folder)
    if not path.is_dir():
        archive = path.is_file() and path.suffix.lower() in ARCHIVES
        seen = "no such folder" if not path.exists() else "an archive" if archive else "a file"
        todo = "unpack it" if archive else "check the path"
        raise ValueError(f"{argument} must be a folder with one folder a class, got {seen}, {str(folder)!r}; {todo}.")
    try:
        found = list_folder(path)
    except OSError as error:
        raise ValueError(f"{argument} must be a folder that can be read, got {error}; change its permissions.") from None
    flat = bool(found.loose) and not labelled
    if not flat:
        _refuse(found, str(folder), argument)
    names = in_order(name for name, images in found.images.items() if images)
    _tell(found, folder, names)
    paths = [image for name in names for image in found.images[name]]
    paths += found.loose if flat else []
    for one in (*names, *paths):
        try:
            one.encode()
        except UnicodeEncodeError:
            raise ValueError(f"names of files and folders must be UTF-8, got {os.fsencode(one)!r} in {str(folder)!r}; rename it.") from None
    if flat:
        return Dataset.from_dict({"image": paths}, features=Features({"image": Image()}))
    labels = [number for number, name in enumerate(names) for _ in found.images[name]]
    return Dataset.from_dict({"image": paths, "label": labels}, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def _refuse(found: Listing, folder: str, argument: str) -> None:
    taken = [name for name, images in found.images.items() if images]
    others = sum(found.others.values(), Counter())
    if not taken:
        if found.loose:
            raise ValueError(
                f"{argument} must hold one folder a class, got {len(found.loose)} images and no folder of images in {folder!r}; "
                "make a folder for every class and move its images there, or pass the parent folder."
            )
        archives = [extension for extension in others if extension in ARCHIVES]
        hidden = [f"hidden folders such as {found.hidden[0]!r}"] if found.hidden else []
        kinds = [f"{count} {extension} file{'s' * (count > 1)}" for extension, count in others.most_common(3)]
        kinds = [*hidden, *kinds, *(["nothing"] if not (hidden or kinds) else [])]
        todo = "unpack the archive" if archives else "rename the hidden folders" if hidden else "check the path"
        folders = f" in the folders {listed(found.images)}" if found.images else ""
        raise ValueError(f"{argument} must hold images, one folder a class, got {', '.join(kinds)}{folders} of {folder!r}; {todo}.")
    if found.loose:
        more = f" and {len(found.loose) - 1} more" if len(found.loose) > 1 else ""
        raise ValueError(
            f"every image must be in the folder of its class, got {found.loose[0]!r}{more} beside the folders {listed(taken)}; "
            "move it into one of them, or delete it."
        )
    splits = [name for name in taken if name.lower() in SPLITS]
    if len(splits) > 1:
        raise ValueError(
            f"{argument} must hold one folder a class, got the folders {listed(splits)} in {folder!r}, which have names of splits; "
            f"pass one as --train_dir and another as --validation_dir."
        )


def _tell(found: Listing, folder: str | os.PathLike, names: list[str]) -> None:
    """Logs which folders are not classes, and which files are left out."""
    hidden = {Path(path) for path in found.hidden}
    for name in found.images:
        if name in names:
            continue
        if name.startswith(".") and Path(os.path.abspath(folder), name) not in hidden:
            continue  # such as .git
        held = ", ".join(f"{count} {extension}" for extension, count in found.others.get(name, Counter()).most_common(3))
        why = "is hidden" if name.startswith(".") else f"holds no image that can be read ({held})" if held else "is empty"
        logger.warning("%s: the folder %r %s; it is not a class", folder, name, why)
    for path in found.hidden:
        if Path(path).parent != Path(os.path.abspath(folder)):
            logger.warning("%s: images in the hidden folder %r are left out", folder, path)
    left = sum((found.others.get(name, Counter()) for name in (*names, "")), Counter())
    if left:
        logger.info("%s: files that are no images are left out: %s", folder, ", ".join(f"{n} {kind}" for kind, n in left.most_common(5)))


def _says_more(file: Path) -> bool:
    """Whether a file beside images says what they are, or holds more of them: a table of labels, a card with a configuration, an archive."""
    if file.name == "README.md":
        return bool(re.search(r"^(configs|dataset_info):", file.read_text(errors="replace"), re.M))
    return (file.stem == "metadata" and file.suffix in TABLES) or file.suffix.lower() in ARCHIVES


def split_folders(folder: str | os.PathLike, *, labelled: bool = True) -> dict[str, Dataset] | None:
    """The splits of a folder of images. `folder/train/CLASS/...` and other names of `SPLITS` are splits; `folder/CLASS/...` is all `train`.

    None for a folder with other data, such as tables or archives, or with a card that has a configuration. `labelled`: see
    `class_folders`.
    """
    path = Path(folder)
    files = [Path(place, name) for place, names in _walk(os.path.abspath(path), (os.path.realpath(path),)) for name in names]
    files = [file for file in files if not file.name.startswith(".")]
    extensions = Counter(file.suffix.lower() for file in files)
    images, tables = ({kind: extensions[kind] for kind in kinds if extensions[kind]} for kinds in (image_extensions(), TABLES))
    # of several kinds `datasets` reads the most frequent one
    if not images or max(images.values()) < max(tables.values(), default=0) or any(_says_more(file) for file in files):
        return None
    folders = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if folders and all(name.lower() in SPLITS for name in folders):
        return {
            {"training": "train"}.get(name.lower(), name.lower()): class_folders(
                path / name, f"the split {name!r} of dataset_name", labelled=labelled
            )
            for name in folders
        }
    return {"train": class_folders(path, "dataset_name", labelled=labelled)}
