"""``reclip app``: a page in the browser to try class names on images, and to learn the bias."""

from __future__ import annotations

import argparse
import signal
import threading
from types import FrameType

from reclip_d2.app.limits import Limits
from reclip_d2.app.models import ClipChoice
from reclip_d2.app.server import check_address, check_gradio, is_local, serve, working_folder
from reclip_d2.app.session import Session
from reclip_d2.data.image_file import MAX_PIXELS
from reclip_d2.errors import ReclipError
from reclip_d2.utils.output_paths import check_output_folder
from reclip_d2.workspace.clip_weights import find_weights
from reclip_d2.workspace.options import DEFAULT_CLIP, DEFAULT_PRETRAINED
from reclip_d2.workspace.stage_config import resolve_device, resolve_pretrained
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
                print(f"page      {address} (Ctrl-C ends it)", flush=True)
                if not is_local(args.host):
                    print(f"          anyone who can reach {args.host} can use it", flush=True)
                threading.Event().wait()
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
    return 0


def choose_limits(args: argparse.Namespace) -> Limits:
    """The limits that the arguments name, or raise :class:`ReclipError`."""
    most = MAX_PIXELS // 1_000_000
    if not 1 <= args.max_megapixels <= most:
        raise ReclipError(f"--max-megapixels {args.max_megapixels}: give a number from 1 to {most:,}")
    if not 1 <= args.max_megabytes <= 2**20:
        raise ReclipError(f"--max-megabytes {args.max_megabytes}: give a number from 1 to {2**20:,}")
    file_bytes = args.max_megabytes * 2**20
    return Limits(args.max_megapixels * 1_000_000, file_bytes, max(Limits.upload_bytes, 4 * file_bytes))


def choose_models(args: argparse.Namespace) -> tuple[ClipChoice, TrainedModel | None]:
    """The CLIP and the trained model that the arguments name.

    Raises:
        ReclipError: ``--model`` is none, or CLIP's weights are not to be had.
    """
    device, opts = resolve_device(args.device), tuple(args.opts)
    if args.model is not None:
        if args.clip is not None:
            raise ReclipError(f"--clip {args.clip} beside --model: the model brings its own CLIP; leave --clip out")
        trained = TrainedModel.find(args.model, None, args.pretrained)
        name, pretrained = trained.state.clip, trained.pretrained
    else:
        trained = None
        name = DEFAULT_CLIP if args.clip is None else args.clip
        pretrained = resolve_pretrained(DEFAULT_PRETRAINED if args.pretrained is None else args.pretrained)
    find_weights(name, pretrained)
    return ClipChoice(name, pretrained, device, opts), trained


def _stop_on_signals() -> None:
    """SIGTERM ends the command as Ctrl-C does, also where a background shell has turned that off; the second time at
    once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
