"""Estimate how long the stages of a run take, from a first batch of each."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from reclip_d2.data.dataset_mapper import UnlabelledDatasetMapper
from reclip_d2.data.image_folder import ImageFile
from reclip_d2.data.images import peek_size, read_image
from reclip_d2.data.survey import SurveyedImage
from reclip_d2.data.tiling import Tiling, window_starts
from reclip_d2.errors import ReclipError
from reclip_d2.features.views import WHOLE
from reclip_d2.hypothesis.generate import HypothesisGenerator
from reclip_d2.hypothesis.windows import crop_windows
from reclip_d2.inference import ImagePredictor
from reclip_d2.modeling.checkpoint import ReclipCheckpointer
from reclip_d2.modeling.meta_arch.base import LanguageSegmentor
from reclip_d2.modeling.meta_arch.segmentor import CLIPSegmentor
from reclip_d2.utils.progress import Progress, duration_in_words, report, say
from reclip_d2.workspace.run_folder import RunFolder
from reclip_d2.workspace.stores import say_size, training_stores

# Images to try until one can be read, if they have not been surveyed.
_TRIES = 10
# Maximum number of timed calls, and seconds after which no further one is made.
_CALLS, _PATIENCE = 6, 1.0


@dataclasses.dataclass(frozen=True)
class Work:
    """The work to do, and sample images to time it on.

    Attributes:
        sample: training file of an image of typical size.
        image: an image of typical size.
        hypotheses: number of files whose hypotheses are missing.
        iterations: training iterations.
        masks: number of images whose masks are missing.
        copies: how many of these the training reads as smaller copies: the features in its store are not theirs.
        tiles: number of tiles, in prediction, of very large images; ``image`` is one of these images if there are no
            others.
    """

    sample: str
    image: str
    hypotheses: int
    iterations: int
    masks: int
    tiles: int
    copies: int = 0


def estimate(cfg: CfgNode, work: Work) -> dict[str, float]:
    """Seconds of the stages with work left: ``features``, ``hypotheses``, ``rectification``, ``masks``.

    Args:
        cfg: config of the model that predicts the masks; ``custom`` must be registered, with the training images if
            there is training left.
    """
    model = build_model(cfg).eval()
    seconds, stored = {}, False
    if work.hypotheses or work.iterations:
        seconds, stored = _training_seconds(cfg, model, work)
    if work.masks or work.tiles:
        # CLIP's own masks before the training, and those of the trained model.
        times = 2 if work.iterations else 1
        seconds["masks"] = times * _mask_seconds(ImagePredictor.from_config(model, _without_files(cfg)), work, stored)
    return seconds


def _without_files(cfg: CfgNode) -> CfgNode:
    """The config without refinements by files: a bank, which a run makes after the estimate, and masks of regions."""
    cfg = cfg.clone()
    cfg.defrost()
    masks = cfg.TEST.REGION_VOTE.REGIONS == "masks"
    cfg.TEST.REFINE = [name for name in cfg.TEST.REFINE if name != "bank" and not (masks and name == "region_vote")]
    return cfg


def _mask_seconds(predictor: ImagePredictor, work: Work, stored: bool) -> float:
    """Seconds for the masks of one model.

    Args:
        stored: whether the features of whole images come from a store.
    """
    model, image = predictor.model, read_image(work.image)
    seconds, encoded = 0.0, work.copies if stored else work.masks
    if stored and work.masks > work.copies:
        resized = predictor.resize(image)
        view = (int(resized.shape[-2]), int(resized.shape[-1]))
        features = _random_features(model, view)
        decode = _time(lambda: list(predictor.stored_bands(features, view, image.shape[:2])), model.device)
        seconds += (work.masks - work.copies) * decode
    if encoded:
        seconds += encoded * _time(lambda: predictor.labels(image), model.device)
    if work.tiles:  # a tile takes as long as an image, plus half for the blending
        tile = image[: predictor.tiling.size, : predictor.tiling.size].copy()
        seconds += 1.5 * work.tiles * _time(lambda: predictor.labels(tile), model.device)
    return seconds


def _training_seconds(cfg: CfgNode, model: CLIPSegmentor, work: Work) -> tuple[dict[str, float], bool]:
    """Seconds of ``features``, ``hypotheses`` and ``rectification``; and whether masks can read stored features."""
    seconds: dict[str, float] = {}
    views = 0  # to encode for stores
    room = True
    for store in training_stores(cfg, model.backbone):
        if say_size(store, cfg.FEATURE_STORE.MAX_SIZE):
            views += sum(len(store.shards.ranges[shard]) for shard in store.shards.missing())
        else:
            room = False
    dense, fixed = cfg.HYPOTHESIS.METHOD == "dense", cfg.FEATURE_STORE.VIEWS > 0
    encode = 0.0
    if views or (not room and (dense or fixed)):
        mapped = UnlabelledDatasetMapper(cfg, is_train=False)({"file_name": work.sample, "image_id": "sample"})
        encode = _time(lambda: model.view_encoder(mapped["image"]), model.device)
    if views:
        seconds["features"] = views * encode
    if work.hypotheses and not dense:
        seconds["hypotheses"] = work.hypotheses * _hypothesis_seconds(cfg, model, work.sample)
    elif work.hypotheses and not room:
        seconds["hypotheses"] = 2 * work.hypotheses * encode
    if work.iterations:
        model.train()
        if fixed:
            iteration = _stored_iteration_seconds(cfg, model, work.sample)
            iteration += 0.0 if room else cfg.SOLVER.IMS_PER_BATCH * encode
        else:
            iteration = _iteration_seconds(cfg, model, work.sample)
        seconds["rectification"] = work.iterations * iteration
        model.eval()
    return seconds, room and fixed and cfg.FEATURE_STORE.KIND == WHOLE


def _time(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call on ``device``: the median of several after a warm-up call; of a single one if calls take longer
    than a second, of which the first takes hardly longer than others."""
    times: list[float] = []
    with torch.no_grad():
        while len(times) < _CALLS and sum(times) < _PATIENCE:
            start = time.perf_counter()
            step()
            _wait(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":  # this GPU only: asking another would allocate memory there
        torch.cuda.synchronize(device)


def _hypothesis_seconds(cfg: CfgNode, model: CLIPSegmentor, sample: str) -> float:
    """Seconds for one image: decoding, and one batch of windows times the number of batches."""
    reading = _time(lambda: read_image(sample), model.device)
    if cfg.HYPOTHESIS.METHOD == "one_pass":
        generator = HypothesisGenerator(
            model.backbone, model.query_features, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.HYPOTHESIS.BATCH_SIZE
        )
        image = torch.from_numpy(read_image(sample)).permute(2, 0, 1)
        sides = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        split = cfg.HYPOTHESIS.SPLIT_BLOCK
        return reading + _time(
            lambda: generator.one_pass_scores([image], cfg.HYPOTHESIS.WINDOW_RATIO, sides, split), model.device
        )
    windows = 1 if cfg.HYPOTHESIS.METHOD == "image" else len(crop_windows(96, 96, cfg.HYPOTHESIS.WINDOW_RATIO))
    size = min(windows, cfg.HYPOTHESIS.BATCH_SIZE or windows, 16 if model.device.type == "cpu" else 256)
    crops = torch.zeros(size, 3, *model.backbone.image_size, device=model.device)
    encoding = _time(lambda: model.backbone.global_features(crops) @ model.query_features.T, model.device)
    return encoding / size * windows + reading


def _iteration_seconds(cfg: CfgNode, model: LanguageSegmentor, sample: str) -> float:
    """Seconds for one iteration on fresh crops, extrapolated from a batch of two images."""
    mapped = UnlabelledDatasetMapper(cfg, is_train=True)({"file_name": sample, "image_id": "sample"})
    mapped["hypothesis"] = _hypothesis(model)
    one, two = (_time(lambda n=n: _iterate(model, [mapped] * n), model.device) for n in (1, 2))
    each = max(two - one, 0.1 * two)
    return max(one - each, 0.0) + each * cfg.SOLVER.IMS_PER_BATCH


def _stored_iteration_seconds(cfg: CfgNode, model: CLIPSegmentor, sample: str) -> float:
    """Seconds for one iteration on views from a store: a whole batch, of random features."""
    crops = cfg.FEATURE_STORE.KIND != WHOLE
    image = UnlabelledDatasetMapper(cfg, is_train=crops)({"file_name": sample, "image_id": "sample"})["image"]
    size = (int(image.shape[-2]), int(image.shape[-1]))
    features = _random_features(model, size)
    record = {"image": image, "features": features, "view_size": size, "hypothesis": _hypothesis(model)}
    return _time(lambda: _iterate(model, [record] * cfg.SOLVER.IMS_PER_BATCH), model.device)


def _random_features(model: CLIPSegmentor, size: tuple[int, int]) -> torch.Tensor:
    """Features ``(h, w, D)`` as in a store, of a view of size (H, W)."""
    stride, divisibility = model.backbone.stride, model.size_divisibility
    grid = [-(-side // divisibility) * divisibility // stride for side in size]
    return torch.nn.functional.normalize(torch.randn(*grid, model.backbone.embed_dim), dim=-1).half()


def _hypothesis(model: LanguageSegmentor) -> torch.Tensor:
    return torch.arange(min(3, model.num_classes))


def _iterate(model: LanguageSegmentor, batch: Sequence[dict]) -> None:
    """Forward and backward pass of a batch."""
    with torch.enable_grad(), EventStorage(1):  # iteration 1 writes no images for TensorBoard
        sum(model(list(batch)).values()).backward()
    model.zero_grad()


def report_estimate(
    cfg: CfgNode,
    folder: RunFolder,
    missing: Sequence[ImageFile],
    surveyed: Sequence[SurveyedImage],
    student: bool,
) -> None:
    """Time a first batch of each remaining step, and report the estimate.

    Args:
        cfg: config of the first kind of model.
        missing: images without a mask.
        surveyed: the surveyed images; empty for a run without training.
        student: whether a distillation follows, whose time is not known yet.
    """
    work = _work(cfg, folder, missing, surveyed)
    if work is None:
        return
    say("estimate", "encoding the class names, and timing a first batch of each step")
    seconds = estimate(cfg, work)
    total = sum(seconds.values())
    report(Progress("estimate", message=_in_words(cfg, work, seconds, student), seconds_left=total))


def _in_words(cfg: CfgNode, work: Work, seconds: Mapping[str, float], student: bool) -> str:
    """The estimate as text; a range if the training may end much earlier, by ``SOLVER.PLATEAU``."""
    total, spared = sum(seconds.values()), 0.0
    if work.iterations:
        spared = seconds["rectification"] * (1 - _fewest_iterations(cfg, work.iterations) / work.iterations)
    is_range = total > 1.3 * (total - spared)
    words = {name: duration_in_words(value) for name, value in seconds.items()}
    if is_range:
        words["rectification"] = f"up to {words['rectification']}"
    span = f"{duration_in_words(total - spared)} to {duration_in_words(total)}"
    parts = ", ".join(f"{name} {text}" for name, text in words.items())
    more = ", and the distillation" if student else ""
    return f"about {span if is_range else duration_in_words(total)} in total ({parts}){more}"


def _fewest_iterations(cfg: CfgNode, iterations: int) -> int:
    """Iterations of a training that reaches its plateau as early as the rule allows."""
    keys = cfg.SOLVER.PLATEAU
    if not keys.ENABLED:
        return iterations
    return min(iterations, (2 * keys.WINDOW + keys.PATIENCE - 1) * keys.PERIOD + keys.COOL_DOWN)


def _work(
    cfg: CfgNode, folder: RunFolder, missing: Sequence[ImageFile], surveyed: Sequence[SurveyedImage]
) -> Work | None:
    """The work to do; None if there is none, or no sample image can be read."""
    tiling = Tiling.from_config(cfg)

    def is_tiled(image: ImageFile, size: tuple[int, int]) -> bool:
        return image.is_scene or tiling.applies_to(size)

    surveyed = [image for image in surveyed if image.training_files]  # a GeoTIFF without data has none
    sizes = {image.file.image_id: image.size for image in surveyed}
    sizes |= {i.image_id: i.scene_size or peek_size(i.path) for i in missing if i.image_id not in sizes}
    large = [image for image in missing if is_tiled(image, sizes[image.image_id])]
    tiles = sum(_count_tiles(sizes[image.image_id], tiling) for image in large)
    if not surveyed:
        pictures = [image for image in missing if not image.is_scene]
        some = [image for image in pictures if not tiling.applies_to(sizes[image.image_id])][:_TRIES] or pictures[:1]
        path = next((str(image.path) for image in some if _is_readable(image)), None)
        return path and Work(path, path, 0, 0, len(missing) - len(large), tiles)
    wanted = {image.image_id for image in missing}
    ordered = sorted(surveyed, key=lambda image: image.size[0] * image.size[1])
    middle = ordered[len(ordered) // 2]
    sample = middle.training_files[0]
    work = Work(
        sample=str(sample),
        image=str(sample if is_tiled(middle.file, middle.size) else middle.file.path),
        hypotheses=0 if folder.hypotheses.exists() else sum(len(image.training_files) for image in surveyed),
        iterations=_iterations_left(cfg, folder),
        masks=len(missing) - len(large),
        tiles=tiles,
        copies=sum(
            image.training_files != (image.file.path,) and not is_tiled(image.file, image.size)
            for image in surveyed
            if image.file.image_id in wanted
        ),
    )
    return work if work.hypotheses or work.iterations or work.masks or work.tiles else None


def _iterations_left(cfg: CfgNode, folder: RunFolder) -> int:
    """Iterations of the rectification after the last checkpoint."""
    model = folder.model("rectified")
    if folder.weights("rectified").exists():
        return 0
    last = ReclipCheckpointer(None, str(model)).get_checkpoint_file()
    number = re.fullmatch(r"model_(\d+)\.pth", Path(last).name)
    return max(0, cfg.SOLVER.MAX_ITER - (int(number[1]) + 1 if number else 0))


def _is_readable(image: ImageFile) -> bool:
    try:
        read_image(image.path)
    except ReclipError:
        return False
    return True


def _count_tiles(size: tuple[int, int], tiling: Tiling) -> int:
    rows, columns = (len(window_starts(side, min(side, tiling.size), tiling.stride)) for side in size)
    return rows * columns
