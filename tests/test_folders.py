"""Random trees of class folders, compared with a slow reference reader: same files, names and labels, or an error."""

import shutil
import tempfile
from pathlib import Path

from datasets import Image
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hf_mixup.data.folders import SPLITS, class_folders
from refusals import parts

FOLDERS = [
    "cat",
    "dog",
    "[a]",
    "*",
    "a?b",
    "{x}",
    "Möbel, Gerät",
    "0",
    "1",
    "2",
    "10",
    "007",
    "train",
    "val",
    "__x__",
    ".git",
    "x.png",
    "a b",
]
FILES = ["0.png", "1.PNG", "2.jpeg", "[3].jpg", "*.tif", ".hidden.png", "._4.png", "notes.txt", "raw.heic", "png", "data.zip", "5.webp"]
IMAGES = {".png", ".jpeg", ".jpg", ".tif", ".webp"}

files = st.sampled_from(FILES)
trees = st.recursive(
    st.dictionaries(files, st.none(), max_size=3),
    lambda deeper: st.dictionaries(st.sampled_from(FOLDERS), deeper, max_size=4).flatmap(
        lambda folders: st.dictionaries(files, st.none(), max_size=2).map(lambda own: {**own, **folders})
    ),
    max_leaves=8,
)
links = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.sampled_from(["link", "9.png", "to[b]"])), max_size=3)


def build(folder: Path, tree: dict) -> None:
    folder.mkdir()
    for name, inside in tree.items():
        if inside is None:
            (folder / name).touch()
        else:
            build(folder / name, inside)


def add_links(root: Path, places) -> None:
    """Links between any two places of the tree, also upwards, to nothing and to themselves."""
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]
    targets = [*sorted(root.rglob("*")), root, root / "nothing.png"]
    for place, target, name in places:
        link = folders[place % len(folders)] / name
        if not link.exists() and not link.is_symlink():
            link.symlink_to([*targets, link][target % (len(targets) + 1)])


def reference(root: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Images by the first folder on their way, and images beside the folders."""
    found, loose = {}, []

    def visit(folder, above, way):
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                if path.resolve() not in above:
                    visit(path, [*above, path.resolve()], [*way, path.name])
            elif path.suffix.lower() in IMAGES and path.name != "png":
                if way:
                    found.setdefault(way[0], []).append(str(path))
                else:
                    loose.append(str(path))

    visit(root, [root.resolve()], [])
    return found, loose


def sorted_as_classes(names: list[str]) -> list[str]:
    numbers = all(name.isdecimal() and name.isascii() for name in names) and len({int(name) for name in names}) == len(names)
    return sorted(names, key=int) if numbers else sorted(names)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(trees, links, st.sampled_from(["root", "exp[1]", "a*", "."]))
@example({"cat": {"0.png": None}, "dog": {}}, [], "exp[1]")
@example({"cat": {"0.png": None}, "dog": {"1.PNG": None}}, [(1, 4, "link"), (1, 0, "to[b]")], "root")
@example({"2": {"0.png": None}, "10": {"0.png": None}, "007": {"0.png": None}}, [], "root")
@example({"train": {"cat": {"0.png": None}}, "val": {"cat": {"0.png": None}}}, [], "root")
@example({"cat": {"0.png": None}, "0.png": None}, [], "root")
@example({"x.png": {"x.png": {"0.png": None}}}, [], "a*")
def test_every_tree(tree, places, name):
    above = Path(tempfile.mkdtemp())
    try:
        root = above / "decoy1"
        build(root, {"other": {"0.png": None}, "ape": {"0.png": None}})  # what the brackets would match
        root.rename(above / "exp1")
        root = above / (name if name != "." else "dot/.")
        root.parent.mkdir(exist_ok=True)
        build(Path(str(root).rstrip("/.")) if name == "." else root, tree)
        add_links(root, places)
        found, loose = reference(root)
        splits = sum(one.lower() in SPLITS for one in found) > 1
        refusal, data = None, None
        try:
            data = class_folders(root, "train_dir")
        except ValueError as error:
            refusal = str(error)
        if data is None:
            assert loose or not found or splits, refusal
            parts(refusal)
            assert not (loose and found) or any(path in refusal for path in loose)
            return
        assert found
        assert not loose
        assert not splits
        names = sorted_as_classes(list(found))
        assert data.features["label"].names == names
        rows = [(row["image"]["path"], names[row["label"]]) for row in data.cast_column("image", Image(decode=False))]
        assert sorted(rows) == sorted((path, one) for one in names for path in found[one])
    finally:
        shutil.rmtree(above)
