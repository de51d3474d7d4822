"""Every key of the project with its default, the rule that its values obey, its meaning and the paper's symbol.

Some are Detectron2's with another default; :mod:`reclip_d2.config.detectron2_keys` has the rules of those that keep
theirs, and :mod:`reclip_d2.config.checks` the rules of several keys.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from detectron2.config import CfgNode

from reclip_d2.config.detectron2_keys import DETECTRON2_RULES, RATE, SIDE
from reclip_d2.config.rules import Choice, Flag, Items, Maybe, Number, Rule, Text, Whole

# Names of Detectron2's get_norm.
NORM = Choice(("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN"))
PIXEL_MEAN = Items(Number(minimum=0, maximum=255), 3, 3)
PIXEL_STD = Items(Number(above=0, maximum=255), 3, 3)
WEIGHT_DECAY = Number(minimum=0, maximum=1e6)
TEMPERATURE = Number(minimum=0, maximum=1e6)
LOSS_WEIGHT = Number(minimum=0, maximum=1e6)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key's default, and the rule that its values obey."""

    default: Any
    rule: Rule


KEYS: dict[str, Key] = {
    # ---- frozen CLIP -------------------------------------------------------------------------------------
    # open_clip model name, or the JSON file of an architecture (open_clip's model config, or the open_clip_config.json
    # of a Hugging Face repository); "reclip-embedded" is the tiny CLIP that ships with the package.
    "MODEL.CLIP.NAME": Key("ViT-B-16-quickgelu", Text()),
    # open_clip tag, a local file (OpenAI's TorchScript archive, open_clip's or Hugging Face's weights), or "random".
    # Of reclip-embedded: "embedded" (also by "openai") and "embedded_longtail", the weights that ship, or a file of
    # tools/pretrain_embedded_clip.py.
    "MODEL.CLIP.PRETRAINED": Key("openai", Text(path=True)),
    # Normalisation of images: "weights" takes what an open_clip tag, or an open_clip_config.json or
    # preprocessor_config.json beside a local file, says, in place of the defaults of MODEL.PIXEL_MEAN and PIXEL_STD;
    # "keys" takes those keys whatever the weights say.
    "MODEL.CLIP.NORMALIZATION": Key("weights", Choice(("weights", "keys"))),
    # What takes the last block's place for dense features: the name of an attention in
    # reclip_d2/backbones/dense_attention. "value": MaskCLIP's value path, the papers' choice.
    "MODEL.CLIP.DENSE_ATTENTION": Key("value", Text()),
    # Keep residual connections and MLP around the last block's value path (public MaskCLIP and ReCLIP code).
    "MODEL.CLIP.VALUE_PATH_RESIDUAL": Key(True, Flag()),
    # Prompt templates of the Query text features W_q: imagenet_scene (85), imagenet (80), photo (1).
    "MODEL.CLIP.TEMPLATES": Key("imagenet_scene", Choice(("imagenet_scene", "imagenet", "photo"))),
    # Precision of the frozen image tower: float32, bfloat16 or float16. The trained parts stay in float32.
    "MODEL.CLIP.AUTOCAST": Key("float32", Choice(("float32", "bfloat16", "float16"))),
    # Table IV: the Query's prompt trains too; it starts from "a photo of a" and takes the templates' place.
    "MODEL.CLIP.LEARNABLE_QUERY": Key(False, Flag()),
    # Table VI: the image tower trains too, and its weights are in the checkpoint. Text tower and hypotheses stay the
    # pretrained CLIP's.
    "MODEL.CLIP.FINE_TUNE": Key(False, Flag()),
    # The next three reproduce the public code of ReCLIP++ and are set by tools/convert_public_checkpoint.py.
    # Epsilon of the LayerNorms in the image tower's blocks; 0: the model's own.
    "MODEL.CLIP.LAYER_NORM_EPS": Key(0.0, Number(minimum=0, below=1)),
    # Activation in the image tower's blocks: "own" (the model's), or "gelu".
    "MODEL.CLIP.IMAGE_ACTIVATION": Key("own", Choice(("own", "gelu"))),
    # safetensors file with a tensor "class_embedding" that takes the place of CLIP's class token; "": CLIP's own.
    "MODEL.CLIP.CLASS_TOKEN": Key("", Text(empty=True, path=True)),
    # ---- MaskCLIP: CLIP's own segmentation, with its test-time options and the controls --------------------
    # Prompt denoising of MaskCLIP: drop classes whose best patch probability is below this (0: off).
    "MODEL.MASKCLIP.PROMPT_DENOISING": Key(0.0, Number(minimum=0, maximum=1)),
    # Key smoothing of MaskCLIP: smooth patches whose best probability is below this (0: off).
    "MODEL.MASKCLIP.KEY_SMOOTHING": Key(0.0, Number(minimum=0, maximum=1)),
    # Control: side of a mean filter on the logits, in patches (0: off).
    "MODEL.MASKCLIP.MEAN_FILTER": Key(0, Whole(1, 99, odd=True, also=0)),
    # Control (ours): mean-probability calibration on unlabelled images: none, class or position_class.
    "MODEL.MASKCLIP.CALIBRATION": Key("none", Choice(("none", "class", "position_class"))),
    # ---- bias extraction (section III-B) -------------------------------------------------------------------
    # Name in BIAS_HEAD_REGISTRY: ReCLIPPPBiasHead, or ReCLIPBiasHead (the conference model's).
    "MODEL.BIAS_HEAD.NAME": Key("ReCLIPPPBiasHead", Text()),
    # L, learnable vectors of the Reference prompt, Eq. (1); shortened where the longest class name needs room.
    "MODEL.BIAS_HEAD.PROMPT_LENGTH": Key(73, Whole(1, 1000)),
    # Standard deviation of the vectors' initial values.
    "MODEL.BIAS_HEAD.PROMPT_INIT_STD": Key(0.02, Number(minimum=0, maximum=1000)),
    # Projection of PE: "default" (PyTorch's; ReCLIP's: the public code's), or "zero" (ours): start without a bias.
    "MODEL.BIAS_HEAD.PROJECTION_INIT": Key("default", Choice(("default", "zero"))),
    # Norm of the Reference features W_r: "row" (each class) or "matrix" (all together, as the public code).
    "MODEL.BIAS_HEAD.REFERENCE_NORM": Key("row", Choice(("row", "matrix"))),
    # Tokens of a class name in the Reference prompt: 0 takes all and an end token; k takes k tokens, end included, and
    # reads where the token id is largest (the public code, with 3: the end of a long name is cut off).
    "MODEL.BIAS_HEAD.NAME_TOKENS": Key(0, Whole(0, 1000)),
    # Class names of the Reference prompt, one a class; []: the data set's (the public code has a list of its own).
    "MODEL.BIAS_HEAD.REFERENCE_NAMES": Key([], Items(Text())),
    # Eq. (3): M = M_q - M_b ("subtract"); "add" and "none" are Table V.
    "MODEL.BIAS_HEAD.RECTIFICATION": Key("subtract", Choice(("subtract", "add", "none"))),
    # The next two are of ReCLIPBiasHead, whose space bias is a stack of 3x3 convolutions of PE.
    # Widths of its hidden layers.
    "MODEL.BIAS_HEAD.SPACE_CHANNELS": Key([512, 256], Items(Whole(1, 65_536), maximum=16)),
    # Its norm, a name of Detectron2's get_norm: BN, SyncBN, FrozenBN, GN, or "" for none.
    "MODEL.BIAS_HEAD.NORM": Key("BN", NORM),
    # ---- rectified mask generation (section III-C) -----------------------------------------------------------
    # Without the decoder M_o = M (Table III).
    "MODEL.MASK_DECODER.ENABLED": Key(True, Flag()),
    # Of its one convolution; odd.
    "MODEL.MASK_DECODER.KERNEL_SIZE": Key(5, Whole(1, 99, odd=True)),
    # A name of Detectron2's get_norm: BN, SyncBN, FrozenBN, GN, or "" for none.
    "MODEL.MASK_DECODER.NORM": Key("BN", NORM),
    # "replicate", or "zeros" (lowers the logits at the image border).
    "MODEL.MASK_DECODER.PADDING_MODE": Key("replicate", Choice(("replicate", "zeros"))),
    # "default" (PyTorch's), or "identity" (ours): pass M through before training.
    "MODEL.MASK_DECODER.INIT": Key("default", Choice(("default", "identity"))),
    # tau_1 of Eq. (5); 0: the inverse of CLIP's own logit scale, 0.01 for OpenAI's models (the paper's value).
    "MODEL.GUMBEL.TAU": Key(0.0, TEMPERATURE),
    # One-hot masks with the straight-through gradient, or soft masks.
    "MODEL.GUMBEL.HARD": Key(True, Flag()),
    # ---- losses (section III-D) ---------------------------------------------------------------------------
    # tau of Eq. (7); 0: the inverse of CLIP's own logit scale.
    "MODEL.LOSS.TAU": Key(0.0, TEMPERATURE),
    # Weight of Eq. (7).
    "MODEL.LOSS.CONTRASTIVE_WEIGHT": Key(1.0, LOSS_WEIGHT),
    # Ours: weight of the coverage loss, -mean_n log sum_{c in H} p_nc.
    "MODEL.LOSS.COVERAGE_WEIGHT": Key(0.0, LOSS_WEIGHT),
    # Ours: weight of the mask mass outside the hypothesis, mean_n sum_{c not in H} p_nc.
    "MODEL.LOSS.OUTSIDE_WEIGHT": Key(0.0, LOSS_WEIGHT),
    # ---- distillation (section III-E) ---------------------------------------------------------------------
    # META_ARCHITECTURE "Distillation" trains a student on the teacher's outputs; its checkpoint is the student's.
    # "RectifiedCLIP", with all keys above as in the run that trained it, or "MaskCLIP" (MaskCLIP+).
    "MODEL.TEACHER.META_ARCHITECTURE": Key("RectifiedCLIP", Text()),
    # Checkpoint of the rectification stage; MaskCLIP has none.
    "MODEL.TEACHER.WEIGHTS": Key("", Text(empty=True, path=True)),
    # Name in Detectron2's BACKBONE_REGISTRY.
    "MODEL.STUDENT.BACKBONE": Key("build_dilated_resnet_backbone", Text()),
    # Detectron2's keys of a ResNet, with defaults for torchvision's weights, all of it training. DEPTH 18 and 34 need
    # RES2_OUT_CHANNELS 64 (or less, for a small model with random weights). BN takes its statistics on each GPU, SyncBN
    # on all of them; FrozenBN keeps those of the weights.
    "MODEL.RESNETS.DEPTH": Key(101, Choice((18, 34, 50, 101, 152))),
    "MODEL.RESNETS.NORM": Key("BN", NORM),
    "MODEL.RESNETS.STRIDE_IN_1X1": Key(False, Flag()),
    "MODEL.BACKBONE.FREEZE_AT": Key(0, Whole(0, 5)),
    # 8: res4 and res5 are dilated.
    "MODEL.STUDENT.OUTPUT_STRIDE": Key(8, Choice((8, 16, 32))),
    # Initial weights of the backbone: a name of Detectron2's model zoo (detectron2://ImageNetPretrained/...), one of
    # torchvision (torchvision://resnet50), a local file of either, or "" for random ones.
    "MODEL.STUDENT.WEIGHTS": Key("", Text(empty=True, path=True)),
    # What the backbone's weights were trained on, in the order of FORMAT, in [0, 255]: torchvision's; for Detectron2's
    # MSRA weights BGR, [103.53, 116.28, 123.675] and [1, 1, 1] (and MODEL.RESNETS.STRIDE_IN_1X1 True).
    "MODEL.STUDENT.FORMAT": Key("RGB", Choice(("RGB", "BGR"))),
    "MODEL.STUDENT.PIXEL_MEAN": Key([123.675, 116.28, 103.53], PIXEL_MEAN),
    "MODEL.STUDENT.PIXEL_STD": Key([58.395, 57.12, 57.375], PIXEL_STD),
    # Atrous branches of DeepLab V2.
    "MODEL.STUDENT.DILATIONS": Key([6, 12, 18, 24], Items(Whole(1, 1000), 1, 16)),
    # Table IX: "original" (a learnt classifier), "query" (W_q), "query_bias" (and M_b), "query_bias_decoder" (and
    # F_dec); of these what the teacher has.
    "MODEL.STUDENT.HEAD": Key("query_bias_decoder", Choice(("original", "query", "query_bias", "query_bias_decoder"))),
    # Table VIII: weights of the losses of Eq. (10); the second and third are alpha and beta.
    "MODEL.DISTILLATION.MASK_WEIGHT": Key(1.0, LOSS_WEIGHT),
    "MODEL.DISTILLATION.FEATURE_WEIGHT": Key(0.5, LOSS_WEIGHT),
    "MODEL.DISTILLATION.TEXT_WEIGHT": Key(0.5, LOSS_WEIGHT),
    # Where Eq. (9) compares the features: at the image's size (the paper), or on the student's grid (less memory).
    "MODEL.DISTILLATION.FEATURE_SIZE": Key("image", Choice(("image", "grid"))),
    # Compiled kernels where the extension is built; False: their plain PyTorch twins.
    "MODEL.USE_KERNELS": Key(True, Flag()),
    # ---- image-level multi-label hypotheses (Eq. 6) -----------------------------------------------------------
    # "crops" (Eq. 6), "one_pass" (ours: the same windows as class tokens of one forward pass, at the size of the test),
    # "image" (ReCLIP: whole-image scores above the threshold), or "imported" (the sets that stand in HYPOTHESIS.FILE,
    # written by tools/import_public_hypotheses.py; THRESHOLD and CALIBRATED do not apply).
    "HYPOTHESIS.METHOD": Key("crops", Choice(("crops", "one_pass", "image", "imported"))),
    # t of Eq. (6): 0.07 for VOC and Cityscapes, 0 else; for "image" a cosine similarity (0.23 for VOC).
    "HYPOTHESIS.THRESHOLD": Key(0.0, Number(minimum=-1, maximum=1)),
    # Not in the papers: where t is a raw cosine that nobody can guess, the mean number of classes an image that the
    # hypotheses shall have, such as 2.5. t is then found on the unlabelled training images, and THRESHOLD does not
    # apply; 0: off.
    "HYPOTHESIS.CLASSES_PER_IMAGE": Key(0.0, Number(minimum=1, maximum=1000, also=0)),
    # r of Eq. (6): window size as a part of the image's.
    "HYPOTHESIS.WINDOW_RATIO": Key(1 / 6, Number(minimum=0.02, maximum=1)),
    # Block of the image tower, from 0, from which on the windows of "one_pass" see their own patches alone.
    "HYPOTHESIS.SPLIT_BLOCK": Key(0, Whole(0, 1000)),
    # Ours: an offset per class on the window scores that makes their mean soft-max uniform.
    "HYPOTHESIS.CALIBRATED": Key(False, Flag()),
    # The hypothesis of a training crop from the windows whose centres lie in it, instead of the image's ("crops" and
    # "one_pass").
    "HYPOTHESIS.CROP_AWARE": Key(False, Flag()),
    # Where the hypotheses are kept; "": a file in the cache folder named by all that they depend on.
    "HYPOTHESIS.FILE": Key("", Text(empty=True, path=True)),
    # Crops that are encoded together (121 an image for r = 1/6): raise it on a GPU.
    "HYPOTHESIS.BATCH_SIZE": Key(121, Whole(1, 1_000_000)),
    # ---- linear probing (Table I): tools/linear_probe.py, which trains with labels ---------------------------------
    # Registered data sets with labels; (): the labelled twins of DATASETS.TRAIN, such as voc20_train_labelled (splits
    # named train alone have one).
    "LINEAR_PROBE.DATASETS": Key((), Items(Text())),
    # Checkpoint of the model that is probed; "": the last one in OUTPUT_DIR. MaskCLIP has none.
    "LINEAR_PROBE.WEIGHTS": Key("", Text(empty=True, path=True)),
    # SGD with the momentum of SOLVER and the poly schedule; images are resized, cropped and flipped as INPUT says.
    "LINEAR_PROBE.MAX_ITER": Key(5000, Whole(1)),
    "LINEAR_PROBE.IMS_PER_BATCH": Key(16, Whole(1, 1_000_000)),
    "LINEAR_PROBE.BASE_LR": Key(0.1, RATE),
    "LINEAR_PROBE.WEIGHT_DECAY": Key(0.0, WEIGHT_DECAY),
    # Standardise the embeddings by a batch norm without weights before the linear classifier.
    "LINEAR_PROBE.BATCH_NORM": Key(True, Flag()),
    # ---- feature store (not in the papers): the frozen tower runs once per view instead of once per iteration -----
    # V, fixed views of each training image whose features are kept on disk and read by training; 0: the papers' fresh
    # crops in every iteration.
    "FEATURE_STORE.VIEWS": Key(0, Whole(0, 1000)),
    # "crops": V draws of the training augmentation; "whole": the image as the test sees it, and its mirror image (V 2).
    "FEATURE_STORE.KIND": Key("crops", Choice(("crops", "whole"))),
    # Gibibytes that a store may take; one that would be larger is not made, and the views are computed again in each
    # iteration. 0: as much as the disk has.
    "FEATURE_STORE.MAX_SIZE": Key(50.0, Number(minimum=0, maximum=1e6)),
    # Where stores are kept; "": the cache folder. Each has a subfolder named by all that its features depend on.
    "FEATURE_STORE.FOLDER": Key("", Text(empty=True, path=True)),
    # ---- inputs: CLIP's normalisation, the paper's augmentation ---------------------------------------------
    "INPUT.FORMAT": Key("RGB", Choice(("RGB",))),
    "MODEL.PIXEL_MEAN": Key([122.7709, 116.7460, 104.0937], PIXEL_MEAN),
    "MODEL.PIXEL_STD": Key([68.5005, 66.6322, 70.3232], PIXEL_STD),
    # Strength of brightness, contrast and saturation jitter in (0, 1); 0: off.
    "INPUT.COLOR_JITTER": Key(0.0, Number(minimum=0, below=1)),
    "INPUT.CROP.TYPE": Key("absolute", Choice(("absolute", "absolute_range", "relative", "relative_range"))),
    "INPUT.CROP.SIZE": Key([512, 512], Items(Number(above=0, maximum=65_536), 2, 2)),
    # ---- own images (configs/datasets/custom.yaml, the command `reclip`) -------------------------------------
    # Registered as "custom": a folder (searched recursively), an image, a glob, or a .txt list of these; no labels.
    "DATASETS.CUSTOM.IMAGES": Key("", Text(empty=True, path=True)),
    # Registered as "custom_val" with the images that have a label: a folder of index PNGs that mirrors the images, ids
    # in the order of the class file, 255 ignored. For evaluation alone; with it DATASETS.TEST () becomes custom_val.
    "DATASETS.CUSTOM.LABELS": Key("", Text(empty=True, path=True)),
    # Class file: a class a line, synonyms after commas (reclip_d2/data/class_file.py).
    "DATASETS.CUSTOM.CLASSES": Key("", Text(empty=True, path=True)),
    # Of `reclip segment`: an image of more pixels is trained on as a copy whose short side is this, six windows of
    # CLIP's 224 px.
    "INPUT.COPIES.FROM_PIXELS": Key(16_000_000, Whole(1)),
    "INPUT.COPIES.SHORT_SIDE": Key(1344, SIDE),
    # An image with a longer side is cut into tiles before the resize. `reclip segment` trains on each as on an image;
    # prediction and evaluation treat each as an image (TEST.SLIDING_WINDOW included), and blend neighbours where they
    # overlap, by this part of their side.
    "INPUT.TILES.FROM_SIDE": Key(10_000, Whole(16)),
    "INPUT.TILES.SIZE": Key(1024, Whole(16, 65_536)),
    "INPUT.TILES.OVERLAP": Key(0.25, Number(minimum=0, maximum=0.9)),
    # Memory in MiB for logits at an image's own size, which are made and dropped in bands of rows.
    "TEST.BAND_MEMORY": Key(256, Whole(1, 16_777_216)),
    # ---- solver: SGD, 0.9, 5e-4, poly 0.9 ------------------------------------------------------------------
    # SGD (the papers), or AdamW (ours: for a student from random weights).
    "SOLVER.OPTIMIZER": Key("SGD", Choice(("SGD", "AdamW"))),
    "SOLVER.BASE_LR": Key(0.01, RATE),
    "SOLVER.MOMENTUM": Key(0.9, Number(minimum=0, below=1)),
    "SOLVER.WEIGHT_DECAY": Key(5e-4, WEIGHT_DECAY),
    # Detectron2 would spare the norm layers; the papers do not.
    "SOLVER.WEIGHT_DECAY_NORM": Key(5e-4, Maybe(WEIGHT_DECAY)),
    # As the weights: Detectron2's default from 0.6 on.
    "SOLVER.WEIGHT_DECAY_BIAS": Key(None, Maybe(WEIGHT_DECAY)),
    "SOLVER.LR_SCHEDULER_NAME": Key(
        "WarmupPolyLR", Choice(("WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"))
    ),
    "SOLVER.POLY_POWER": Key(0.9, Number(minimum=0, maximum=100)),
    "SOLVER.WARMUP_ITERS": Key(0, Whole(0)),
    "SOLVER.IMS_PER_BATCH": Key(12, Whole(1, 1_000_000)),
    # SOLVER.AMP.ENABLED runs the training's forward pass under autocast in this precision, the frozen image tower too
    # unless MODEL.CLIP.AUTOCAST names another. Losses, soft-max, noise and the decoder's norm stay in float32. The
    # gradients of float16 are scaled; on the CPU bfloat16 takes its place. Evaluation is in float32.
    "SOLVER.AMP.DTYPE": Key("float16", Choice(("float16", "bfloat16"))),
    # Parts that a batch of IMS_PER_BATCH images is split into to save memory; their gradients add up to one optimizer
    # step. Iterations, learning rate and sampling stay as they are; batch norm sees a part at a time.
    "SOLVER.ACCUMULATE_STEPS": Key(1, Whole(1, 1_000_000)),
    # ---- test --------------------------------------------------------------------------------------------
    # Predict in overlapping windows of the resized image and average the logits, instead of the whole image at once.
    "TEST.SLIDING_WINDOW.ENABLED": Key(False, Flag()),
    # Window and step in pixels, (height, width).
    "TEST.SLIDING_WINDOW.SIZE": Key([512, 512], Items(SIDE, 2, 2)),
    "TEST.SLIDING_WINDOW.STRIDE": Key([341, 341], Items(SIDE, 2, 2)),
    # Give the evaluator label maps instead of (C, H, W) logits: same labels, less work and memory.
    "TEST.LABEL_MAPS": Key(True, Flag()),
    # Measure the class-preference and the space-preference bias beside the mIoU (ReCLIP++, section IV-D).
    "TEST.BIAS.ENABLED": Key(False, Flag()),
    # Space preference: bins of the distance from the image's centre, in pixels (supplement 6.2).
    "TEST.BIAS.BIN_WIDTH": Key(40, Number(above=0)),
    # Space preference: objects of fewer pixels (specks at an occluder's edge) do not count.
    "TEST.BIAS.MIN_OBJECT_AREA": Key(100, Whole(1)),
    # Space preference: bins of fewer objects are in the curve and not in the score.
    "TEST.BIAS.MIN_BIN_OBJECTS": Key(20, Whole(1)),
}

# Rules of all keys that the project reads, Detectron2's among them.
RULES: dict[str, Rule] = {
    **DETECTRON2_RULES,
    **{name: key.rule for name, key in KEYS.items()},
}

# Keys whose value may be a local path: a ``~`` at its beginning is the user's home.
PATH_KEYS = tuple(name for name, rule in RULES.items() if isinstance(rule, Text) and (rule.path or rule.folder))


def add_reclip_config(cfg: CfgNode) -> None:
    """Add the project's keys to Detectron2's, and set the defaults of the paper on shared ones."""
    for name, key in KEYS.items():
        *nodes, leaf = name.split(".")
        node = cfg
        for part in nodes:
            if part not in node:
                node[part] = CfgNode()
            node = node[part]
        node[leaf] = copy.deepcopy(key.default)
