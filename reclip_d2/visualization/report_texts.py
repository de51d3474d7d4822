"""The sentences of a bias report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reclip_d2.evaluation.preferences import ClassInWords, Preference
from reclip_d2.visualization.html import number

WITHOUT_LABELS = (
    "These images have no labels. Left out, for want of them: mIoU, the class-preference and space-preference"
    " scores, the distance curve and the confusion matrices (Fig. 1), IoU by class, and the ground truth in the"
    " pictures of scenes."
)
SCORES = (
    "Higher is less biased in all columns. Class preference: the part of a class's pixels that are right, minus the"
    " part that the most frequent wrong class takes, averaged over the classes. Space preference: the mean slope of"
    " the curve below, in IoU (0 to 1) per half image diagonal, ± standard error; against the first model: the"
    " difference on the same objects. The fitted line is the slope of a straight line through all {objects} objects,"
    " which depends less on the few objects of the outer bins. Compare models; a score below 0 alone proves no bias,"
    " since objects far from the centre are often small or cut off. The slope sees a preference for the centre or"
    " the border only: classes that each have a place of their own may leave it at 0; their maps stand below."
)
PREFERENCES = (
    "MaskCLIP's mean soft-max over the images shows what CLIP prefers, mixed with what the images show: a class that"
    " is frequent, or at home in one place, looks preferred. The bias logits of a rectified model show what the"
    " model takes for bias; before a mask decoder, which can take off a constant preference by itself, they need not"
    " be all of it. Both are drawn as logits inside CLIP's soft-max, 0 for no preference."
)
LOGITS = (
    "After Fig. 4 of ReCLIP++: what a model takes off CLIP's Query logits. The classes of a scene are those whose"
    " pixels change most between MaskCLIP's prediction and the ground truth (without one, the model's prediction)."
    " Logits are drawn minus their mean over the classes at the same place, which no argmax sees; red is where a"
    " class is favoured."
)
OBJECTS = (
    "Objects are the connected regions of a class (8 neighbours), or the instances where the data set has them, of"
    " at least {area} pixels. The IoU of an object counts all pixels wrongly predicted as its class against it, and"
    " none that lie on other objects of the class."
)
BINS = (
    "Bins are {width:g} pixels wide; bins of fewer than {objects} objects are in the curve and not in the score. The"
    " paper gives no unit for its slope; IoU per half image diagonal is our reading of its Table VII."
)


def preference_sentences(preference: Preference, lines: Sequence[ClassInWords], left_out: int = 0) -> list[str]:
    """A preference in words, a sentence a class.

    Args:
        lines: from the most preferred class to the least.
        left_out: classes between the preferred and the avoided half of ``lines``.
    """
    by_share = preference.source == "mean soft-max"

    def amount(value: float) -> str:
        return f"{math.exp(value):.1f} times" if by_share else number(value, 2, sign=True)

    sentences = []
    for index, line in enumerate(lines):
        if left_out and index == len(lines) // 2:
            sentences.append(f"({left_out} classes between them)")
        whole = f"{amount(line.strength)} the uniform share" if by_share else f"{amount(line.strength)} as a whole"
        sentences.append(
            f"{line.name}: {whole}; most at the {line.best_place} ({amount(line.best)}),"
            f" least at the {line.worst_place} ({amount(line.worst)})"
        )
    return sentences
