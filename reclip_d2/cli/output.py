"""Output of the commands: images, progress, results."""

from __future__ import annotations

from reclip_d2.data.image_folder import FoundImages
from reclip_d2.errors import ReclipError
from reclip_d2.utils.progress import Progress, ProgressBars
from reclip_d2.workspace.options import TITLES
from reclip_d2.workspace.run_result import RunResult

# Headings of the class shares of other masks than those that were kept.
COLUMNS = {"maskclip": "by MaskCLIP", "rectified": "rectified", "student": "by student"}
# Trainings longer than this, in seconds, get a hint at faster ones.
_LONG = 4 * 3600


class TerminalProgress(ProgressBars):
    """Progress bars on standard error; stages and messages on standard output."""

    def __call__(self, event: Progress) -> None:
        super().__call__(event)
        if event.total:
            return
        print(event, flush=True)
        if event.stage == "estimate" and (event.seconds_left or 0) > _LONG and "rectification" in event.message:
            print("  --fast writes masks without training; lower --iterations to train for less time", flush=True)


def print_field(name: str, text: object) -> None:
    """Print a line of a command's summary; without a name, it continues the one before."""
    print(f"{name:<9} {text}", flush=True)


def print_images(found: FoundImages) -> None:
    """Print the number of images, and which files are left out."""
    print_field("images", f"{len(found.images):,}")
    if found.left_out:
        print_field("", found.left_out)


def print_result(result: RunResult) -> None:
    """Print the classes' shares, the images without masks, and where the results are."""
    print(f"\n{result.masks:,} masks by {TITLES[result.kind]} ({result.made:,} new)")
    if result.decision is not None:
        print(f"  {result.decision.reason}")
        if result.decision.warning:
            print(f"  warning: {result.decision.warning}")
    width = max(len("class"), *(len(share.name) for share in result.classes))
    others = {
        kind: result.shares(kind) for kind in (result.decision.pixels if result.decision else ()) if kind != result.kind
    }
    headings = "".join(f"  {COLUMNS[kind]:>12}" for kind in others)
    print(f"  {'class':<{width}}   of all pixels{headings}   in images")
    for share in result.classes:
        percent = 100 * share.pixels / max(result.pixels, 1)
        more = "".join(f"  {100 * shares[share.id]:10.1f} %" for shares in others.values())
        print(f"  {share.name:<{width}}  {percent:12.1f} %{more}  {share.images:10,}")
    unseen = [share.name for share in result.classes if not share.pixels]
    if unseen:
        print(f"  never predicted: {', '.join(unseen)}")
    for key, problem in result.problems.items():
        print(f"  no mask of {key}: {problem}")
    print_field("masks", f"{result.folder.masks} (index masks; classes.json lists their ids)")
    for name in result.formats:
        print_field(name, result.folder.path / name)
    if result.lacking:
        print_field("summary", f"when the {result.lacking:,} images of other shards are done")
        return
    print_field("summary", f"{result.folder.page} (summary.json has the numbers)")


def check_problems(result: RunResult, skip_broken: bool) -> None:
    """Raise :class:`ReclipError` if images have no mask, unless ``skip_broken``."""
    if result.problems and not skip_broken:
        raise ReclipError(
            f"{len(result.problems)} of {result.images} images have no mask (listed above): replace or remove them, or"
            " give --skip-broken"
        )
