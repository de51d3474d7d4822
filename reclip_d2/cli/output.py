"""What the commands say: the images, the progress, and what came out."""

from __future__ import annotations

from reclip_d2.data.image_folder import FoundImages
from reclip_d2.errors import ReclipError
from reclip_d2.utils.progress import Progress, ProgressBars
from reclip_d2.workspace.options import TITLES
from reclip_d2.workspace.results import RunResult

# Seconds from which on a shorter way is pointed out.
_LONG = 4 * 3600


class TerminalProgress(ProgressBars):
    """Progress bars on standard error, and a line on standard output for each stage and each message."""

    def __call__(self, event: Progress) -> None:
        super().__call__(event)
        if event.total:
            return
        print(event, flush=True)
        if event.stage == "estimate" and (event.seconds_left or 0) > _LONG and "rectification" in event.message:
            print("  --fast gives masks without a training; a lower --iterations shortens it", flush=True)


def print_images(found: FoundImages) -> None:
    """Print how many images there are, and which files are left out."""
    print(f"images    {len(found.images):,}")
    if found.left_out:
        print(f"          {found.left_out}")


def print_result(result: RunResult) -> None:
    """Print the classes' shares, the images without a mask, and where everything is."""
    print(f"\n{result.masks:,} masks by {TITLES[result.kind]}, {result.made:,} of them made now")
    width = max(len(share.name) for share in result.classes)
    print(f"  {'class':<{width}}   of all pixels   in images")
    for share in result.classes:
        percent = 100 * share.pixels / max(result.pixels, 1)
        print(f"  {share.name:<{width}}  {percent:12.1f} %  {share.images:10,}")
    unseen = [share.name for share in result.classes if not share.pixels]
    if unseen:
        print(f"  never predicted: {', '.join(unseen)}")
    for key, problem in result.problems.items():
        print(f"  no mask of {key}: {problem}")
    print(f"masks     {result.folder.masks} (index PNGs; classes.json there says what the ids mean)")
    for name in result.formats:
        print(f"{name:<9} {result.folder.path / name}")
    print(f"summary   {result.folder.summary}")


def check_problems(result: RunResult, skip_broken: bool) -> None:
    """Raise :class:`ReclipError` if images have no mask, unless that is no error."""
    if result.problems and not skip_broken:
        raise ReclipError(
            f"{len(result.problems)} of {result.images} images have no mask (listed above): replace or remove them, or"
            " give --skip-broken"
        )
