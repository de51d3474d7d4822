"""ADE20K scene parsing (150 classes): ``ade150_train``, ``ade150_val``.

Names and synonyms are from the benchmark's class list (``objectInfo150.csv`` of its development kit), which has up to
eleven names per class. The first names the class; one or two of the others are kept, but none that would also fit
another class (screen, counter, ground). Colours are PASCAL's: the benchmark's usual ones give road and skyscraper the
same grey.
"""

from __future__ import annotations

from reclip_d2.data.class_file import IGNORE_LABEL
from reclip_d2.data.datasets.registration import DatasetOnDisk, Split, pascal_colors

CLASS_NAMES_AND_SYNONYMS = (
    "wall", "building, edifice", "sky", "floor, flooring", "tree", "ceiling", "road, route", "bed",
    "windowpane, window", "grass", "cabinet", "sidewalk, pavement", "person", "earth", "door, double door", "table",
    "mountain, mount", "plant, flora", "curtain, drape, drapery", "chair", "car, auto, automobile", "water",
    "painting, picture", "sofa, couch, lounge", "shelf", "house", "sea", "mirror", "rug, carpet", "field", "armchair",
    "seat", "fence, fencing", "desk", "rock, stone", "wardrobe, closet", "lamp", "bathtub, bathing tub", "railing",
    "cushion", "base, pedestal", "box", "column, pillar", "signboard, sign", "chest of drawers, bureau, dresser",
    "counter", "sand", "sink", "skyscraper", "fireplace, hearth", "refrigerator, icebox", "grandstand, covered stand",
    "path", "stairs, steps", "runway", "case, display case, showcase", "pool table, billiard table", "pillow",
    "screen door", "stairway, staircase", "river", "bridge, span", "bookcase", "blind", "coffee table, cocktail table",
    "toilet", "flower", "book", "hill", "bench", "countertop", "stove, kitchen stove", "palm, palm tree",
    "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel, hut, shack", "bus, autobus",
    "towel", "light, light source", "truck, motortruck", "tower", "chandelier, pendant", "awning, sunshade",
    "streetlight, street lamp", "booth, kiosk", "television, television receiver, tv", "airplane, aeroplane, plane",
    "dirt track", "apparel, clothes", "pole", "land, soil", "bannister, balustrade, handrail",
    "escalator, moving staircase", "ottoman, pouf", "bottle", "buffet, sideboard", "poster, placard", "stage", "van",
    "ship", "fountain", "conveyer belt, conveyor belt", "canopy", "washer, washing machine", "plaything, toy",
    "swimming pool", "stool", "barrel, cask", "basket, handbasket", "waterfall, falls", "tent", "bag",
    "minibike, motorbike", "cradle", "oven", "ball", "food", "step, stair", "tank, storage tank",
    "trade name, brand name", "microwave, microwave oven", "pot, flowerpot", "animal", "bicycle, bike", "lake",
    "dishwasher, dish washer", "screen, silver screen, projection screen", "blanket", "sculpture",
    "hood, exhaust hood", "sconce", "vase", "traffic light, traffic signal", "tray", "ashcan, trash can, garbage can",
    "fan", "pier, wharf, dock", "crt screen", "plate", "monitor, monitoring device", "bulletin board, notice board",
    "shower", "radiator", "glass, drinking glass", "clock", "flag",
)  # fmt: skip
_NAMES = [entry.split(", ") for entry in CLASS_NAMES_AND_SYNONYMS]

# Ids of annotations/ (0: other classes) to classes.
LABEL_MAPPING = {0: IGNORE_LABEL} | {index + 1: index for index in range(len(_NAMES))}


def _split(name: str, count: int, evaluated: bool = False) -> Split:
    return Split(images=f"images/{name}", labels=f"annotations_detectron2/{name}", count=count, evaluated=evaluated)


ADE150 = DatasetOnDisk(
    name="ade150",
    folders=("ADEChallengeData2016",),
    program="datasets/prepare_ade150.py",
    splits={"train": _split("training", 20210), "val": _split("validation", 2000, evaluated=True)},
    class_names=[names[0] for names in _NAMES],
    synonyms={names[0]: names[1:] for names in _NAMES},
    colors=pascal_colors(len(_NAMES)),
    protocol="ade150: 150 classes of ADE20K scene parsing, all others ignored; mIoU over the classes that occur",
)

ADE150.register()
