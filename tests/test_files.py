"""Which file a name means: spellings, names of other machines, links, and pictures that must not be
taken for others.
"""

from __future__ import annotations

import codecs
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from datasets.coco import CocoDetection
from datasets.file_index import BARE, END, SPELLING, UNKNOWN_SIZE, Index
from datasets.file_names import IMAGE_SUFFIXES, Places, files_below, portable
from datasets.input_files import find_files
from datasets.respell import respell
from datasets.transforms import eval_transform
from tests.helpers import write_coco
from util.errors import UserError
from util.text_files import read_lines, read_text, unquoted

SIZE = (40, 20)


def write_images(root: Path, *names: str, size: tuple[int, int] = SIZE) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / name)


def find(root: Path, *names: str, size: tuple[int, int] | None = SIZE) -> dict[str, tuple[str, str]]:
    """Name -> (where the file is below `root`, how it was found)."""
    findings = Index.below(root).find(dict.fromkeys(names, size))
    assert findings.found.keys() | findings.missing.keys() == set(names)
    return {
        name: (found.path.relative_to(root).as_posix(), found.how) for name, found in findings.found.items()
    }


def why_not(root: Path, name: str, *others: str, size: tuple[int, int] | None = SIZE) -> str:
    return Index.below(root).find(dict.fromkeys((name, *others), size)).missing[name]


# ---- names


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a//b.jpg", "a/b.jpg"),
        ("a\\b.jpg", "a/b.jpg"),
        ("/srv/a/b.jpg", "srv/a/b.jpg"),
        ("C:\\data\\b.jpg", "data/b.jpg"),
        ("c:b.jpg", "b.jpg"),
        ("\\\\host\\share\\b.jpg", "host/share/b.jpg"),
        ("../../upload/4/b.jpg", "upload/4/b.jpg"),
        ("a/../../c/b.jpg", "c/b.jpg"),
        ("a/..", ""),
        ("..", ""),
        ("/", ""),
        ("", ""),
        ("..\\..\\b.jpg", "b.jpg"),
        ("https://host/a/b.jpg?token=1", "a/b.jpg"),
        ("s3://bucket/a/b.jpg", "a/b.jpg"),
        ("/data/local-files/?d=a%20b/c.jpg", "a b/c.jpg"),
        ("/data/local-files/?d=../../../etc/b.jpg", "etc/b.jpg"),
        ("http://host/data/local-files/?d=a+b & c#1.jpg", "a+b & c#1.jpg"),
        ("/?d=a%2Bb%26c.jpg", "a+b&c.jpg"),
        ("what?.jpg", "what?.jpg"),
        ("http://[::1/a.jpg", "http:/[::1/a.jpg"),
        (" a b.jpg", " a b.jpg"),
    ],
)
def test_a_portable_name_leads_nowhere_but_down(name, wanted):
    assert portable(name) == wanted
    assert portable(wanted) == wanted


@pytest.mark.parametrize(
    ("name", "on_disk", "how"),
    [
        ("images/a.jpg", "images/a.jpg", ""),
        ("a.jpg", "images/a.jpg", ""),
        ("cam/a.jpg", "images/default/cam/a.jpg", ""),
        ("images\\a.jpg", "images/a.jpg", SPELLING),
        ("./a.jpg", "images/a.jpg", SPELLING),
        ("A.JPG", "images/a.jpg", SPELLING),
        ("Images/a.jpg", "images/A.jpg", SPELLING),
        ("über.jpg", unicodedata.normalize("NFD", "über.jpg"), SPELLING),
        ("a%20b.jpg", "images/a b.jpg", SPELLING),
        (unicodedata.normalize("NFD", "über.jpg"), "über.jpg", SPELLING),
        ("a b.jpg", "a%20b.jpg", SPELLING),
        ("data/images/a.jpg", "images/a.jpg", END),
        ("/srv/upload/images/a.jpg", "images/a.jpg", END),
        ("C:\\Users\\me\\set\\images\\a.jpg", "images/a.jpg", END),
        ("../../images/a.jpg", "images/a.jpg", SPELLING),
        ("http://host/upload/4/a.jpg", "images/a.jpg", BARE),
        ("/data/local-files/?d=set/a.jpg", "images/a.jpg", BARE),
        ("images/0b1c2d3e-a.jpg", "photos/a.jpg", BARE),
        ("/srv/a.jpg", "a.jpg", BARE),
        ("images/a", "images/a.jpg", SPELLING),
    ],
)
def test_a_name_is_found_as_tools_write_it(tmp_path, name, on_disk, how):
    write_images(tmp_path, on_disk, "images/b.jpg")
    write_images(tmp_path.parent, "decoys/a.jpg")
    assert find(tmp_path, name) == {name: (on_disk, how)}


def test_names_may_begin_with_the_folder_itself(tmp_path):
    write_images(tmp_path / "set/images", "1.jpg")
    root = tmp_path / "set/images"
    assert find(root, "images/1.jpg") == {"images/1.jpg": ("1.jpg", "")}
    assert find(root, "set/images/1.jpg") == {"set/images/1.jpg": ("1.jpg", "")}
    assert find(root, str(root / "1.jpg")) == {str(root / "1.jpg"): ("1.jpg", SPELLING)}


def test_exact_names_have_priority_over_other_spellings(tmp_path):
    write_images(tmp_path, "images/a.jpg", "images/A.jpg", "images/b.jpg")
    assert find(tmp_path, "a.jpg", "A.jpg") == {"a.jpg": ("images/a.jpg", ""), "A.jpg": ("images/A.jpg", "")}
    assert find(tmp_path, "A.JPG") == {}
    assert find(tmp_path, "b.jpg", "B.jpg") == {"b.jpg": ("images/b.jpg", "")}, "one file is not two images"
    assert "which is that of b.jpg" in why_not(tmp_path, "B.jpg", "b.jpg")


def test_a_bare_name_must_be_the_only_one_and_of_the_annotated_size(tmp_path):
    write_images(tmp_path, "a/1.jpg", "b/1.jpg", "a/2.jpg")
    assert find(tmp_path, "/x/1.jpg", "/x/2.jpg") == {"/x/2.jpg": ("a/2.jpg", BARE)}
    assert "there are 2 of that name" in why_not(tmp_path, "/x/1.jpg")
    assert "not a picture of the annotated size" in why_not(tmp_path, "/x/2.jpg", size=(20, 40))
    assert "not a picture of the annotated size" in why_not(tmp_path, "/x/2.jpg", size=UNKNOWN_SIZE)
    assert find(tmp_path, "/x/2.jpg", size=None) == {"/x/2.jpg": ("a/2.jpg", BARE)}, (
        "where nobody knows sizes"
    )
    assert "it is not there" in why_not(tmp_path, "/x/3.jpg")


def test_a_folder_of_images_has_priority_over_masks_of_the_same_names(tmp_path):
    write_images(tmp_path, "images/1.jpg", "masks/1.jpg", "a/2.jpg", "b/2.jpg")
    assert find(tmp_path, "1.jpg") == {"1.jpg": ("images/1.jpg", "")}
    assert find(tmp_path, "2.jpg") == {}


def test_a_turned_picture_has_the_size_that_viewers_show(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(tmp_path / "a.jpg", exif=exif)
    assert (
        find(tmp_path, "/x/a.jpg", size=SIZE[::-1])
        == find(tmp_path, "/x/a.jpg")
        == {"/x/a.jpg": ("a.jpg", BARE)}
    )


def test_the_end_of_a_path_tells_pictures_of_one_name_apart(tmp_path):
    write_images(tmp_path, "images/day/1.jpg", "images/night/1.jpg")
    names = "/srv/set/night/1.jpg", "/srv/set/day/1.jpg"
    assert find(tmp_path, *names) == {
        names[0]: ("images/night/1.jpg", END),
        names[1]: ("images/day/1.jpg", END),
    }


def test_a_picture_that_another_name_means_is_not_taken(tmp_path):
    write_images(tmp_path, "cam2/day/1.jpg")
    assert find(tmp_path, "cam1/day/1.jpg", "cam2/day/1.jpg") == {"cam2/day/1.jpg": ("cam2/day/1.jpg", "")}
    assert find(tmp_path, "/a/1.jpg", "/b/1.jpg") == {}, "of two that may be meant none"
    index = Index.below(tmp_path)
    assert (
        "that of another image"
        in index.find({"/a/1.jpg": SIZE}, taken=[tmp_path / "cam2/day/1.jpg"]).missing["/a/1.jpg"]
    )


def test_masks_and_thumbnails_are_not_taken_for_images_that_are_missing(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    write_images(tmp_path, *(f"images/{name}" for name in names[1:]), *(f"masks/{name}" for name in names))
    Image.new("RGB", (10, 5)).save(tmp_path / "masks/1.png")
    wanted = {name: (f"images/{name}", "") for name in names[1:]}
    for name in names[2:]:
        (tmp_path / f"masks/{name}").unlink()
    write_images(tmp_path, "masks/2.png", "masks/3.png")
    assert find(tmp_path, *names) == wanted
    assert "may be a mask" in why_not(tmp_path, *names)
    for name in names:
        write_images(tmp_path, f"thumbnails/{name}", size=(10, 5))
    assert find(tmp_path, *names) == wanted, "thumbnails are all there, and of another size"


def test_likely_folders_come_first(tmp_path):
    write_images(tmp_path, "train/1.jpg", "val/1.jpg", "val/2.jpg")
    findings = Index.below(tmp_path).find(
        {"1.jpg": SIZE, "2.jpg": SIZE}, prefers=lambda path: 1 if "train" in path.parts else -1
    )
    assert {name: found.path for name, found in findings.found.items()} == {"1.jpg": tmp_path / "train/1.jpg"}
    assert "it is not there" in findings.missing["2.jpg"]


def test_places_are_found_in_any_spelling(tmp_path):
    write_images(tmp_path, "Images/Über/1.jpg", "x/a.jpg", "x/A.jpg")
    places = Places(tmp_path)
    assert places.at(("images", unicodedata.normalize("NFD", "über"))) == tmp_path / "Images/Über"
    assert places.at(("x", "a.jpg")) == tmp_path / "x/a.jpg"
    assert places.at(("x", "A.JPG")) is None
    assert places.at(("nowhere", "a.jpg")) is None


# ---- folders


def test_linked_folders_are_followed_and_not_in_circles(tmp_path):
    write_images(tmp_path / "disk", "1.jpg", "sub/2.jpg")
    write_images(tmp_path / "root", "0.jpg", ".hidden/3.jpg", "__MACOSX/4.jpg", "@eaDir/5.jpg")
    for link, target in (
        ("root/linked", "disk"),
        ("disk/sub/up", "disk"),
        ("root/here", "root"),
        ("disk/other", "root"),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "root/itself.jpg").symlink_to(tmp_path / "root/itself.jpg")
    (tmp_path / "root/nowhere.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = [
        path.relative_to(tmp_path / "root").as_posix()
        for path in files_below(tmp_path / "root", IMAGE_SUFFIXES)
    ]
    assert found == ["0.jpg", "linked/1.jpg", "linked/sub/2.jpg"]


def test_a_link_shows_a_folder_that_is_there_already_once_more(tmp_path):
    write_images(tmp_path, "m/1.jpg")
    for link in ("a", "z"):
        (tmp_path / link).symlink_to("m")
    assert files_below(tmp_path, IMAGE_SUFFIXES) == [tmp_path / f"{folder}/1.jpg" for folder in "amz"]
    assert find(tmp_path, "z/1.jpg", "/srv/1.jpg") == {"z/1.jpg": ("z/1.jpg", "")}
    assert find(tmp_path, "/srv/1.jpg") == {"/srv/1.jpg": ("a/1.jpg", BARE)}, (
        "one picture, however many paths lead to it"
    )


def test_folders_that_are_all_linked_to_each_other_are_listed_in_the_end(tmp_path):
    folders = [tmp_path / f"root/{i}" for i in range(12)]
    for folder in folders:
        write_images(folder, "a.jpg")
    for folder in folders:
        for other in folders:
            (folder / f"to_{other.name}").symlink_to(other)
    found = files_below(tmp_path / "root", IMAGE_SUFFIXES)
    assert {path.resolve() for path in found} == {folder / "a.jpg" for folder in folders}
    assert len(found) <= len(folders) ** 3


def test_a_folder_that_cannot_be_searched_is_named(tmp_path, monkeypatch):
    def refusing(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="can't be searched \\(Permission denied\\); make it readable"):
        files_below(tmp_path, IMAGE_SUFFIXES)


def test_prediction_takes_pictures_of_linked_folders_once(tmp_path):
    write_images(tmp_path / "disk", "1.jpg", "2.jpg")
    write_images(tmp_path / "photos", "0.jpg")
    for link, target in (("holiday", "disk"), ("again", "disk"), ("circle", "photos")):
        (tmp_path / "photos" / link).symlink_to(tmp_path / target)
    assert [source.name for source in find_files([tmp_path / "photos"])] == [
        "0.jpg",
        "again/1.jpg",
        "again/2.jpg",
    ]


# ---- the reader of training data


def test_training_reads_images_whose_names_are_spelled_otherwise(tmp_path):
    write_coco(tmp_path, 4)
    text = (tmp_path / "annotations/instances_train2017.json").read_text()
    for i, written in enumerate(("train2017\\\\000000.png", "000001.PNG", "x/000002.png")):
        text = text.replace(f"{i:06}.png", written)
    (tmp_path / "annotations/instances_train2017.json").write_text(text)
    dataset = CocoDetection(
        tmp_path / "train2017",
        tmp_path / "annotations/instances_train2017.json",
        eval_transform(64, 96),
        seed=0,
    )
    assert [dataset.file_of(i).relative_to(tmp_path / "train2017").as_posix() for i in dataset.image_ids] == [
        f"{i:06}.png" for i in range(4)
    ]
    assert all(len(dataset[i][1]["boxes"]) == 2 for i in range(4))


def test_respelling_looks_at_nothing_outside_of_the_folder(tmp_path):
    write_images(tmp_path, "inside/a.jpg", "outside/b.jpg", "outside/a.jpg")
    images = [
        {"file_name": name, "width": 40, "height": 20}
        for name in ("../outside/b.jpg", str(tmp_path / "outside/a.jpg"))
    ]
    assert respell(images, tmp_path / "inside") == {BARE: 1}
    assert [image["file_name"] for image in images] == ["../outside/b.jpg", "a.jpg"]


def test_training_takes_no_image_of_another_folder_for_one_that_is_missing(tmp_path):
    write_images(tmp_path, "1.jpg", "more/2.jpg")
    images = [{"file_name": name, "width": 40, "height": 20} for name in ("1.jpg", "2.jpg")]
    assert respell(images, tmp_path) == {}
    assert [image["file_name"] for image in images] == ["1.jpg", "2.jpg"]


# ---- text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_is_read_whatever_wrote_it(tmp_path, encoding, end):
    path = tmp_path / "list.txt"
    path.write_bytes(end.join(("# names", "  Straße 1.jpg ", "", "'quoted'", "007")).encode(encoding))
    assert [(number, text) for number, text in read_lines(path)] == [
        (2, "Straße 1.jpg"),
        (4, "quoted"),
        (5, "007"),
    ]
    assert read_text(path).startswith("# names\n")


def test_byte_order_marks_of_either_order_are_understood(tmp_path):
    for mark, encoding in ((codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF16_LE, "utf-16-le")):
        (tmp_path / "a.txt").write_bytes(mark + "é".encode(encoding))
        assert read_text(tmp_path / "a.txt") == "é"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc", "é".encode("latin-1")])
def test_what_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="a.txt is no text; save it as UTF-8"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "wanted"), [('"a b"', "a b"), ("'a'", "a"), ("'a", "'a"), ('a"', 'a"'), ('"', '"'), ("", "")]
)
def test_quotes_around_a_text_are_taken_off(text, wanted):
    assert unquoted(text) == wanted
