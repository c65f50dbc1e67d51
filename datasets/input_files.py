"""The pictures and videos that a user names for prediction, and their ids in a COCO file."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.coco_format import is_file_name, read_images_and_categories
from datasets.file_index import SPELLING, Index, annotated_size
from datasets.file_names import IMAGE_SUFFIXES, files_below, portable
from util.class_map import ClassMap
from util.errors import UserError
from util.images.video import SUFFIXES as VIDEO_SUFFIXES


@dataclass(frozen=True)
class InputFile:
    """A picture or a video.

    name: its path below the folder that all inputs have in common. image_id: None for the next
    number.
    """

    path: Path
    name: str
    image_id: int | None = None

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def output_name(self) -> str:
        """The name of the annotated copy: the same, if that is a format to write."""
        # the first is for inputs of other formats
        formats = (".mp4",) if self.is_video else (".png", ".jpg", ".jpeg")
        if self.path.suffix.lower() in formats:
            return self.name
        return self.name + formats[0]


def find_files(inputs: Sequence[Path]) -> list[InputFile]:
    """The files of `inputs`, each once; folders are searched for pictures, in natural order.

    Links to folders are followed; a file that is reached twice is taken once.

    Raises UserError for a path that does not exist, and a folder without pictures.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path} does not exist; give pictures, videos, or folders of pictures")
        inside = [path]
        if path.is_dir():
            inside = sorted(files_below(path, IMAGE_SUFFIXES), key=_natural)
        if not inside:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            raise UserError(f"{path} holds no pictures ({suffixes}); videos are given by name")
        # the same folder by two names, or a file that is named beside its folder
        for file in map(os.path.abspath, inside):
            folder, name = os.path.split(file)
            found.setdefault((os.path.realpath(folder), name), Path(file))

    # Copies keep the folders below what all inputs have in common.
    folders = [path if path.is_dir() else path.parent for path in inputs]
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    return [InputFile(file, file.relative_to(common).as_posix()) for file in found.values()]


def _natural(path: Path) -> list[list[Any]]:
    """Sort key: 2.jpg before 10.jpg."""
    key: list[list[Any]] = []
    for part in path.parts:
        words: list[Any] = re.split(r"([0-9]+)", part.casefold())
        # every second word is a number
        words[1::2] = map(int, words[1::2])
        key.append(words)
    return key


def check_output(output_dir: Path, inputs: Sequence[str], files: Sequence[InputFile]) -> None:
    """Raise UserError if the output would replace an input, or be an input of the next run."""
    # real paths: a link must not hide that two places are one
    output = Path(os.path.realpath(output_dir))
    if output.is_file():
        raise UserError(f"--output_dir {output_dir} is a file; name a folder")
    for path in inputs:
        folder = Path(os.path.realpath(path))
        if folder.is_dir() and output.is_relative_to(folder):
            inside = f"lies in the input folder {path}; name a folder outside of it"
            raise UserError(f"--output_dir {output_dir} {inside}")

    # A copy has another suffix where its format can't be written, so two inputs may have one copy.
    originals = {os.path.realpath(file.path) for file in files}
    copies: dict[str, InputFile] = {}
    for file in files:
        name = file.output_name
        twin = copies.setdefault(name, file)
        if twin is not file:
            raise UserError(f"{twin.path} and {file.path} would have one copy, {name}; predict them apart")
        if os.path.realpath(output_dir / name) in originals:
            replaced = f"would replace the input {file.path}; name another folder"
            raise UserError(f"--output_dir {output_dir} {replaced}")


def with_annotated_ids(files: Sequence[InputFile], annotations: Path, classes: ClassMap) -> list[InputFile]:
    """The pictures that a COCO file lists, with its names and ids; how many it does not is printed.

    Raises UserError for a file that lists none of them, two pictures that are the same image, a
    video, and a category that `classes` does not have.
    """
    images, categories = read_images_and_categories(annotations)
    classes.check(categories, str(annotations))
    ids = {image["file_name"]: image["id"] for image in images}
    for file in files:
        if file.is_video:
            raise UserError(f"--annotations are of pictures and {file.path} is a video; give them apart")

    # A picture may be listed once only.
    where = f"--annotations {annotations}"
    listed: dict[str, Path] = {}
    for path, name in _annotated_names([file.path for file in files], images, annotations).items():
        other = listed.setdefault(name, path)
        if other is not path:
            raise UserError(f"{other} and {path} are both {name} of {where}; leave out one")
    if not listed:
        raise UserError(f"{where} lists none of the pictures, not {files[0].path}; leave it out")

    # what is not in both; names of other machines become names of this one
    if len(listed) < len(files):
        print(f"pictures that {where} does not list, left out: {len(files) - len(listed)}")
    if len(listed) < len(ids):
        print(f"images of {where} without a picture here: {len(ids) - len(listed)}")
    found = []
    for name, path in listed.items():
        here = name if is_file_name(name) else portable(name)
        found.append(InputFile(path, here, ids[name]))
    return found


def _annotated_names(
    paths: Sequence[Path], images: Iterable[dict[str, Any]], annotations: Path
) -> dict[Path, str]:
    """The annotated file names of pictures that have one: the longest that the picture's path ends with.

    For the others, an image that no picture has yet is searched for by another spelling or by the
    end of its name. How many were found so is printed.
    """
    # Names as they are, at first: the longest end, as a/1.jpg and 1.jpg may both be annotated.
    sizes = {image["file_name"]: annotated_size(image) for image in images}
    names: dict[Path, str] = {}
    for path in paths:
        ends = ["/".join(path.parts[start:]) for start in range(1, len(path.parts))]
        fitting = [end for end in ends if end in sizes]
        if fitting:
            names[path] = fitting[0]

    # Names of other systems and machines, among the images without a picture.
    others = [(path.parts[1:], path) for path in paths if path not in names]
    for name in names.values():
        sizes.pop(name, None)
    notes: Counter[str] = Counter()
    for name, (path, how) in Index(others, annotations).find(sizes).found.items():
        # A name of this machine must fit wholly: by its end, a picture could get the id of one in
        # another folder. Of a path of another machine only the end can fit.
        if how in ("", SPELLING) or not is_file_name(name):
            names[path] = name
            notes[how or SPELLING] += 1
    for how, count in notes.items():
        print(f"{how}: {count}")
    return {path: names[path] for path in paths if path in names}
