"""Invented exports that mix the habits of labelling tools, systems and users: what is sound
arrives, what is not is counted.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from datasets.convert.coco import read_coco
from datasets.convert.problems import Problems
from datasets.convert.voc import VocRules, read_voc
from datasets.convert.yolo import read_yolo
from tests.exports import (
    boxes,
    class_names,
    coco_boxes,
    coco_text,
    merged,
    voc_text,
    wanted,
    write,
    write_image,
    yolo_line,
)
from tests.faults.fuzz_watch import Watch

pytest.importorskip("hypothesis")  # a machine with a GPU and without a network may lack it
from hypothesis import given, settings
from hypothesis import strategies as st

FEW = settings(max_examples=12, deadline=None)  # for each of the prefixes
# where names begin on the labelling machine; there are decoys of the right names outside of the
# export
PREFIXES = (
    "",
    "./",
    "data/",
    "/srv/upload/4/",
    "C:\\work\\set\\",
    "../../upload/4/",
    "..\\set\\",
    "https://host/upload/",
)
FAULTS = ("missing", "broken", "outside", "class")
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image of an export: its folder and name as its labels have them, and what became of it.

    spelling: of the file's name, "" as written, "case" or "NFD". fault: "" for a sound one,
    "missing" (the image), "broken" (the labels), "outside" (its box), "class" (unknown or none).
    """

    number: int
    folder: str
    stem: str
    ending: str
    spelling: str
    fault: str

    @property
    def name(self) -> str:
        return f"{self.stem}{self.ending}"

    @property
    def file(self) -> str:
        if self.spelling == "NFD":
            return unicodedata.normalize("NFD", self.name)
        return self.name.swapcase() if self.spelling == "case" else self.name


@st.composite
def pictures(draw: st.DrawFn, faults: tuple[str, ...]) -> list[Picture]:
    """At least one of them sound."""
    kinds = st.tuples(
        st.sampled_from(("", "cam 1/", "Ünterwegs/", "a/b.c/")),
        st.sampled_from(("img", "Größe", "IMG 07", "x.v2", "#1")),
        st.sampled_from((".jpg", ".png", ".JPG")),
        st.sampled_from(("", "case", "NFD")),
        st.sampled_from(("", *faults)),
    )
    drawn = draw(st.lists(kinds, min_size=1, max_size=6))
    chosen = [("", "first", ".jpg", "", ""), *drawn]
    return [Picture(i, folder, f"{stem}_{i}", *rest) for i, (folder, stem, *rest) in enumerate(chosen, 1)]


@dataclasses.dataclass(frozen=True)
class Habits:
    """backslashes: between folders. linked: the folder of images is a link. prefix: before every
    name that is written.
    """

    backslashes: bool
    encoding: str
    line_end: str
    quoted: bool
    linked: bool
    prefix: str = ""

    def written(self, name: str) -> str:
        name = self.prefix + name
        return name.replace("/", "\\") if self.backslashes and "://" not in name else name

    def write_lines(self, path: Path, lines: list[str]) -> None:
        quoted = [f'"{line}"' if self.quoted else line for line in lines]
        write(path, self.line_end.join(("# of a tool", "", *quoted, "")), self.encoding)


habits = st.builds(
    Habits,
    st.booleans(),
    st.sampled_from(ENCODINGS),
    st.sampled_from(("\n", "\r\n")),
    st.booleans(),
    st.booleans(),
)


@contextmanager
def export(chosen: list[Picture], habit: Habits, images: str) -> Iterator[Path]:
    """A folder with the images in `images`. Outside of it names seem to lead to decoys, which
    nobody may open.
    """
    top = Path(tempfile.mkdtemp())
    try:
        root, disk = top / "work/given/export", top / "work/disk"
        place = disk if habit.linked else root / images
        place.mkdir(parents=True)
        for picture in chosen:
            write_image(top / "decoys/4" / images / picture.folder / picture.name, picture.number)
            if picture.fault != "missing":
                write_image(place / picture.folder / picture.file, picture.number)
        if habit.linked:
            (root / images).parent.mkdir(parents=True, exist_ok=True)
            (root / images).symlink_to(disk)
        for outside in ("upload", "given/upload", "given/set", "set"):
            (root.parents[1] / outside).symlink_to(top / "decoys" / ("4" if "set" in outside else ""))
        yield root
    finally:
        shutil.rmtree(top)


def nothing_else_opened(root: Path) -> AbstractContextManager[None]:
    """Nothing but the export, and the disk that it links to; what the decoys' links lead to is
    elsewhere.
    """
    return Watch(root.parents[1], 600, hard=False).case()


def places(root: Path, chosen: list[Picture], images: str, habit: Habits) -> dict[int, str]:
    folder = root / images
    return {
        picture.number: (folder / picture.folder / picture.file)
        .resolve()
        .relative_to(root.parents[1])
        .as_posix()
        for picture in chosen
        if not picture.fault
    }


@pytest.mark.parametrize("prefix", PREFIXES)
@FEW
@given(chosen=pictures(FAULTS), habit=habits, layout=st.sampled_from(("lists", "darknet")))
def test_yolo_exports(prefix, chosen, habit, layout):
    habit = dataclasses.replace(habit, prefix=prefix)
    images = {"lists": "images/train", "darknet": "obj_train_data"}[layout]
    labels = {"lists": "labels/train", "darknet": "obj_train_data"}[layout]
    with export(chosen, habit, images) as root:
        for picture in chosen:
            text = yolo_line(picture.number, label=7 if picture.fault == "class" else 0)
            text = {"broken": "0 0.5 x 0.1 0.1\n", "outside": "0 1.5 0.5 0.1 0.1\n"}.get(picture.fault, text)
            write(
                root / labels / picture.folder / f"{picture.stem}.txt",
                text.replace("\n", habit.line_end),
                habit.encoding,
            )
        names = [habit.written(f"{images}/{picture.folder}{picture.name}") for picture in chosen]
        habit.write_lines(root / "train.txt", names)
        if layout == "lists":
            write(
                root / "data.yaml",
                f"path: {habit.prefix}set\ntrain: train.txt\nnames: [no, 007]\n",
                habit.encoding,
            )
        else:
            habit.write_lines(root / "obj.names", ["no", "007"])
            write(
                root / "obj.data",
                habit.line_end.join(("classes = 2", "train = data/train.txt", "names = data/obj.names")),
            )
        faults = Problems("skip")
        with nothing_else_opened(root):
            data = read_yolo(root, faults)
        found = boxes(data, root.parents[1])["train"]
        assert class_names(data) == ["no", "007"]
        sound = wanted(places(root, chosen, images, habit), "no")
        assert {name: objects for name, objects in found.items() if objects} == sound
        assert len(faults.messages) == sum(bool(picture.fault) for picture in chosen)
        assert len(found) == sum(picture.fault != "missing" for picture in chosen)
        assert sum(faults.notes[note] for note in faults.notes if "no objects" in note) == 0


@pytest.mark.parametrize("prefix", PREFIXES)
@FEW
@given(chosen=pictures(FAULTS), habit=habits, numbered=st.booleans(), listed=st.booleans())
def test_voc_exports(prefix, chosen, habit, numbered, listed):
    """numbered: XML files have names of their own. listed: the images that count are in a list."""
    habit = dataclasses.replace(habit, prefix=prefix)
    with export(chosen, habit, "JPEGImages") as root:
        entries = []
        for picture in chosen:
            filename = habit.written(f"JPEGImages/{picture.folder}{picture.name}")
            text = voc_text(picture.number, filename, "" if picture.fault == "class" else "thing")
            outside = text.replace("<xmin>", "<xmin>9").replace("<xmax>", "<xmax>9")
            text = {"broken": text[:-5], "outside": outside}.get(picture.fault, text)
            entry = f"{picture.number:06}" if numbered else f"{picture.folder}{picture.stem}"
            write(root / f"Annotations/{entry}.xml", text)
            entries.append(entry)
        if listed:
            names = [habit.written(f"JPEGImages/{entry}.jpg") for entry in entries]
            habit.write_lines(root / "ImageSets/Main/default.txt", names)
        faults = Problems("skip")
        with nothing_else_opened(root):
            found = boxes(read_voc(root, VocRules(), faults), root.parents[1])["train"]
        assert {name: objects for name, objects in found.items() if objects} == wanted(
            places(root, chosen, "JPEGImages", habit)
        )
        assert len(faults.messages) == sum(bool(picture.fault) for picture in chosen)


@pytest.mark.parametrize("prefix", PREFIXES)
@FEW
@given(chosen=pictures(("missing",)), habit=habits, begins=st.sampled_from(("", "images/")))
def test_coco_exports(prefix, chosen, habit, begins):
    """begins: names are relative to the export, or to its folder of images."""
    habit = dataclasses.replace(habit, prefix=prefix)
    with export(chosen, habit, "images") as root:
        names = {
            picture.number: habit.written(f"{begins}{picture.folder}{picture.name}") for picture in chosen
        }
        write(root / "result.json", coco_text(names), habit.encoding)
        if sum(picture.fault == "" for picture in chosen) < 2:
            return  # two parts need an image each
        faults = Problems("skip")
        with nothing_else_opened(root):
            parts = read_coco(root, faults)
        assert merged(coco_boxes(parts, root.parents[1])) == wanted(places(root, chosen, "images", habit))
        assert len(faults.messages) == sum(bool(picture.fault) for picture in chosen)
