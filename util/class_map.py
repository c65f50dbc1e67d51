"""Category ids of a data set <-> labels of the class head, and their names.

COCO keeps its published head: 91 logits, and a category's id is its label. Every other data set has
as many logits as categories, in the order of their ids, which may be any. Output of the program
(detections, metrics) has the data set's ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from util.errors import UserError

AUTO = "auto"  # --num_classes: from the annotations


class Category(NamedTuple):
    """label: place among the logits; id: in the annotations."""

    label: int
    id: int
    name: str


@dataclass(frozen=True)
class ClassMap:
    """The categories of a data set, and the number of logits, some of which may have no category.

    stuff: of a panoptic data set, the labels that are stuff; the others are things. None: of another.
    """

    num_classes: int
    categories: tuple[Category, ...]
    stuff: tuple[int, ...] | None = None

    @classmethod
    def of(cls, categories: Iterable[Mapping[str, Any]], num_classes: int | str, source: str) -> ClassMap:
        """The map of COCO `categories` (dicts with id and name) for --num_classes `num_classes`.

        AUTO: COCO's own for COCO's categories, else labels 0, 1, ... in the order of the ids. A
        number: ids are labels.

        Raises:
            UserError: there are no categories, or one has an id outside [0, num_classes); `source`
            names the file.
        """
        # labels follow the ids, not the order in the file
        named = sorted((category["id"], category["name"]) for category in categories)
        if not named:
            raise UserError(f"{source} has no categories: there is nothing to detect; add them")
        if num_classes == AUTO:
            if named == [(category.id, category.name) for category in COCO_CLASSES.categories]:
                return COCO_CLASSES
            return cls(len(named), tuple(Category(label, *entry) for label, entry in enumerate(named)))
        assert isinstance(num_classes, int)
        for number, _ in named:
            if not 0 <= number < num_classes:
                more = f", or --num_classes {named[-1][0] + 1}" if number >= 0 else ""
                raise UserError(
                    f"{source} has category id {number}, outside [0, --num_classes {num_classes}); "
                    f"use --num_classes auto, which takes any ids{more}"
                )
        return cls(num_classes, tuple(Category(number, number, name) for number, name in named))

    def label_of(self, category_id: int) -> int:
        """The label of a category id. Raises KeyError."""
        return self._labels[category_id]

    def id_of(self, label: int) -> int:
        """The category id of a label; the label itself if it has no category (COCO has eleven such)."""
        return self._ids.get(label, label)

    def name_of(self, label: int) -> str:
        """The name of a label; "class <label>" if it has no category."""
        return self.names.get(label, f"class {label}")

    @cached_property
    def names(self) -> dict[int, str]:
        """Label -> name."""
        return {category.label: category.name for category in self.categories}

    def check(self, categories: Iterable[Mapping[str, Any]], source: str) -> None:
        """Raise UserError unless this map has all `categories` of the file `source`, by id and name."""
        # a renamed category is another one, even with the same id
        known = {category.id: category.name for category in self.categories}
        for category in categories:
            number, name = category["id"], category["name"]
            if known.get(number) != name:
                instead = f" (there {number} is {known[number]!r})" if number in known else ""
                remedy = "give its categories the ids and names of the training annotations"
                raise UserError(
                    f"{source} has category {number} {name!r}, which is not among the classes that "
                    f"the detector is for{instead}; {remedy}"
                )
            if self.stuff is not None and (self.label_of(number) in self.stuff) == category.get("isthing"):
                kind, other = ("a thing", "stuff") if category["isthing"] else ("stuff", "a thing")
                raise UserError(
                    f"{source} has category {number} {name!r} as {kind}, and for the detector it is {other}; "
                    f"correct its isthing"
                )

    def require_same(self, other: ClassMap, source: str) -> None:
        """Raise UserError unless `other`, of the checkpoint `source`, has the same name for every label.

        Ids may differ, because they belong to the data set.
        """
        # a label that only one of them has is a difference too
        for label in sorted(self.names.keys() | other.names.keys()):
            here, there = self.names.get(label), other.names.get(label)
            if here != there:
                raise UserError(
                    f"--resume {source} was trained on other classes: its class {label} is "
                    f"{_quoted(there)}, in this data it is {_quoted(here)}; to start from its "
                    f"weights use --finetune"
                )

    def to_plain(self) -> dict[str, Any]:
        """As a checkpoint holds it: numbers, strings and lists."""
        plain = {"num_classes": self.num_classes, "categories": [list(c) for c in self.categories]}
        if self.stuff is not None:
            plain["stuff"] = list(self.stuff)
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> ClassMap:
        """The reverse of `to_plain`. Raises ValueError for anything that it never returns."""
        try:
            stuff = plain.get("stuff")
            categories = tuple(Category(*entry) for entry in plain["categories"])
            classes = cls(plain["num_classes"], categories, None if stuff is None else tuple(stuff))
            if not classes._is_sound():
                raise ValueError
        except (AttributeError, TypeError, KeyError, ValueError):
            raise ValueError("these are no classes of a checkpoint") from None
        return classes

    def _is_sound(self) -> bool:
        """Whether all types are right, labels lie below `num_classes`, and nothing is there twice."""
        # a bool is an int to isinstance
        if type(self.num_classes) is not int:
            return False
        for label, number, name in self.categories:
            types = type(label), type(number), type(name)
            if types != (int, int, str) or not 0 <= label < self.num_classes:
                return False
        if not set(self.stuff or ()) <= self.names.keys():
            return False
        return len(self._ids) == len(self._labels) == len(self.categories)

    @cached_property
    def _labels(self) -> dict[int, int]:
        return {category.id: category.label for category in self.categories}

    @cached_property
    def _ids(self) -> dict[int, int]:
        return {category.label: category.id for category in self.categories}


def unnamed_classes(state: Mapping[str, Any]) -> ClassMap:
    """Classes without names, for weights that come without classes: a label for each logit."""
    return ClassMap(len(state["class_embed.0.bias"]), ())


def classes_of(checkpoint: Mapping[str, Any], source: str) -> ClassMap | None:
    """The classes that a checkpoint was trained on; None if it does not say.

    A published one does not either, but its head of 91 logits means COCO's.

    Raises UserError if the entry can't be right; `source` names the file.
    """
    # the number of logits, from the first class head
    weights = checkpoint.get("model", checkpoint)
    biases = [tensor for name, tensor in weights.items() if name.endswith("class_embed.0.bias")]
    logits = len(biases[0]) if biases else None
    if "classes" not in checkpoint:
        return COCO_CLASSES if logits == COCO_CLASSES.num_classes else None

    plain = checkpoint["classes"]
    # the form before there was a map: id -> name, and ids are labels
    if isinstance(plain, Mapping) and all(isinstance(key, int) for key in plain):
        plain = {"num_classes": logits, "categories": [(key, key, name) for key, name in plain.items()]}
    try:
        return ClassMap.from_plain(plain)
    except ValueError as error:
        raise UserError(f"{source} is damaged: {error}") from None


def _quoted(name: str | None) -> str:
    return repr(name) if name is not None else "none"


# id and name, of the 2017 instances annotations (cocodataset.org); the ids have gaps
_COCO_CATEGORIES = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat,
10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat,
18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack,
28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee, 35 skis, 36 snowboard,
37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard,
43 tennis racket, 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl,
52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza,
60 donut, 61 cake, 62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet,
72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone, 78 microwave, 79 oven,
80 toaster, 81 sink, 82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear,
89 hair drier, 90 toothbrush
"""


_NUMBERED = re.findall(r"(\d+) ([^,\n]+)", _COCO_CATEGORIES)
COCO_CLASSES = ClassMap(91, tuple(Category(int(number), int(number), name) for number, name in _NUMBERED))
