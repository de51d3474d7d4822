"""Classes, names, colours and preferred places of the embedded world ("material scenes").

The world has 12 materials in six confusable pairs. Two biases are built into the *pretraining* of the tiny
CLIP and are absent from the *task*:

- class preference through language: the task names half of the classes by a word that is rare in pretraining
  captions (``RARE_NAME_SHARE``), so the tiny CLIP underrates exactly those classes;
- space preference: pretraining compositions put materials in their preferred places (``PLACES``), the task's
  scenes put them anywhere.

In the task, one class of each pair is twice as frequent as the other, in three pairs the one with the rare name:
as in real data, a calibration that takes all classes for equally frequent is wrong about that.
"""

from __future__ import annotations

from dataclasses import dataclass

# The two ends of a pair prefer opposite places, so where a region lies tells the tiny CLIP which of the two
# it "should" be.
PLACES = ("up", "down", "border", "centre")


@dataclass(frozen=True)
class Material:
    """One material of the world.

    Attributes:
        key: the material itself, whatever it is called; the name of its texture function.
        common_name: its usual name in pretraining captions.
        rare_name: its rare name in pretraining captions.
        task_name: the name the task's class list uses, one of the two above.
        place: preferred place in pretraining compositions, one of ``PLACES``.
        task_weight: relative chance to be drawn for a region of a task scene.
        color: RGB colour for drawing label maps, each 0-255.
    """

    key: str
    common_name: str
    rare_name: str
    task_name: str
    place: str
    task_weight: float
    color: tuple[int, int, int]


# Pairs are neighbours: material i is blended with its partner i ^ 1.
MATERIALS: tuple[Material, ...] = (
    Material("sky", "sky", "heaven", "sky", "up", 1.0, (120, 190, 255)),
    Material("water", "water", "lake", "lake", "down", 0.5, (20, 70, 200)),
    Material("leaves", "leaves", "foliage", "leaves", "up", 0.5, (0, 110, 50)),
    Material("grass", "grass", "lawn", "lawn", "down", 1.0, (140, 220, 60)),
    Material("snow", "snow", "ice", "snow", "up", 0.5, (240, 245, 255)),
    Material("sand", "sand", "desert", "desert", "down", 1.0, (230, 200, 120)),
    Material("brick", "brick", "wall", "wall", "border", 1.0, (160, 50, 40)),
    Material("wood", "wood", "timber", "wood", "centre", 0.5, (120, 80, 30)),
    Material("stone", "stone", "rock", "rock", "border", 0.5, (150, 150, 160)),
    Material("road", "road", "street", "road", "centre", 1.0, (60, 60, 75)),
    Material("flowers", "flowers", "plants", "plants", "border", 0.5, (240, 90, 190)),
    Material("fire", "fire", "flames", "fire", "centre", 1.0, (255, 130, 0)),
)

NUM_MATERIALS = len(MATERIALS)
EMBEDDED_CLASSES: tuple[str, ...] = tuple(m.task_name for m in MATERIALS)
EMBEDDED_COLORS: tuple[tuple[int, int, int], ...] = tuple(m.color for m in MATERIALS)

# Share of the rare name among the captions of a class, in the last stage of pretraining.
RARE_NAME_SHARE = 0.05


def partner(material: int) -> int:
    """Index of the material that ``material`` is confused (blended) with."""
    return material ^ 1


def name_vocabulary() -> tuple[str, ...]:
    """All names, the common and the rare one of each material in turn: name j belongs to material j // 2."""
    return tuple(name for m in MATERIALS for name in (m.common_name, m.rare_name))
