"""``reclip app``: a browser page to try class names on images and to learn the bias."""

from __future__ import annotations

import argparse
import signal
import threading
from types import FrameType

from reclip_d2.app.guard import Limits
from reclip_d2.app.server import check_address, check_gradio, is_local, serve, working_folder
from reclip_d2.app.session import Session
from reclip_d2.data.image_file import MAX_PIXELS
from reclip_d2.errors import ReclipError
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.workspace.options import DEFAULT_CLIP, DEFAULT_PRETRAINED
from reclip_d2.workspace.stage_config import ClipChoice
from reclip_d2.workspace.trained_model import TrainedModel


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    check_gradio()
    check_address(args.host, args.port)
    limits = choose_limits(args)
    clip, trained = choose_models(args)
    output = None if args.output is None else check_output_folder(args.output).absolute()
    _stop_on_signals()
    try:
        with working_folder(output) as folder:
            session = Session(clip, trained, folder, limits)
            print(f"model     {session.description}", flush=True)
            with serve(session, args.host, args.port, args.allow_host) as address:
                print(f"page      {address} (press Ctrl-C to stop)", flush=True)
                if not is_local(args.host):
                    print(f"          anyone who can reach {args.host} can use it", flush=True)
                threading.Event().wait()
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
    return 0


def choose_limits(args: argparse.Namespace) -> Limits:
    """Limits from the arguments, or raise :class:`ReclipError`."""
    most = MAX_PIXELS // 1_000_000
    if not 1 <= args.max_megapixels <= most:
        raise ReclipError(f"--max-megapixels {args.max_megapixels}: give a number from 1 to {most:,}")
    if not 1 <= args.max_megabytes <= 2**20:
        raise ReclipError(f"--max-megabytes {args.max_megabytes}: give a number from 1 to {2**20:,}")
    file_bytes = args.max_megabytes * 2**20
    return Limits(args.max_megapixels * 1_000_000, file_bytes, max(Limits.upload_bytes, 4 * file_bytes))


def choose_models(args: argparse.Namespace) -> tuple[ClipChoice, TrainedModel | None]:
    """CLIP and trained model from the arguments.

    Raises:
        ReclipError: ``--model`` is not a trained model, or CLIP's weights cannot be found.
    """
    trained = None
    name = DEFAULT_CLIP if args.clip is None else args.clip
    pretrained = DEFAULT_PRETRAINED if args.pretrained is None else args.pretrained
    if args.model is not None:
        if args.clip is not None:
            raise ReclipError(f"--clip {args.clip} with --model: a model has its own CLIP; omit --clip")
        trained = TrainedModel.find(args.model, None, args.pretrained)
        name, pretrained = trained.state.clip, trained.pretrained
    return ClipChoice.find(name, pretrained, args.device, args.opts), trained


def _stop_on_signals() -> None:
    """Make SIGTERM stop the command as Ctrl-C does, even where a background shell ignores it. A second signal kills."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
