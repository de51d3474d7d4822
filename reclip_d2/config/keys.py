"""Every key of the project with its default, its meaning and the paper's symbol."""

from __future__ import annotations

from detectron2.config import CfgNode

# The keys that hold one of a few words.
CHOICES: dict[str, tuple[str | int, ...]] = {
    "MODEL.CLIP.AUTOCAST": ("float32", "bfloat16", "float16"),
    "MODEL.CLIP.IMAGE_ACTIVATION": ("own", "gelu"),
    "MODEL.MASKCLIP.CALIBRATION": ("none", "class", "position_class"),
    "MODEL.BIAS_HEAD.PROJECTION_INIT": ("default", "zero"),
    "MODEL.BIAS_HEAD.REFERENCE_NORM": ("row", "matrix"),
    "MODEL.BIAS_HEAD.RECTIFICATION": ("subtract", "add", "none"),
    "MODEL.MASK_DECODER.PADDING_MODE": ("replicate", "zeros"),
    "MODEL.MASK_DECODER.INIT": ("default", "identity"),
    "MODEL.STUDENT.HEAD": ("original", "query", "query_bias", "query_bias_decoder"),
    "MODEL.STUDENT.FORMAT": ("RGB", "BGR"),
    "MODEL.STUDENT.OUTPUT_STRIDE": (8, 16, 32),
    "MODEL.DISTILLATION.FEATURE_SIZE": ("image", "grid"),
    "HYPOTHESIS.METHOD": ("crops", "image", "imported"),
    "SOLVER.OPTIMIZER": ("SGD", "AdamW"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "SOLVER.AMP.DTYPE": ("float16", "bfloat16"),
}


def add_reclip_config(cfg: CfgNode) -> None:
    """Add the project's keys to Detectron2's, and set the defaults of the paper on shared ones."""
    # ---- frozen CLIP -------------------------------------------------------------------------------------
    cfg.MODEL.CLIP = CfgNode()
    # open_clip model name; "reclip-embedded" is the tiny CLIP that ships with the package.
    cfg.MODEL.CLIP.NAME = "ViT-B-16-quickgelu"
    # open_clip tag, a local file (OpenAI's TorchScript archive, open_clip's or Hugging Face's weights), or "random".
    cfg.MODEL.CLIP.PRETRAINED = "openai"
    # Keep residual connections and MLP around the last block's value path (public MaskCLIP and ReCLIP code).
    cfg.MODEL.CLIP.VALUE_PATH_RESIDUAL = True
    # Prompt templates of the Query text features W_q: imagenet_scene (85), imagenet (80), photo (1).
    cfg.MODEL.CLIP.TEMPLATES = "imagenet_scene"
    # Precision of the frozen image tower: float32, bfloat16 or float16. The trained parts stay in float32.
    cfg.MODEL.CLIP.AUTOCAST = "float32"
    # Table IV: the Query's prompt trains too; it starts from "a photo of a" and takes the templates' place.
    cfg.MODEL.CLIP.LEARNABLE_QUERY = False
    # Table VI: the image tower trains too, and its weights are in the checkpoint. Text tower and hypotheses stay the
    # pretrained CLIP's.
    cfg.MODEL.CLIP.FINE_TUNE = False
    # The next three reproduce the public code of ReCLIP++ and are set by tools/convert_public_checkpoint.py.
    # Epsilon of the LayerNorms in the image tower's blocks; 0: the model's own.
    cfg.MODEL.CLIP.LAYER_NORM_EPS = 0.0
    # Activation in the image tower's blocks: "own" (the model's), or "gelu".
    cfg.MODEL.CLIP.IMAGE_ACTIVATION = "own"
    # safetensors file with a tensor "class_embedding" that takes the place of CLIP's class token; "": CLIP's own.
    cfg.MODEL.CLIP.CLASS_TOKEN = ""

    # ---- MaskCLIP: CLIP's own segmentation, with its test-time options and the controls --------------------
    cfg.MODEL.MASKCLIP = CfgNode()
    # Prompt denoising of MaskCLIP: drop classes whose best patch probability is below this (0: off).
    cfg.MODEL.MASKCLIP.PROMPT_DENOISING = 0.0
    # Key smoothing of MaskCLIP: smooth patches whose best probability is below this (0: off).
    cfg.MODEL.MASKCLIP.KEY_SMOOTHING = 0.0
    # Control: side of a mean filter on the logits, in patches (0: off).
    cfg.MODEL.MASKCLIP.MEAN_FILTER = 0
    # Control (ours): mean-probability calibration on unlabelled images: none, class or position_class.
    cfg.MODEL.MASKCLIP.CALIBRATION = "none"

    # ---- bias extraction (section III-B) -------------------------------------------------------------------
    cfg.MODEL.BIAS_HEAD = CfgNode()
    # Name in BIAS_HEAD_REGISTRY: ReCLIPPPBiasHead, or ReCLIPBiasHead (the conference model's).
    cfg.MODEL.BIAS_HEAD.NAME = "ReCLIPPPBiasHead"
    # L, learnable vectors of the Reference prompt, Eq. (1); shortened where the longest class name needs room.
    cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH = 73
    # Standard deviation of the vectors' initial values.
    cfg.MODEL.BIAS_HEAD.PROMPT_INIT_STD = 0.02
    # Projection of PE: "default" (PyTorch's; ReCLIP's: the public code's), or "zero" (ours): start without a bias.
    cfg.MODEL.BIAS_HEAD.PROJECTION_INIT = "default"
    # Norm of the Reference features W_r: "row" (each class) or "matrix" (all together, as the public code).
    cfg.MODEL.BIAS_HEAD.REFERENCE_NORM = "row"
    # Tokens of a class name in the Reference prompt: 0 takes all and an end token; k takes k tokens, end included, and
    # reads where the token id is largest (the public code, with 3: the end of a long name is cut off).
    cfg.MODEL.BIAS_HEAD.NAME_TOKENS = 0
    # Class names of the Reference prompt, one a class; []: the data set's (the public code has a list of its own).
    cfg.MODEL.BIAS_HEAD.REFERENCE_NAMES = []
    # Eq. (3): M = M_q - M_b ("subtract"); "add" and "none" are Table V.
    cfg.MODEL.BIAS_HEAD.RECTIFICATION = "subtract"
    # The next two are of ReCLIPBiasHead, whose space bias is a stack of 3x3 convolutions of PE.
    # Widths of its hidden layers.
    cfg.MODEL.BIAS_HEAD.SPACE_CHANNELS = [512, 256]
    # Its norm, a name of Detectron2's get_norm: BN, SyncBN, FrozenBN, GN, or "" for none.
    cfg.MODEL.BIAS_HEAD.NORM = "BN"

    # ---- rectified mask generation (section III-C) -----------------------------------------------------------
    cfg.MODEL.MASK_DECODER = CfgNode()
    # Without the decoder M_o = M (Table III).
    cfg.MODEL.MASK_DECODER.ENABLED = True
    # Of its one convolution; odd.
    cfg.MODEL.MASK_DECODER.KERNEL_SIZE = 5
    # A name of Detectron2's get_norm: BN, SyncBN, FrozenBN, GN, or "" for none.
    cfg.MODEL.MASK_DECODER.NORM = "BN"
    # "replicate", or "zeros" (lowers the logits at the image border).
    cfg.MODEL.MASK_DECODER.PADDING_MODE = "replicate"
    # "default" (PyTorch's), or "identity" (ours): pass M through before training.
    cfg.MODEL.MASK_DECODER.INIT = "default"
    cfg.MODEL.GUMBEL = CfgNode()
    # tau_1 of Eq. (5); 0: the inverse of CLIP's own logit scale, 0.01 for OpenAI's models (the paper's value).
    cfg.MODEL.GUMBEL.TAU = 0.0
    # One-hot masks with the straight-through gradient, or soft masks.
    cfg.MODEL.GUMBEL.HARD = True

    # ---- losses (section III-D) ---------------------------------------------------------------------------
    cfg.MODEL.LOSS = CfgNode()
    # tau of Eq. (7); 0: the inverse of CLIP's own logit scale.
    cfg.MODEL.LOSS.TAU = 0.0
    # Weight of Eq. (7).
    cfg.MODEL.LOSS.CONTRASTIVE_WEIGHT = 1.0
    # Ours: weight of the coverage loss, -mean_n log sum_{c in H} p_nc.
    cfg.MODEL.LOSS.COVERAGE_WEIGHT = 0.0
    # Ours: weight of the mask mass outside the hypothesis, mean_n sum_{c not in H} p_nc.
    cfg.MODEL.LOSS.OUTSIDE_WEIGHT = 0.0

    # ---- distillation (section III-E) ---------------------------------------------------------------------
    # META_ARCHITECTURE "Distillation" trains a student on the teacher's outputs; its checkpoint is the student's.
    cfg.MODEL.TEACHER = CfgNode()
    # "RectifiedCLIP", with all keys above as in the run that trained it, or "MaskCLIP" (MaskCLIP+).
    cfg.MODEL.TEACHER.META_ARCHITECTURE = "RectifiedCLIP"
    # Checkpoint of the rectification stage; MaskCLIP has none.
    cfg.MODEL.TEACHER.WEIGHTS = ""
    cfg.MODEL.STUDENT = CfgNode()
    # Name in Detectron2's BACKBONE_REGISTRY.
    cfg.MODEL.STUDENT.BACKBONE = "build_dilated_resnet_backbone"
    # Detectron2's keys of a ResNet, with defaults for torchvision's weights, all of it training. DEPTH 18 and 34 need
    # RES2_OUT_CHANNELS 64 (or less, for a small model with random weights). BN takes its statistics on each GPU, SyncBN
    # on all of them; FrozenBN keeps those of the weights.
    cfg.MODEL.RESNETS.DEPTH = 101
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    # 8: res4 and res5 are dilated.
    cfg.MODEL.STUDENT.OUTPUT_STRIDE = 8
    # Initial weights of the backbone: a name of Detectron2's model zoo (detectron2://ImageNetPretrained/...), one of
    # torchvision (torchvision://resnet50), a local file of either, or "" for random ones.
    cfg.MODEL.STUDENT.WEIGHTS = ""
    # What the backbone's weights were trained on, in the order of FORMAT, in [0, 255]: torchvision's; for Detectron2's
    # MSRA weights BGR, [103.53, 116.28, 123.675] and [1, 1, 1] (and MODEL.RESNETS.STRIDE_IN_1X1 True).
    cfg.MODEL.STUDENT.FORMAT = "RGB"
    cfg.MODEL.STUDENT.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.STUDENT.PIXEL_STD = [58.395, 57.12, 57.375]
    # Atrous branches of DeepLab V2.
    cfg.MODEL.STUDENT.DILATIONS = [6, 12, 18, 24]
    # Table IX: "original" (a learnt classifier), "query" (W_q), "query_bias" (and M_b), "query_bias_decoder" (and
    # F_dec); of these what the teacher has.
    cfg.MODEL.STUDENT.HEAD = "query_bias_decoder"
    cfg.MODEL.DISTILLATION = CfgNode()
    # Table VIII: weights of the losses of Eq. (10); the second and third are alpha and beta.
    cfg.MODEL.DISTILLATION.MASK_WEIGHT = 1.0
    cfg.MODEL.DISTILLATION.FEATURE_WEIGHT = 0.5
    cfg.MODEL.DISTILLATION.TEXT_WEIGHT = 0.5
    # Where Eq. (9) compares the features: at the image's size (the paper), or on the student's grid (less memory).
    cfg.MODEL.DISTILLATION.FEATURE_SIZE = "image"

    # Compiled kernels where the extension is built; False: their plain PyTorch twins.
    cfg.MODEL.USE_KERNELS = True

    # ---- image-level multi-label hypotheses (Eq. 6) -----------------------------------------------------------
    cfg.HYPOTHESIS = CfgNode()
    # "crops" (Eq. 6), "image" (ReCLIP: whole-image scores above the threshold), or "imported" (the sets that stand in
    # HYPOTHESIS.FILE, written by tools/import_public_hypotheses.py; THRESHOLD and CALIBRATED do not apply).
    cfg.HYPOTHESIS.METHOD = "crops"
    # t of Eq. (6): 0.07 for VOC and Cityscapes, 0 else; for "image" a cosine similarity (0.23 for VOC).
    cfg.HYPOTHESIS.THRESHOLD = 0.0
    # r of Eq. (6): window size as a part of the image's.
    cfg.HYPOTHESIS.WINDOW_RATIO = 1 / 6
    # Ours: an offset per class on the window scores that makes their mean soft-max uniform.
    cfg.HYPOTHESIS.CALIBRATED = False
    # The hypothesis of a training crop from the windows whose centres lie in it, instead of the image's ("crops" only).
    cfg.HYPOTHESIS.CROP_AWARE = False
    # Where the hypotheses are kept; "": a file in the cache folder named by all that they depend on.
    cfg.HYPOTHESIS.FILE = ""
    # Crops that are encoded together (121 an image for r = 1/6): raise it on a GPU.
    cfg.HYPOTHESIS.BATCH_SIZE = 121

    # ---- linear probing (Table I): tools/linear_probe.py, which trains with labels ---------------------------------
    cfg.LINEAR_PROBE = CfgNode()
    # Registered data sets with labels; (): the labelled twins of DATASETS.TRAIN, such as voc20_train_labelled (splits
    # named train alone have one).
    cfg.LINEAR_PROBE.DATASETS = ()
    # Checkpoint of the model that is probed; "": the last one in OUTPUT_DIR. MaskCLIP has none.
    cfg.LINEAR_PROBE.WEIGHTS = ""
    # SGD with the momentum of SOLVER and the poly schedule; images are resized, cropped and flipped as INPUT says.
    cfg.LINEAR_PROBE.MAX_ITER = 5000
    cfg.LINEAR_PROBE.IMS_PER_BATCH = 16
    cfg.LINEAR_PROBE.BASE_LR = 0.1
    cfg.LINEAR_PROBE.WEIGHT_DECAY = 0.0
    # Standardise the embeddings by a batch norm without weights before the linear classifier.
    cfg.LINEAR_PROBE.BATCH_NORM = True

    # ---- inputs: CLIP's normalisation, the paper's augmentation ---------------------------------------------
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [122.7709, 116.7460, 104.0937]
    cfg.MODEL.PIXEL_STD = [68.5005, 66.6322, 70.3232]
    # Strength of brightness, contrast and saturation jitter in (0, 1); 0: off.
    cfg.INPUT.COLOR_JITTER = 0.0
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [512, 512]

    # ---- own images (configs/custom, the command `reclip`) ---------------------------------------------------
    cfg.DATASETS.CUSTOM = CfgNode()
    # Registered as "custom": a folder (searched recursively), an image, a glob, or a .txt list of these; no labels.
    cfg.DATASETS.CUSTOM.IMAGES = ""
    # Class file: a class a line, synonyms after commas (reclip_d2/data/class_file.py).
    cfg.DATASETS.CUSTOM.CLASSES = ""
    # The next two nodes and TEST.BAND_MEMORY are of `reclip` and demo/demo.py, which predict in a way of their own.
    cfg.INPUT.COPIES = CfgNode()
    # Of `reclip segment`: an image of more pixels is trained on as a copy whose short side is this, six windows of
    # CLIP's 224 px.
    cfg.INPUT.COPIES.FROM_PIXELS = 16_000_000
    cfg.INPUT.COPIES.SHORT_SIDE = 1344
    cfg.INPUT.TILES = CfgNode()
    # An image with a longer side is cut into tiles, each of which is trained on and predicted as an image of its own
    # is; in prediction neighbours overlap by a part of their side and are blended.
    cfg.INPUT.TILES.FROM_SIDE = 10_000
    cfg.INPUT.TILES.SIZE = 1024
    cfg.INPUT.TILES.OVERLAP = 0.25
    # Memory in MiB for logits at an image's own size: they are made and dropped in bands of rows.
    cfg.TEST.BAND_MEMORY = 256

    # ---- solver: SGD, 0.9, 5e-4, poly 0.9 ------------------------------------------------------------------
    # SGD (the papers), or AdamW (ours: for a student from random weights).
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.WEIGHT_DECAY = 5e-4
    # Detectron2 would spare the norm layers; the papers do not.
    cfg.SOLVER.WEIGHT_DECAY_NORM = 5e-4
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None  # as the weights: Detectron2's default from 0.6 on
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"
    cfg.SOLVER.POLY_POWER = 0.9
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 12

    # SOLVER.AMP.ENABLED runs the training's forward pass under autocast in this precision, the frozen image tower too
    # unless MODEL.CLIP.AUTOCAST names another. Losses, soft-max, noise and the decoder's norm stay in float32. The
    # gradients of float16 are scaled; on the CPU bfloat16 takes its place. Evaluation is in float32.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Parts that a batch of IMS_PER_BATCH images is split into to save memory; their gradients add up to one optimizer
    # step. Iterations, learning rate and sampling stay as they are; batch norm sees a part at a time.
    cfg.SOLVER.ACCUMULATE_STEPS = 1

    # ---- test --------------------------------------------------------------------------------------------
    cfg.TEST.SLIDING_WINDOW = CfgNode()
    # Predict in overlapping windows and average the logits, instead of the whole image at once.
    cfg.TEST.SLIDING_WINDOW.ENABLED = False
    # Window and step in pixels of the resized image, (height, width).
    cfg.TEST.SLIDING_WINDOW.SIZE = [512, 512]
    cfg.TEST.SLIDING_WINDOW.STRIDE = [341, 341]
    # Give the evaluator label maps made by upsample_argmax instead of (C, H, W) logits: same labels, less work.
    cfg.TEST.LABEL_MAPS = True
    cfg.TEST.BIAS = CfgNode()
    # Measure the class-preference and the space-preference bias beside the mIoU (ReCLIP++, section IV-D).
    cfg.TEST.BIAS.ENABLED = False
    # Space preference: bins of the distance from the image's centre, in pixels (supplement 6.2).
    cfg.TEST.BIAS.BIN_WIDTH = 40
    # Space preference: objects of fewer pixels (specks at an occluder's edge) do not count.
    cfg.TEST.BIAS.MIN_OBJECT_AREA = 100
    # Space preference: bins of fewer objects are in the curve and not in the score.
    cfg.TEST.BIAS.MIN_BIN_OBJECTS = 20
