"""What a machine without network must be brought: packages that it lacks, and CIFAR-10 in compact form. `benchmarks/device.sh --pack FOLDER`.

The JPEG files of CIFAR-10 begin with the same 600 bytes, so that all of them compress to a third, with nothing lost.
"""

from __future__ import annotations

import io
import json
import lzma
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / "benchmarks/carried"
IMAGES = CARRIED / "cifar10.xz"
PACKAGES = CARRIED / "packages"
MOST = 64  # MiB, of the repository and what is carried
# for Python 3.12 on Linux; datasets and evaluate read and measure, kornia is one of those that mixing is compared with
WANTED = ("datasets", "dill", "multiprocess", "evaluate", "kornia", "kornia_rs")


def pack(folder: Path) -> None:
    """Fills `CARRIED` from a folder of CIFAR-10's parquet files and the package index. Exits with a sentence where it grows too large."""
    PACKAGES.mkdir(parents=True, exist_ok=True)
    wheels = CARRIED / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    platform = [
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "--platform",
        "manylinux2014_x86_64",
        "--platform",
        "manylinux_2_28_x86_64",
    ]
    subprocess.run([*command, *platform, *WANTED], check=True)
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(PACKAGES)
        wheel.unlink()
    wheels.rmdir()
    compress(folder, IMAGES)
    size = sum(path.stat().st_size for path in carried_files()) / 2**20
    print(f"{size:.1f} MiB travel: the repository and {CARRIED.relative_to(ROOT)}")
    if size > MOST:
        sys.exit(f"what travels must be at most {MOST} MiB, got {size:.1f}; carry less.")


def carried_files() -> list[Path]:
    """All that travels: what git does not ignore, and what is carried."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    tracked = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in {*tracked, *CARRIED.rglob("*")} if path.is_file()]


def compress(folder: Path, target: Path) -> None:
    """Writes the splits of a folder of parquet files, `train` and `test`, as one file: a line of JSON, then all images' bytes."""
    import pyarrow.parquet as parquet

    about, images = {}, io.BytesIO()
    for split in ("train", "test"):
        table = parquet.read_table(next(folder.rglob(f"{split}*.parquet")))
        found = [image["bytes"] for image in table.column("img").to_pylist()]
        about[split] = {"lengths": [len(image) for image in found], "labels": table.column("label").to_pylist()}
        for image in found:
            images.write(image)
    head = json.dumps(about).encode() + b"\n"
    target.write_bytes(lzma.compress(head + images.getvalue(), preset=6))


def unpack(packed: Path, folder: Path) -> None:
    """The parquet files again, in the layout of the Hub."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    head, _, rest = lzma.decompress(packed.read_bytes()).partition(b"\n")
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = {"img": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    place = 0
    for split, about in json.loads(head).items():
        images = []
        for length in about["lengths"]:
            images.append({"bytes": rest[place : place + length], "path": None})
            place += length
        of_image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table({"img": pa.array(images, of_image), "label": pa.array(about["labels"], pa.int64())})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
