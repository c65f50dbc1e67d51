"""COCO exports with faults: what is sound arrives with the right numbers, what is not is counted by
kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.convert.coco import read_coco
from datasets.convert.problems import Problems
from tests.exports import convert
from tests.helpers import write_coco
from util.errors import UserError

SIZE = (60, 40)
INFINITE = float("inf")
UUID = "0b5c9b7e-1f0e-4c55-9d2b-00000000000"


def write_image(path: Path, size: tuple[int, int] = SIZE, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, (90, 9, 9)).save(path, **({"exif": exif} if orientation > 1 else {}))


def export(count: int = 4) -> dict[str, Any]:
    """Images 1, 2, ... with an object each, of alternating classes 1 and 2; the box of object n
    begins at (n, 2).
    """
    images = [
        {"id": n, "file_name": f"{n}.png", "width": SIZE[0], "height": SIZE[1]} for n in range(1, count + 1)
    ]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1 + n % 2, "bbox": [n, 2, 10, 20], "area": 150, "iscrowd": 0}
        for n in range(1, count + 1)
    ]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }


def write(folder: Path, content: dict[str, Any], name: str = "export.json") -> Path:
    for n in range(1, 5):
        write_image(folder / f"{n}.png")
    (folder / name).write_text(json.dumps(content))
    return folder


def converted(source: Path, on_bad: str = "skip") -> tuple[dict[str, Any], Problems]:
    """Both parts together, in the order of the ids."""
    faults = Problems(on_bad)
    parts = read_coco(source, faults).values()
    faults.stop_if_asked()
    whole = {
        name: [entry for part in parts for entry in part.content[name]] for name in ("images", "annotations")
    }
    return {name: sorted(entries, key=lambda entry: entry["id"]) for name, entries in whole.items()}, faults


def told(faults: Problems) -> dict[str, int]:
    return {note: count for note, count in faults.notes.items() if count}


def test_a_file_that_is_listed_twice_is_one_image_with_all_objects(tmp_path):
    content = export()
    content["images"][3]["file_name"] = "./3.png"
    written, faults = converted(write(tmp_path, content), "stop")
    assert [image["id"] for image in written["images"]] == [1, 2, 3]
    assert [(entry["id"], entry["image_id"]) for entry in written["annotations"]] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 3),
    ]
    assert told(faults) == {"images listed again under another id, merged": 1}


# ---- ids


ANEW = "ids of annotations that were double, missing or no whole numbers, renumbered"


@pytest.mark.parametrize("value", [1, "4", UUID, 4.0, None, True, [4], 2**63, INFINITE, "missing"])
def test_ids_of_annotations_are_numbered_anew_and_are_no_fault(tmp_path, value):
    content = export()
    content["annotations"][3]["id"] = value
    if value == "missing":
        del content["annotations"][3]["id"]
    written, faults = converted(write(tmp_path, content), "stop")
    assert written["annotations"] == export()["annotations"], "4 is the smallest number that is free"
    assert told(faults) == {ANEW: 1}


def test_ids_of_annotations_that_are_sound_stay(tmp_path):
    content = export()
    for annotation, number in zip(content["annotations"], (1, 900100448263, 1, 900100448263), strict=True):
        annotation["id"] = number
    written, faults = converted(write(tmp_path, content), "stop")
    assert [(a["id"], a["image_id"]) for a in written["annotations"]] == [
        (1, 1),
        (2, 3),
        (3, 4),
        (900100448263, 2),
    ]
    assert told(faults) == {ANEW: 2}


def as_text(value: Any) -> Any:
    return str(value) if type(value) is int else value


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (["1", "2", "3", "4"], [1, 2, 3, 4]),
        ([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4]),
        ([1, 2, "3", 4.0], [1, 2, 3, 4]),
        ([f"{UUID}{n}" for n in range(4)], [1, 2, 3, 4]),
        ([f"{UUID}1", 1, f"{UUID}2", 7], [2, 1, 3, 7]),
        (["01", "1", 2.5, 2**70], [2, 1, 3, 4]),
    ],
    ids=["text", "floats", "mixed", "uuid", "uuid and numbers", "no numbers"],
)
@pytest.mark.parametrize("of_references", [lambda value: value, as_text], ids=["as they are", "as text"])
def test_ids_of_images_become_whole_numbers_with_what_refers_to_them(tmp_path, ids, wanted, of_references):
    content = export()
    for image, annotation, value in zip(content["images"], content["annotations"], ids, strict=True):
        image["id"], annotation["image_id"] = value, of_references(value)
    written, faults = converted(write(tmp_path, content), "stop")
    names = {image["id"]: image["file_name"] for image in written["images"]}
    assert names == {number: f"{n}.png" for n, number in enumerate(wanted, 1)}
    assert {a["bbox"][0]: names[a["image_id"]] for a in written["annotations"]} == {
        n: f"{n}.png" for n in range(1, 5)
    }
    changed = sum(
        type(value) is not int or value != number for value, number in zip(ids, wanted, strict=True)
    )
    assert told(faults) == {"ids of images that were no whole numbers, changed to such": changed}


def test_a_category_has_one_number_in_all_files(tmp_path):
    names = {"b": "bus", "a": "van", "c": "car"}
    for part, order in (("train", "abc"), ("val", "cba")):
        content = export()
        content["categories"] = [{"id": f"{UUID}{key}", "name": names[key]} for key in order]
        for annotation, key in zip(content["annotations"], "abca", strict=True):
            annotation["category_id"] = f"{UUID}{key}"
        write(tmp_path / part, content, "_annotations.coco.json")
    parts = read_coco(tmp_path, Problems("stop"))
    for part in parts.values():
        assert {category["name"]: category["id"] for category in part.content["categories"]} == {
            "van": 1,
            "bus": 2,
            "car": 3,
        }
        assert [annotation["category_id"] for annotation in part.content["annotations"]] == [1, 2, 3, 1]


def test_objects_of_an_id_that_two_images_have_are_given_to_neither(tmp_path):
    content = export()
    content["images"][1]["id"] = 1
    written, faults = converted(write(tmp_path, content))
    assert [image["file_name"] for image in written["images"]] == ["3.png", "4.png"]
    assert [annotation["id"] for annotation in written["annotations"]] == [3, 4]
    assert faults.kinds == {"ambiguous_id": 2, "unknown_image": 1}
    assert told(faults) == {"objects of images or categories that were left out": 1}


def test_an_image_that_is_listed_twice_is_there_once(tmp_path):
    content = export()
    content["images"].append(dict(content["images"][0]))
    written, faults = converted(write(tmp_path, content))
    assert written == {name: export()[name] for name in ("images", "annotations")}
    assert faults.kinds == {"duplicate_image_id": 1}


# ---- sizes and areas


@pytest.mark.parametrize(
    "size", [{}, {"width": None, "height": None}, {"width": 0, "height": 0}, {"width": SIZE[0]}]
)
def test_sizes_that_are_missing_are_read_from_the_file(tmp_path, size):
    content = export()
    content["images"][2] = {"id": 3, "file_name": "3.png"} | size
    write(tmp_path, content)
    write_image(tmp_path / "3.png", (33, 44))
    written, faults = converted(tmp_path, "stop")
    assert (written["images"][2]["width"], written["images"][2]["height"]) == (33, 44)
    assert told(faults) == {"images without width and height, read from the file": 1}


def test_boxes_of_an_image_without_a_size_are_of_the_image_as_it_is_shown(tmp_path):
    content = export()
    content["images"][2] = {"id": 3, "file_name": "3.jpg"}
    content["annotations"][2]["segmentation"] = [[3, 2, 13, 2, 13, 22], "no outline"]
    write(tmp_path, content)
    write_image(tmp_path / "3.jpg", SIZE, orientation=6)  # shown as 40 x 60
    written, faults = converted(tmp_path, "stop")
    assert (written["images"][2]["width"], written["images"][2]["height"]) == SIZE
    # (u, v) as shown is x = v, y = 40 - u as stored
    assert written["annotations"][2]["bbox"] == [2, 40 - 13, 20, 10]
    assert written["annotations"][2]["segmentation"] == [[2, 37, 2, 27, 22, 27]]
    assert faults.notes["images with an EXIF orientation: boxes turned to the pixels as stored"] == 1


@pytest.mark.parametrize("area", [None, float("nan"), INFINITE, -1, "150", 0, 401.1])
def test_areas_that_cannot_be_right_are_replaced_by_the_boxes(tmp_path, area):
    content = export()
    content["annotations"][0]["area"] = area
    written, faults = converted(write(tmp_path, content), "stop")
    assert [annotation["area"] for annotation in written["annotations"]] == [200, 150, 150, 150]
    assert told(faults) == {"areas that could not be right, replaced by their boxes'": 1}


# ---- masks and crowds


def test_brush_masks_of_cvat_become_objects_if_asked_for(tmp_path):
    """It writes them with iscrowd 1 and run lengths that are not compressed, beside outlines and boxes."""
    content = export()
    brush = {"size": [40, 60], "counts": [85, 10, 30, 10, 2265]}
    masks = (brush, [[2, 2, 12, 2, 12, 22]], [], {**brush, "counts": [1, 2]})
    for annotation, mask in zip(content["annotations"], masks, strict=True):
        annotation |= {"segmentation": mask, "iscrowd": int(mask == brush)}
    for crowds, flag in (("keep", 1), ("objects", 0)):
        source = write(tmp_path / crowds, content)
        said = convert(source, "--output_dir", tmp_path / f"{crowds}_out", "--crowds", crowds)
        assert f"crowd regions, iscrowd 1 ({crowds}): 1\n" in said
        assert "masks: 2 of 4 objects; --masks needs all" in said
        paths = (tmp_path / f"{crowds}_out/annotations").iterdir()
        entries = [a for path in paths for a in json.loads(path.read_text())["annotations"]]
        entries.sort(key=lambda annotation: annotation["id"])
        assert entries[0] == content["annotations"][0] | {"iscrowd": flag}
        assert entries[1:] == content["annotations"][1:]


# ---- faults


def wrong_object(**values: Any):
    def change(content: dict[str, Any]) -> None:
        content["annotations"][2].update(values)

    return change


def without(key: str):
    return lambda content: content["annotations"][2].pop(key)


# of object 3
FAULTS = {
    "infinite box": (
        "wrong_bbox",
        wrong_object(bbox=[INFINITE, INFINITE, -INFINITE, -INFINITE], area=INFINITE),
    ),
    "box of NaN": ("wrong_bbox", wrong_object(bbox=[1, 2, float("nan"), 4])),
    "null in a box": ("wrong_bbox", wrong_object(bbox=[1, 2, None, 4])),
    "null box": ("wrong_bbox", wrong_object(bbox=None)),
    "no box": ("missing_field", without("bbox")),
    "empty box": ("wrong_bbox", wrong_object(bbox=[])),
    "box without width": ("degenerate_box", wrong_object(bbox=[1, 2, 0, 4])),
    "box of negative height": ("degenerate_box", wrong_object(bbox=[1, 2, 5, -4])),
    "box outside": ("box_outside", wrong_object(bbox=[61, 2, 5, 5])),
    "box that reaches out": ("box_reaches_out", wrong_object(bbox=[50, 30, 20, 20])),
    "unknown image": ("unknown_image", wrong_object(image_id=99)),
    "null image": ("wrong_image_id", wrong_object(image_id=None)),
    "no image": ("missing_field", without("image_id")),
    "unknown category": ("unknown_category", wrong_object(category_id=99)),
    "unknown image and category": ("unknown_image", wrong_object(image_id=99, category_id=99)),
    "null category": ("wrong_category_id", wrong_object(category_id=None)),
    "category of another UUID": ("wrong_category_id", wrong_object(category_id=UUID)),
    "iscrowd of 2": ("wrong_iscrowd", wrong_object(iscrowd=2)),
    "everything wrong": (
        "wrong_image_id",
        wrong_object(image_id=None, category_id="", bbox=None, iscrowd="", area=""),
    ),
    "no object": ("missing_field", lambda content: content["annotations"].__setitem__(2, None)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_object_is_one_fault_and_the_others_arrive(tmp_path, name):
    kind, spoil = FAULTS[name]
    content = export()
    spoil(content)
    written, faults = converted(write(tmp_path, content))
    assert written["images"] == export()["images"]
    assert written["annotations"] == [a for a in export()["annotations"] if a["id"] != 3]
    assert faults.kinds == {kind: 1}
    assert len(faults.messages) == 1
    assert str(tmp_path / "export.json") in faults.messages[0]
    with pytest.raises(UserError, match=f"; problems in all: {kind} 1; .*--on_bad skip"):
        converted(tmp_path, "stop")


def test_an_image_or_category_that_is_left_out_takes_its_objects_along(tmp_path):
    content = export()
    content["images"][0]["file_name"] = None
    content["images"][1]["file_name"] = "gone.png"
    content["images"] += [{"id": 5, "file_name": "broken.png"}, "no image"]
    content["annotations"] += [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    (tmp_path / "broken.png").write_text("no image")
    written, faults = converted(write(tmp_path, content))
    assert written == {name: export()[name][2:] for name in ("images", "annotations")}
    assert faults.kinds == {"missing_image": 1, "wrong_file_name": 1, "broken_image": 1, "missing_field": 1}
    assert faults.notes["objects of images or categories that were left out"] == 3
    content = export()
    del content["categories"][1]["name"]
    written, faults = converted(write(tmp_path, content))
    assert [annotation["id"] for annotation in written["annotations"]] == [2, 4]
    assert faults.kinds == {"missing_field": 1}
    assert faults.notes["objects of images or categories that were left out"] == 2


def test_boxes_that_reach_out_are_cut_if_asked_for_and_rounding_stays(tmp_path):
    content = export()
    content["annotations"][0] |= {"bbox": [50, 30.5, 20, 20], "area": 400}
    content["annotations"][1] |= {"bbox": [-5, 2, 10, 20], "area": 60}
    content["annotations"][2]["bbox"] = [50, 22, 12, 20]
    written, faults = converted(write(tmp_path, content), "clip")
    assert [(a["bbox"], a["area"]) for a in written["annotations"]] == [
        ([50, 30.5, 10, 9.5], 95),
        ([0, 2, 5, 20], 60),
        ([50, 22, 12, 20], 150),
        ([4, 2, 10, 20], 150),
    ]
    assert told(faults) == {"boxes cut at the border of their image": 2}
    assert not faults.messages


def test_an_export_of_which_nothing_is_left_is_refused(tmp_path):
    content = export()
    for image in content["images"]:
        image["file_name"] = None
    source = write(tmp_path / "in", content)
    refused = convert(source, "--output_dir", tmp_path / "out", "--on_bad", "skip", code=2)
    assert "no train images that can be used" in refused
    with pytest.raises(UserError, match="has no categories"):
        converted(write(tmp_path / "none", export() | {"categories": []}))


# ---- the command


def test_a_published_data_set_with_a_few_faults_is_converted_by_one_command(tmp_path):
    """Two double ids, and boxes that are infinite, among many objects."""
    content = export()
    content["annotations"] = [content["annotations"][i % 4] | {"id": i + 1} for i in range(400)]
    for i in (7, 250):
        content["annotations"][i]["id"] = 3
    write(tmp_path / "in", content)
    said = convert(tmp_path / "in", "--output_dir", tmp_path / "out")
    assert f"{ANEW}: 2\n" in said
    assert "; no problems; next" in said.splitlines()[-1]
    for i in range(30):
        content["annotations"][10 * i]["bbox"] = [INFINITE, INFINITE, -INFINITE, -INFINITE]
    content["annotations"][11]["image_id"] = 77
    write(tmp_path / "in", content)
    refused = convert(tmp_path / "in", "--output_dir", tmp_path / "stopped", code=2)
    assert (
        "problems in all: wrong_bbox 30, unknown_image 1; fix them, or leave such things out with "
        "--on_bad skip" in refused
    )
    assert not list((tmp_path / "stopped").iterdir())
    said = convert(tmp_path / "in", "--output_dir", tmp_path / "skipped", "--on_bad", "skip")
    assert "left out by --on_bad skip: 31 (wrong_bbox 30, unknown_image 1); next" in said.splitlines()[-1]


def test_an_export_without_faults_is_written_as_it_is_to_the_byte(tmp_path):
    write_coco(tmp_path / "coco", 3, 2)
    for on_bad in ("stop", "skip", "clip"):
        convert(tmp_path / "coco", "--output_dir", tmp_path / on_bad, "--on_bad", on_bad)
        for part in ("train", "val"):
            name = f"annotations/instances_{part}2017.json"
            assert (tmp_path / on_bad / name).read_bytes() == (tmp_path / "coco" / name).read_bytes()


# ---- any mixture


IMAGES = {
    "sound": lambda n: {"id": n},
    "text": lambda n: {"id": str(n)},
    "float": lambda n: {"id": float(n)},
    "uuid": lambda n: {"id": f"{UUID}{n}"},
    "no size": lambda n: {"id": n, "width": None},
    "size of 0": lambda n: {"id": n, "height": 0},
    "bad name": lambda n: {"id": n, "file_name": None},
    "no file": lambda n: {"id": n, "file_name": f"gone{n}.png"},
    "broken file": lambda n: {"id": n, "file_name": f"broken{n}.png", "width": 0},
    "bad width": lambda n: {"id": n, "width": -3},
    "no id": lambda n: {"id": None},
}
SOUND_IMAGES = ("sound", "text", "float", "uuid", "no size", "size of 0")
OBJECTS = {
    "sound": {},
    "same id": {"id": 1},
    "text id": {"id": "a"},
    "null id": {"id": None},
    "no area": {"area": None},
    "infinite area": {"area": INFINITE},
    "null crowd": {"iscrowd": None},
    "infinite": {"bbox": [INFINITE] * 4},
    "null box": {"bbox": None},
    "short box": {"bbox": [1, 2]},
    "degenerate": {"bbox": [1, 2, 0, 3]},
    "outside": {"bbox": [100, 2, 3, 3]},
    "reaches out": {"bbox": [40, 30, 5, 20]},
    "null image": {"image_id": None},
    "unknown image": {"image_id": 999},
    "unknown category": {"category_id": 7},
    "null category": {"category_id": None},
}
SOUND_OBJECTS = ("sound", "same id", "text id", "null id", "no area", "infinite area", "null crowd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mixture")
    for n in range(12):
        write_image(root / f"{n}.png", (SIZE[0] + n, SIZE[1]))
        (root / f"broken{n}.png").write_bytes(b"no image")
    return root


@settings(deadline=None, derandomize=True)
@given(
    images=st.lists(st.sampled_from(sorted(IMAGES)), max_size=9),
    objects=st.lists(
        st.tuples(st.sampled_from(sorted(OBJECTS)), st.integers(0, 11), st.sampled_from((3, "5"))),
        max_size=12,
    ),
    on_bad=st.sampled_from(("stop", "skip", "clip")),
)
def test_whatever_the_mixture_the_sound_arrives_and_the_rest_is_counted(folder, images, objects, on_bad):
    images = ["sound", "sound", *images]
    entries = [
        {"file_name": f"{n}.png", "width": SIZE[0] + n, "height": SIZE[1]} | IMAGES[name](n)
        for n, name in enumerate(images)
    ]
    sound_images = [n for n, name in enumerate(images) if name in SOUND_IMAGES]
    annotations, sound = [], []
    for i, (name, n, category) in enumerate(objects):
        n %= len(images)
        box = [i + 0.5, 3, 7, 9]
        whole = {
            "id": 100 + i,
            "image_id": entries[n]["id"],
            "category_id": category,
            "bbox": box,
            "area": 40,
            "iscrowd": i % 2,
        }
        annotations.append(whole | OBJECTS[name])
        cut = on_bad == "clip" and name == "reaches out"
        if n in sound_images and (name in SOUND_OBJECTS or cut):
            wanted = [40, 30, 5, 10] if cut else box
            sound.append((f"{n}.png", {"3": "three", "5": "five"}[str(category)], wanted))
    categories = [{"id": "5", "name": "five"}, {"id": 3, "name": "three"}]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "export.json").write_text(json.dumps(content))

    try:
        written, faults = converted(folder, on_bad)
    except UserError as error:
        assert on_bad == "stop"
        assert "problems in all: " in str(error)
        assert len(sound_images) < len(images) or len(sound) < len(objects)
        return
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in written["images"]}
    assert sizes == {f"{n}.png": (SIZE[0] + n, SIZE[1]) for n in sound_images}
    assert len(written["images"]) == len(sizes)
    names = {image["id"]: image["file_name"] for image in written["images"]}
    arrived = [
        (names[a["image_id"]], {3: "three", 5: "five"}[a["category_id"]], a["bbox"])
        for a in written["annotations"]
    ]
    assert sorted(arrived) == sorted(sound)
    assert len({a["id"] for a in written["annotations"]}) == len(arrived)
    assert all(0 < a["area"] <= a["bbox"][2] * a["bbox"][3] for a in written["annotations"])
    gone_along = faults.notes["objects of images or categories that were left out"]
    assert len(faults.messages) + gone_along == len(images) - len(sound_images) + len(objects) - len(sound)
    assert faults.kinds.total() == len(faults.messages)
