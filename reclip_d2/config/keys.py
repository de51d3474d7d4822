"""The project's keys: default, rule for its values, meaning, and symbol in the paper.

Some are Detectron2's keys with other defaults. Rules for Detectron2's other keys are in
:mod:`reclip_d2.config.detectron2_keys`, rules that involve several keys in :mod:`reclip_d2.config.checks`.
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
    """A key's default, and the rule for its values."""

    default: Any
    rule: Rule


KEYS: dict[str, Key] = {
    # ---- frozen CLIP -------------------------------------------------------------------------------------
    # open_clip model name, or a JSON file of an architecture (open_clip's model config, or open_clip_config.json of a
    # Hugging Face repository); "reclip-embedded" is the tiny CLIP that ships with the package.
    "MODEL.CLIP.NAME": Key("ViT-B-16-quickgelu", Text()),
    # open_clip tag, a local file (OpenAI's TorchScript archive, open_clip's or Hugging Face's weights), or "random".
    # For reclip-embedded: "embedded" (alias: "openai") or "embedded_longtail", which ship with the package, or a file
    # from tools/pretrain_embedded_clip.py.
    "MODEL.CLIP.PRETRAINED": Key("openai", Text(path=True)),
    # Normalisation of images: "weights" uses the statistics of the open_clip tag, or of an open_clip_config.json or
    # preprocessor_config.json next to a local file, instead of the defaults of MODEL.PIXEL_MEAN and PIXEL_STD; "keys"
    # always uses these keys.
    "MODEL.CLIP.NORMALIZATION": Key("weights", Choice(("weights", "keys"))),
    # Folder with the Hugging Face files of the text tower, for models that need them (SigLIP, CLIPA, XLM-RoBERTa, ...):
    # the tokenizer, and config.json for a tower of transformers; "": the folder of a local weight file, or the Hub.
    "MODEL.CLIP.TEXT_FILES": Key("", Text(empty=True, path=True)),
    # What replaces the last block for dense features: the name of an attention in reclip_d2/backbones/dense_attention.
    # "value": MaskCLIP's value path, used by the papers.
    "MODEL.CLIP.DENSE_ATTENTION": Key("value", Text()),
    # Keep residual connections and MLP around the last block's value path, as in the public MaskCLIP and ReCLIP code.
    # For "value"; the keys after it are for other attentions (docs/backbones.md).
    "MODEL.CLIP.VALUE_PATH_RESIDUAL": Key(True, Flag()),
    # The same for sclip, clearclip, naclip, resclip and radseg: "keep", "drop", or as in the attention's "paper".
    "MODEL.CLIP.ATTENTION_RESIDUAL": Key("paper", Choice(("paper", "keep", "drop"))),
    # sigma of naclip and resclip, in patches.
    "MODEL.CLIP.NACLIP_SIGMA": Key(5.0, Number(minimum=1e-3, maximum=1e6)),
    # Weight of the middle blocks' attention in resclip (lambda of RCS; the released configs have 0.2 to 0.6), and the
    # first and last of these blocks, from 0, or one block; []: 5 and 8 of 12.
    "MODEL.CLIP.RESCLIP_WEIGHT": Key(0.3, Number(minimum=0, maximum=1)),
    "MODEL.CLIP.RESCLIP_BLOCKS": Key([], Items(Whole(0, 1000), maximum=2)),
    # Scales of the similarities in radseg: of its attention (SCRA), and of its features (SCGA); 0: without this step.
    "MODEL.CLIP.RADSEG_ATTENTION_SCALE": Key(10.0, Number(minimum=0, maximum=1000)),
    "MODEL.CLIP.RADSEG_FEATURE_SCALE": Key(10.0, Number(minimum=0, maximum=1000)),
    # scclip and dihclip: lowest similarity that counts (beta), and weight of the class token.
    "MODEL.CLIP.CALIBRATED_THRESHOLD": Key(0.4, Number(minimum=-1, maximum=1)),
    "MODEL.CLIP.CALIBRATED_CLASS_TOKEN": Key(0.3, Number(minimum=0, maximum=1000)),
    # scclip: neighbours of the local outlier factor, and fraction of the patches that are anomalous.
    "MODEL.CLIP.SCCLIP_NEIGHBOURS": Key(30, Whole(1, 10_000)),
    "MODEL.CLIP.SCCLIP_ANOMALIES": Key(0.05, Number(minimum=0, below=1)),
    # dihclip: number of the heads of lowest entropy that are kept.
    "MODEL.CLIP.DIHCLIP_HEADS": Key(4, Whole(1, 1000)),
    # Helper vision model of proxy and, if given, regions: a Vision Transformer of timm (DINO, DINOv2, DINOv3, RADIO);
    # and its weights: "pretrained" (timm's, from the Hub), a local file, or "random".
    "MODEL.CLIP.HELPER_NAME": Key("", Text(empty=True)),
    "MODEL.CLIP.HELPER_WEIGHTS": Key("pretrained", Text(path=True)),
    # proxy: shift (beta) and scale (gamma) of the similarities; and the helper's grid in units of CLIP's, 0: by the two
    # patch sizes.
    "MODEL.CLIP.PROXY_SHIFT": Key(1.2, Number(minimum=0, maximum=1000)),
    "MODEL.CLIP.PROXY_SCALE": Key(3.0, Number(minimum=0, maximum=1000)),
    "MODEL.CLIP.PROXY_UPSAMPLING": Key(0, Whole(0, 8)),
    # regions: scale of the similarities; side in patches and compactness of the superpixels.
    "MODEL.CLIP.REGIONS_SCALE": Key(4.0, Number(minimum=0, maximum=1000)),
    "MODEL.CLIP.REGIONS_SIZE": Key(4, Whole(1, 1000)),
    "MODEL.CLIP.REGIONS_COMPACTNESS": Key(1.0, Number(minimum=0, maximum=1e6)),
    # Positional input of Eq. (2), the bias's: the image tower's learned embedding ("own"), or, not in the paper, sines
    # and cosines ("sine"); towers without a learned embedding always have the latter (docs/backbones.md).
    "MODEL.CLIP.POSITIONS": Key("own", Choice(("own", "sine"))),
    # Prompt templates of the Query text features W_q: imagenet_scene (85), imagenet (80), photo (1).
    "MODEL.CLIP.TEMPLATES": Key("imagenet_scene", Choice(("imagenet_scene", "imagenet", "photo"))),
    # Precision of the frozen image tower; "auto": bfloat16 on a GPU that has it, float32 elsewhere and with FINE_TUNE.
    # Trained parts are always float32.
    "MODEL.CLIP.AUTOCAST": Key("auto", Choice(("auto", "float32", "bfloat16", "float16"))),
    # Not in the papers: round the frozen tower's features to half precision in prediction, as feature stores do. Masks
    # are then the same whether their features come from a store or from the image.
    "MODEL.CLIP.HALF_FEATURES": Key(False, Flag()),
    # Table IV: also train the Query's prompt, which starts from "a photo of a" and replaces the templates.
    "MODEL.CLIP.LEARNABLE_QUERY": Key(False, Flag()),
    # Table VI: also train the image tower; its weights are saved in the checkpoint. Text tower and hypotheses remain
    # the pretrained CLIP's.
    "MODEL.CLIP.FINE_TUNE": Key(False, Flag()),
    # The next three reproduce the public code of ReCLIP++; tools/convert_public_checkpoint.py sets them.
    # Epsilon of the LayerNorms in the image tower's blocks; 0: the model's own.
    "MODEL.CLIP.LAYER_NORM_EPS": Key(0.0, Number(minimum=0, below=1)),
    # Activation in the image tower's blocks: "own" (the model's), or "gelu".
    "MODEL.CLIP.IMAGE_ACTIVATION": Key("own", Choice(("own", "gelu"))),
    # safetensors file with a tensor "class_embedding" that replaces CLIP's class token; "": CLIP's own.
    "MODEL.CLIP.CLASS_TOKEN": Key("", Text(empty=True, path=True)),
    # ---- MaskCLIP: CLIP's own segmentation, with its test-time options and controls ------------------------
    # Prompt denoising of MaskCLIP: drop classes whose best patch probability is below this (0: off). It acts on M_q,
    # before key smoothing and the mean filter; TEST.REFINE denoise does the same for the logits of any model.
    "MODEL.MASKCLIP.PROMPT_DENOISING": Key(0.0, Number(minimum=0, maximum=1)),
    # Key smoothing of MaskCLIP: smooth patches whose best probability is below this (0: off).
    "MODEL.MASKCLIP.KEY_SMOOTHING": Key(0.0, Number(minimum=0, maximum=1)),
    # Control: side of a mean filter on the logits, in patches (0: off).
    "MODEL.MASKCLIP.MEAN_FILTER": Key(0, Whole(1, 99, odd=True, also=0)),
    # Not in the papers: an offset per class ("class", "position_class": per position too) that makes the mean
    # probability on unlabelled images uniform, a control; "estimated": or equal to the estimated class shares.
    "MODEL.MASKCLIP.CALIBRATION": Key("none", Choice(("none", "class", "position_class", "estimated"))),
    # ---- bias extraction (section III-B) -------------------------------------------------------------------
    # Name in BIAS_HEAD_REGISTRY: ReCLIPPPBiasHead, or ReCLIPBiasHead (the conference model's).
    "MODEL.BIAS_HEAD.NAME": Key("ReCLIPPPBiasHead", Text()),
    # L, number of learnable vectors of the Reference prompt, Eq. (1); reduced if the longest class name needs room.
    "MODEL.BIAS_HEAD.PROMPT_LENGTH": Key(73, Whole(1, 1000)),
    # Standard deviation of the vectors' initial values.
    "MODEL.BIAS_HEAD.PROMPT_INIT_STD": Key(0.02, Number(minimum=0, maximum=1000)),
    # Projection of PE: "default" (PyTorch's; for ReCLIP the public code's), or, not in the paper, "zero": start
    # without a bias.
    "MODEL.BIAS_HEAD.PROJECTION_INIT": Key("default", Choice(("default", "zero"))),
    # Norm of the Reference features W_r: "row" (each class) or "matrix" (all together, as in the public code).
    "MODEL.BIAS_HEAD.REFERENCE_NORM": Key("row", Choice(("row", "matrix"))),
    # Tokens of a class name in the Reference prompt: 0 takes all tokens and an end token; k takes k tokens including
    # the end token, and reads the features at the largest token id (as in the public code with 3, which cuts off the
    # end of long names).
    "MODEL.BIAS_HEAD.NAME_TOKENS": Key(0, Whole(0, 1000)),
    # Class names of the Reference prompt, one per class; []: the data set's (the public code has a separate list).
    "MODEL.BIAS_HEAD.REFERENCE_NAMES": Key([], Items(Text())),
    # Eq. (3): M = M_q - M_b ("subtract"); "add" and "none" are for Table V.
    "MODEL.BIAS_HEAD.RECTIFICATION": Key("subtract", Choice(("subtract", "add", "none"))),
    # The next two are for ReCLIPBiasHead, whose space bias is a stack of 3x3 convolutions of PE.
    # Widths of the hidden layers.
    "MODEL.BIAS_HEAD.SPACE_CHANNELS": Key([512, 256], Items(Whole(1, 65_536), maximum=16)),
    # Norm, a name for Detectron2's get_norm: BN, SyncBN, FrozenBN, GN, or "" for none.
    "MODEL.BIAS_HEAD.NORM": Key("BN", NORM),
    # ---- rectified mask generation (section III-C) -----------------------------------------------------------
    # Without the decoder, M_o = M (Table III).
    "MODEL.MASK_DECODER.ENABLED": Key(True, Flag()),
    # Kernel size of its convolution; odd.
    "MODEL.MASK_DECODER.KERNEL_SIZE": Key(5, Whole(1, 99, odd=True)),
    # A name for Detectron2's get_norm: BN, SyncBN, FrozenBN, GN, or "" for none.
    "MODEL.MASK_DECODER.NORM": Key("BN", NORM),
    # "replicate", or "zeros" (lowers the logits at the image border).
    "MODEL.MASK_DECODER.PADDING_MODE": Key("replicate", Choice(("replicate", "zeros"))),
    # "default" (PyTorch's), or, not in the paper, "identity": pass M through before training.
    "MODEL.MASK_DECODER.INIT": Key("default", Choice(("default", "identity"))),
    # tau_1 of Eq. (5); 0: the inverse of CLIP's logit scale, 0.01 for OpenAI's models (the paper's value).
    "MODEL.GUMBEL.TAU": Key(0.0, TEMPERATURE),
    # One-hot masks with the straight-through gradient, or soft masks.
    "MODEL.GUMBEL.HARD": Key(True, Flag()),
    # ---- losses (section III-D) ---------------------------------------------------------------------------
    # tau of Eq. (7); 0: the inverse of CLIP's logit scale.
    "MODEL.LOSS.TAU": Key(0.0, TEMPERATURE),
    # Weight of Eq. (7).
    "MODEL.LOSS.CONTRASTIVE_WEIGHT": Key(1.0, LOSS_WEIGHT),
    # Not in the paper: weight of the coverage loss, -mean_n log sum_{c in H} p_nc.
    "MODEL.LOSS.COVERAGE_WEIGHT": Key(0.0, LOSS_WEIGHT),
    # Not in the paper: weight of the mask mass outside the hypothesis, mean_n sum_{c not in H} p_nc.
    "MODEL.LOSS.OUTSIDE_WEIGHT": Key(0.0, LOSS_WEIGHT),
    # Not in the paper: weight of a loss that keeps MaskCLIP's labels where it is confident, -mean_n q_n log p_n[y_n]
    # with y_n the label of M_q and q_n its probability.
    "MODEL.LOSS.ANCHOR_WEIGHT": Key(0.0, LOSS_WEIGHT),
    # ---- distillation (section III-E) ---------------------------------------------------------------------
    # META_ARCHITECTURE "Distillation" trains a student on the teacher's outputs; checkpoints hold the student.
    # "RectifiedCLIP", with all keys above as in its training; "MaskCLIP" (MaskCLIP+); "MaskFolder", masks from files.
    "MODEL.TEACHER.META_ARCHITECTURE": Key("RectifiedCLIP", Text()),
    # Checkpoint of the rectification stage; "" for MaskCLIP.
    "MODEL.TEACHER.WEIGHTS": Key("", Text(empty=True, path=True)),
    # Not in the paper: for MaskFolder, the folder of index PNGs that some system has predicted for the training images.
    "MODEL.TEACHER.MASKS.FOLDER": Key("", Text(empty=True, path=True)),
    # Class file with the names of the masks' ids, in order; "": ids are the data set's.
    "MODEL.TEACHER.MASKS.NAMES": Key("", Text(empty=True, path=True)),
    # What the masks' names have after the images': "_pred" for a_pred.png of a.jpg.
    "MODEL.TEACHER.MASKS.SUFFIX": Key("", Text(empty=True)),
    # Folder of grey PNGs with the confidence of each pixel, black 0 and white 1; "" for none.
    "MODEL.TEACHER.MASKS.CONFIDENCE": Key("", Text(empty=True, path=True)),
    # Pixels of a lower confidence have no pseudo label.
    "MODEL.TEACHER.MASKS.MIN_CONFIDENCE": Key(0.5, Number(minimum=0, maximum=1)),
    # Name in Detectron2's BACKBONE_REGISTRY.
    "MODEL.STUDENT.BACKBONE": Key("build_dilated_resnet_backbone", Text()),
    # Detectron2's ResNet keys, with defaults for torchvision's weights and all layers trained. DEPTH 18 and 34 need
    # RES2_OUT_CHANNELS 64 (or less, for a small model with random weights). BN computes statistics on each GPU, SyncBN
    # over all GPUs; FrozenBN keeps those of the weights.
    "MODEL.RESNETS.DEPTH": Key(101, Choice((18, 34, 50, 101, 152))),
    "MODEL.RESNETS.NORM": Key("BN", NORM),
    "MODEL.RESNETS.STRIDE_IN_1X1": Key(False, Flag()),
    "MODEL.BACKBONE.FREEZE_AT": Key(0, Whole(0, 5)),
    # 8: res4 and res5 are dilated.
    "MODEL.STUDENT.OUTPUT_STRIDE": Key(8, Choice((8, 16, 32))),
    # Initial weights of the backbone: a name from Detectron2's model zoo (detectron2://ImageNetPretrained/...) or
    # torchvision (torchvision://resnet50), a local file of either, or "" for random weights.
    "MODEL.STUDENT.WEIGHTS": Key("", Text(empty=True, path=True)),
    # Input of the backbone's weights, channels in the order of FORMAT, in [0, 255]. Defaults are torchvision's; for
    # Detectron2's MSRA weights BGR, [103.53, 116.28, 123.675] and [1, 1, 1] (and MODEL.RESNETS.STRIDE_IN_1X1 True).
    "MODEL.STUDENT.FORMAT": Key("RGB", Choice(("RGB", "BGR"))),
    # Memory format of the student's network; auto: channels last on a GPU with SOLVER.AMP.
    "MODEL.STUDENT.CHANNELS_LAST": Key("auto", Choice(("auto", "always", "never"))),
    "MODEL.STUDENT.PIXEL_MEAN": Key([123.675, 116.28, 103.53], PIXEL_MEAN),
    "MODEL.STUDENT.PIXEL_STD": Key([58.395, 57.12, 57.375], PIXEL_STD),
    # Dilations of the branches of DeepLab V2.
    "MODEL.STUDENT.DILATIONS": Key([6, 12, 18, 24], Items(Whole(1, 1000), 1, 16)),
    # Table IX: "original" (a learnt classifier), "query" (W_q), "query_bias" (also M_b), "query_bias_decoder" (also
    # F_dec). Parts that the teacher lacks are left out.
    "MODEL.STUDENT.HEAD": Key("query_bias_decoder", Choice(("original", "query", "query_bias", "query_bias_decoder"))),
    # Table VIII: weights of the losses of Eq. (10); the second and third are alpha and beta.
    "MODEL.DISTILLATION.MASK_WEIGHT": Key(1.0, LOSS_WEIGHT),
    "MODEL.DISTILLATION.FEATURE_WEIGHT": Key(0.5, LOSS_WEIGHT),
    "MODEL.DISTILLATION.TEXT_WEIGHT": Key(0.5, LOSS_WEIGHT),
    # Not in the paper: evaluate and save an exponential moving average of the student, with this decay per iteration.
    # 0: off.
    "MODEL.DISTILLATION.EMA_DECAY": Key(0.0, Number(minimum=0, below=1)),
    # Where Eq. (9) compares features: at the image's size (the paper), or on the student's grid (less memory).
    "MODEL.DISTILLATION.FEATURE_SIZE": Key("image", Choice(("image", "grid"))),
    # Use the compiled kernels where they are built; False: plain PyTorch.
    "MODEL.USE_KERNELS": Key(True, Flag()),
    # ---- image-level multi-label hypotheses (Eq. 6) -----------------------------------------------------------
    # "crops" (Eq. 6), "one_pass" (not in the paper: the same windows as class tokens of one forward pass, at test
    # size), "image" (ReCLIP: whole-image scores above the threshold), "dense" (not in the paper: classes of more than a
    # share t of the labels of the image's own patches, see CLASS_SHARES), or "imported" (the sets in HYPOTHESIS.FILE,
    # written by tools/import_public_hypotheses.py; THRESHOLD and CALIBRATED do not apply).
    "HYPOTHESIS.METHOD": Key("crops", Choice(("crops", "one_pass", "image", "dense", "imported"))),
    # For "dense": the class shares that an offset per class gives the labels: "estimated" on the unlabelled images,
    # "uniform", or CLIP's "own" (no offset).
    "HYPOTHESIS.CLASS_SHARES": Key("estimated", Choice(("estimated", "uniform", "own"))),
    # t of Eq. (6): 0.07 for VOC and Cityscapes, 0 otherwise; for "image" a cosine similarity (0.23 for VOC).
    "HYPOTHESIS.THRESHOLD": Key(0.0, Number(minimum=-1, maximum=1)),
    # Not in the paper: choose t on the unlabelled training images so that hypotheses have this mean number of classes
    # per image, such as 2.5. For cases where t is a raw cosine that is hard to guess. THRESHOLD does not apply then.
    # 0: off.
    "HYPOTHESIS.CLASSES_PER_IMAGE": Key(0.0, Number(minimum=1, maximum=1000, also=0)),
    # r of Eq. (6): window size as a fraction of the image size.
    "HYPOTHESIS.WINDOW_RATIO": Key(1 / 6, Number(minimum=0.02, maximum=1)),
    # First block of the image tower (from 0) in which windows of "one_pass" attend only to their own patches.
    "HYPOTHESIS.SPLIT_BLOCK": Key(0, Whole(0, 1000)),
    # Not in the paper: add an offset per class to the window scores so that their mean soft-max is uniform.
    "HYPOTHESIS.CALIBRATED": Key(False, Flag()),
    # For a training crop, use the windows whose centres are in it, instead of the image's hypothesis ("crops" and
    # "one_pass").
    "HYPOTHESIS.CROP_AWARE": Key(False, Flag()),
    # File of the hypotheses; "": in the cache folder, named by a digest of everything that they depend on.
    "HYPOTHESIS.FILE": Key("", Text(empty=True, path=True)),
    # Number of crops encoded together (121 per image for r = 1/6); 0: 121 on a CPU, 484 on a GPU.
    "HYPOTHESIS.BATCH_SIZE": Key(0, Whole(0, 1_000_000)),
    # ---- linear probing (Table I): tools/linear_probe.py, which trains with labels ---------------------------------
    # Registered data sets with labels; (): the labelled versions of DATASETS.TRAIN, such as voc20_train_labelled (only
    # splits named train have one).
    "LINEAR_PROBE.DATASETS": Key((), Items(Text())),
    # Checkpoint of the probed model; "": the last one in OUTPUT_DIR. MaskCLIP has none.
    "LINEAR_PROBE.WEIGHTS": Key("", Text(empty=True, path=True)),
    # SGD with SOLVER.MOMENTUM and the poly schedule; images are resized, cropped and flipped by the INPUT keys.
    "LINEAR_PROBE.MAX_ITER": Key(5000, Whole(1)),
    "LINEAR_PROBE.IMS_PER_BATCH": Key(16, Whole(1, 1_000_000)),
    "LINEAR_PROBE.BASE_LR": Key(0.1, RATE),
    "LINEAR_PROBE.WEIGHT_DECAY": Key(0.0, WEIGHT_DECAY),
    # Apply batch norm without weights to the embeddings before the linear classifier.
    "LINEAR_PROBE.BATCH_NORM": Key(True, Flag()),
    # ---- feature store (not in the paper): the frozen tower runs once per view instead of once per iteration ------
    # V, number of fixed views per training image, whose features training reads from disk; 0: new crops in every
    # iteration, as in the papers.
    "FEATURE_STORE.VIEWS": Key(0, Whole(0, 1000)),
    # "crops": V samples of the training augmentation; "whole": the image at test size and, for V 2, its mirror image.
    "FEATURE_STORE.KIND": Key("crops", Choice(("crops", "whole"))),
    # Maximum size of a store, in GiB. If it would be larger, views are computed again in each iteration instead.
    # 0: no limit but the disk's.
    "FEATURE_STORE.MAX_SIZE": Key(50.0, Number(minimum=0, maximum=1e6)),
    # On a GPU, the store is held in device memory if it takes at most this fraction of what is free; 0: read from disk.
    "FEATURE_STORE.DEVICE_MEMORY": Key(0.5, Number(minimum=0, maximum=0.95)),
    # Folder of stores; "": the cache folder. Each is a subfolder named by a digest of everything it depends on.
    "FEATURE_STORE.FOLDER": Key("", Text(empty=True, path=True)),
    # ---- inputs: CLIP's normalisation, the paper's augmentation ---------------------------------------------
    "INPUT.FORMAT": Key("RGB", Choice(("RGB",))),
    "MODEL.PIXEL_MEAN": Key([122.7709, 116.7460, 104.0937], PIXEL_MEAN),
    "MODEL.PIXEL_STD": Key([68.5005, 66.6322, 70.3232], PIXEL_STD),
    # Strength of brightness, contrast and saturation jitter, in (0, 1); 0: off.
    "INPUT.COLOR_JITTER": Key(0.0, Number(minimum=0, below=1)),
    "INPUT.CROP.TYPE": Key("absolute", Choice(("absolute", "absolute_range", "relative", "relative_range"))),
    "INPUT.CROP.SIZE": Key([512, 512], Items(Number(above=0, maximum=65_536), 2, 2)),
    # ---- own images (configs/datasets/custom.yaml, the command `reclip`) -------------------------------------
    # Registered as "custom": a folder (searched recursively), an image, a glob, or a .txt list of these; no labels.
    "DATASETS.CUSTOM.IMAGES": Key("", Text(empty=True, path=True)),
    # Registered as "custom_val" with the images that have labels: a folder of index PNGs that mirrors the images, ids
    # in the order of the class file, 255 ignored. For evaluation only; if given, DATASETS.TEST () becomes custom_val.
    "DATASETS.CUSTOM.LABELS": Key("", Text(empty=True, path=True)),
    # Class file: one class per line, synonyms after commas, queries after semicolons (reclip_d2/data/class_file.py).
    "DATASETS.CUSTOM.CLASSES": Key("", Text(empty=True, path=True)),
    # Class file with other names for the classes of registered data sets, in their order, and background names. The
    # data sets are then called NAME_vocabulary (docs/refinements.md).
    "DATASETS.VOCABULARY": Key("", Text(empty=True, path=True)),
    # Resize of test images: Pillow's bilinear filter (Detectron2's), or OpenCV's, as in the public code of ReCLIP++.
    "INPUT.RESIZE_TEST": Key("pillow", Choice(("pillow", "opencv"))),
    # `reclip segment` trains on copies of images with more pixels than FROM_PIXELS, reduced to this short side (six
    # windows of CLIP's 224 px).
    "INPUT.COPIES.FROM_PIXELS": Key(16_000_000, Whole(1)),
    "INPUT.COPIES.SHORT_SIDE": Key(1344, SIDE),
    # Images with a side longer than FROM_SIDE are cut into tiles before the resize. `reclip segment` trains on tiles as
    # on images; prediction and evaluation treat tiles as images (including TEST.SLIDING_WINDOW) and blend them where
    # they overlap. OVERLAP is a fraction of SIZE.
    "INPUT.TILES.FROM_SIDE": Key(10_000, Whole(16)),
    "INPUT.TILES.SIZE": Key(1024, Whole(16, 65_536)),
    "INPUT.TILES.OVERLAP": Key(0.25, Number(minimum=0, maximum=0.9)),
    # GeoTIFFs in `reclip`: whether they are read in windows, with GeoTIFFs as masks (False: as other TIFFs); numbers of
    # the bands for red, green and blue, from 1, or of one for grey ([]: those that the file declares, or the first
    # three, or the first); how samples become 8 bits (reclip_d2/data/stretch.py).
    "INPUT.GEO.ENABLED": Key(True, Flag()),
    "INPUT.GEO.BANDS": Key([], Items(Whole(1, 65_535), 0, 3)),
    "INPUT.GEO.STRETCH": Key("auto", Choice(("auto", "percentiles", "minmax", "none"))),
    "INPUT.GEO.PERCENTILES": Key([2.0, 98.0], Items(Number(minimum=0, maximum=100), 2, 2)),
    # `reclip segment` trains on windows of GeoTIFFs, of side INPUT.TILES.SIZE. They overlap by this fraction of it; at
    # most PER_SCENE of a file are drawn, with the seed, of those that have data in a share MIN_VALID of their pixels.
    "INPUT.GEO.WINDOWS.OVERLAP": Key(0.0, Number(minimum=0, maximum=0.9)),
    "INPUT.GEO.WINDOWS.PER_SCENE": Key(256, Whole(1)),
    "INPUT.GEO.WINDOWS.MIN_VALID": Key(0.5, Number(minimum=0, maximum=1)),
    "INPUT.GEO.WINDOWS.SEED": Key(0, Whole(0)),
    # Memory in MiB for logits at full image size, which are computed in bands of rows.
    "TEST.BAND_MEMORY": Key(256, Whole(1, 16_777_216)),
    # ---- solver: SGD, 0.9, 5e-4, poly 0.9 ------------------------------------------------------------------
    # SGD (the papers), or AdamW (not in the paper: for a student with random initial weights).
    "SOLVER.OPTIMIZER": Key("SGD", Choice(("SGD", "AdamW"))),
    "SOLVER.BASE_LR": Key(0.01, RATE),
    "SOLVER.MOMENTUM": Key(0.9, Number(minimum=0, below=1)),
    "SOLVER.WEIGHT_DECAY": Key(5e-4, WEIGHT_DECAY),
    # Detectron2 does not decay norm layers; the papers do.
    "SOLVER.WEIGHT_DECAY_NORM": Key(5e-4, Maybe(WEIGHT_DECAY)),
    # None: as for weights, Detectron2's default since 0.6.
    "SOLVER.WEIGHT_DECAY_BIAS": Key(None, Maybe(WEIGHT_DECAY)),
    "SOLVER.LR_SCHEDULER_NAME": Key(
        "WarmupPolyLR", Choice(("WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"))
    ),
    "SOLVER.POLY_POWER": Key(0.9, Number(minimum=0, maximum=100)),
    "SOLVER.WARMUP_ITERS": Key(0, Whole(0)),
    "SOLVER.IMS_PER_BATCH": Key(12, Whole(1, 1_000_000)),
    # SOLVER.AMP.ENABLED runs the training's forward pass under autocast in this precision, including the frozen image
    # tower unless MODEL.CLIP.AUTOCAST names another. Losses, soft-max, noise and the decoder's norm stay in float32.
    # Gradients are scaled in float16; on the CPU, bfloat16 replaces float16. Evaluation is in float32.
    "SOLVER.AMP.DTYPE": Key("float16", Choice(("float16", "bfloat16"))),
    # On a GPU: the whole step (losses, gradients, clipping, optimizer) as one CUDA graph. Losses are checked and logged
    # every 20 iterations. Not with ACCUMULATE_STEPS, AMP.DTYPE float16, FINE_TUNE, or several GPUs: one line says so.
    "SOLVER.CUDA_GRAPH": Key(False, Flag()),
    # Number of parts that a batch of IMS_PER_BATCH images is split into to save memory; their gradients are accumulated
    # for one optimizer step. Iterations, learning rate and sampling do not change; batch norm sees one part at a time.
    "SOLVER.ACCUMULATE_STEPS": Key(1, Whole(1, 1_000_000)),
    # Not in the papers: score the model every so many iterations without labels, and keep the best
    # (reclip_d2/engine/judged_training.py). Needs FEATURE_STORE.KIND whole. 0: keep the last, as in the papers.
    "SOLVER.JUDGE_PERIOD": Key(0, Whole(0)),
    # Not in the papers: end the training when the masks of held-out views and the loss no longer change, at MAX_ITER at
    # the latest (reclip_d2/engine/plateau.py).
    "SOLVER.PLATEAU.ENABLED": Key(False, Flag()),
    # Iterations between two looks at the masks.
    "SOLVER.PLATEAU.PERIOD": Key(10, Whole(1)),
    # Periods in each of the two windows that are compared.
    "SOLVER.PLATEAU.WINDOW": Key(4, Whole(2, 1000)),
    # Largest share of patches whose label changes from window to window, beyond the jitter within a window, ...
    "SOLVER.PLATEAU.MASK_CHANGE": Key(0.01, Number(minimum=0, maximum=1)),
    # ... and largest relative decrease of the loss, for PATIENCE periods in a row.
    "SOLVER.PLATEAU.LOSS_CHANGE": Key(0.02, Number(minimum=0, maximum=1)),
    "SOLVER.PLATEAU.PATIENCE": Key(3, Whole(1, 1000)),
    # Iterations in which the learning rate then decays to 0.
    "SOLVER.PLATEAU.COOL_DOWN": Key(100, Whole(0)),
    # Number of images with a held-out view, at most a quarter of all. With a feature store of several views per image
    # it is the image's first view; otherwise the image at test size.
    "SOLVER.PLATEAU.IMAGES": Key(16, Whole(1, 10_000)),
    # ---- test --------------------------------------------------------------------------------------------
    # Predict overlapping windows of the resized image and average their logits, instead of the whole image at once.
    "TEST.SLIDING_WINDOW.ENABLED": Key(False, Flag()),
    # Window size and stride in pixels, (height, width).
    "TEST.SLIDING_WINDOW.SIZE": Key([512, 512], Items(SIDE, 2, 2)),
    "TEST.SLIDING_WINDOW.STRIDE": Key([341, 341], Items(SIDE, 2, 2)),
    # Not in the paper: refinements of the logits, in this order: denoise, bank, lposs, pamr, region_vote, sfr of each
    # forward pass; flip and scales average the probabilities of several views. See docs/refinements.md.
    "TEST.REFINE": Key([], Items(Text(), 0, 20)),
    # Not in the paper: classes that are never predicted. First names of some; then those in the hypotheses of fewer
    # training images, those with a smaller estimated share of their patches, and those that reach a smaller mean
    # posterior over their region in each image; 0: off. None of this reads labels. See docs/refinements.md.
    "TEST.LEAVE_OUT": Key([], Items(Text(), 0, 100_000)),
    "TEST.MIN_CLASS_IMAGES": Key(0, Whole(0, 1_000_000_000)),
    "TEST.MIN_CLASS_SHARE": Key(0.0, Number(minimum=0, below=1)),
    "TEST.MIN_CLASS_CONFIDENCE": Key(0.0, Number(minimum=0, maximum=1)),
    # File of the shares and confidences, made from DATASETS.TRAIN if it does not exist; "": in the cache.
    "TEST.CLASS_EVIDENCE": Key("", Text(empty=True, path=True)),
    # Factor of the logits before the soft-max of refinements; 0: CLIP's logit scale for cosines, 10 after a mask
    # decoder, 1 for a student.
    "TEST.SOFTMAX_SCALE": Key(0.0, Number(minimum=0, maximum=1e6)),
    # denoise: classes whose highest probability in the image is lower are dropped.
    "TEST.DENOISE.THRESHOLD": Key(0.5, Number(minimum=0, maximum=1)),
    # scales: sizes of the views, relative to the resized image.
    "TEST.SCALES": Key([0.75, 1.0, 1.25], Items(Number(minimum=0.1, maximum=8), 1, 20)),
    # pamr: iterations, and distances of the neighbours in pixels.
    "TEST.PAMR.ITERATIONS": Key(10, Whole(1, 1000)),
    "TEST.PAMR.DILATIONS": Key([8, 16], Items(Whole(1, 1000), 1, 20)),
    # region_vote: SLIC "superpixels"; "masks" of FOLDER, one index PNG per image; or superpixels that are merged where
    # the features of a "helper" (MODEL.CLIP.HELPER_NAME) have a cosine of at least SIMILARITY. Then side of a
    # superpixel in pixels, and weight of place against colour.
    "TEST.REGION_VOTE.REGIONS": Key("superpixels", Choice(("superpixels", "masks", "helper"))),
    "TEST.REGION_VOTE.FOLDER": Key("", Text(empty=True, path=True)),
    "TEST.REGION_VOTE.SIMILARITY": Key(0.8, Number(minimum=-1, maximum=1)),
    "TEST.REGION_VOTE.SIZE": Key(16, Whole(2, 10_000)),
    "TEST.REGION_VOTE.COMPACTNESS": Key(1.0, Number(minimum=0, maximum=1e6)),
    # bank: a file of features from unlabelled images, and the most regions of each class in a new one; the nearest
    # regions that count, their weight (lambda) and the scale of the cosines (beta).
    "TEST.BANK.FILE": Key("", Text(empty=True, path=True)),
    "TEST.BANK.SIZE": Key(256, Whole(1, 100_000)),
    "TEST.BANK.NEIGHBOURS": Key(20, Whole(1, 100_000)),
    "TEST.BANK.WEIGHT": Key(0.3, Number(minimum=0, maximum=1)),
    "TEST.BANK.SCALE": Key(10.0, Number(minimum=0, maximum=1e6)),
    # sfr: lambda, the weight of the labels' relations against the attention's scores; tau, the factor of both; pixels
    # whose highest probability is lower than THRESHOLD have no label. The public code's values for VOC20.
    "TEST.SFR.WEIGHT": Key(0.6, Number(minimum=0, maximum=1)),
    "TEST.SFR.SCALE": Key(2.1, Number(above=0, maximum=1e6)),
    "TEST.SFR.THRESHOLD": Key(0.1, Number(minimum=0, maximum=1)),
    # lposs: nearest patches of each patch, and alpha of (I - alpha W) F = Y.
    "TEST.LPOSS.NEIGHBOURS": Key(400, Whole(1, 100_000)),
    "TEST.LPOSS.ALPHA": Key(0.95, Number(minimum=0, below=1)),
    # Videos: a frame's logits are the mean of this many frames before it, its own, and as many after it.
    "TEST.VIDEO_WINDOW": Key(0, Whole(0, 100)),
    # Cropping padding off before logits are resized is exact. "stretch" is the public code of ReCLIP++: padding counts
    # as part of the image, and the whole grid is resized to the resized image, then to the image.
    "TEST.PADDING": Key("crop", Choice(("crop", "stretch"))),
    # Give the evaluator label maps instead of logits (C, H, W): same labels, less time and memory.
    "TEST.LABEL_MAPS": Key(True, Flag()),
    # Measure class-preference and space-preference bias in addition to mIoU (ReCLIP++, section IV-D).
    "TEST.BIAS.ENABLED": Key(False, Flag()),
    # Space preference: width of the bins of distance from the image centre, in pixels (supplement 6.2).
    "TEST.BIAS.BIN_WIDTH": Key(40, Number(above=0)),
    # Space preference: ignore objects with fewer pixels (specks at an occluder's edge).
    "TEST.BIAS.MIN_OBJECT_AREA": Key(100, Whole(1)),
    # Space preference: bins with fewer objects are in the curve, but not in the score.
    "TEST.BIAS.MIN_BIN_OBJECTS": Key(20, Whole(1)),
    # ---- experiment trackers, next to the log, metrics.json and TensorBoard ----------------------------------
    # "wandb" and "mlflow"; they are configured by their environment variables (WANDB_MODE, MLFLOW_TRACKING_URI).
    "TRACKERS.USE": Key([], Items(Choice(("wandb", "mlflow")), 0, 2)),
    # Project of Weights & Biases, experiment of MLflow.
    "TRACKERS.PROJECT": Key("reclip_d2", Text()),
    # Name of the run; "": that of OUTPUT_DIR.
    "TRACKERS.RUN": Key("", Text(empty=True)),
}

# Rules of all keys that the project reads, including Detectron2's.
RULES: dict[str, Rule] = {
    **DETECTRON2_RULES,
    **{name: key.rule for name, key in KEYS.items()},
}

# Keys whose value may be a local path, in which a leading ``~`` is expanded.
PATH_KEYS = tuple(name for name, rule in RULES.items() if isinstance(rule, Text) and (rule.path or rule.folder))


def add_reclip_config(cfg: CfgNode) -> None:
    """Add the project's keys to Detectron2's config, and override the defaults of shared ones."""
    for name, key in KEYS.items():
        *nodes, leaf = name.split(".")
        node = cfg
        for part in nodes:
            if part not in node:
                node[part] = CfgNode()
            node = node[part]
        node[leaf] = copy.deepcopy(key.default)
