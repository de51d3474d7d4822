"""Every key of the project with its default, its meaning and the paper's symbol."""

from __future__ import annotations

from detectron2.config import CfgNode

# The keys that hold one of a few words.
CHOICES: dict[str, tuple[str, ...]] = {
    "MODEL.CLIP.AUTOCAST": ("float32", "bfloat16", "float16"),
    "MODEL.CLIP.IMAGE_ACTIVATION": ("own", "gelu"),
    "MODEL.MASKCLIP.CALIBRATION": ("none", "class", "position_class"),
    "MODEL.BIAS_HEAD.PROJECTION_INIT": ("default", "zero"),
    "MODEL.BIAS_HEAD.REFERENCE_NORM": ("row", "matrix"),
    "MODEL.BIAS_HEAD.RECTIFICATION": ("subtract", "add", "none"),
    "MODEL.MASK_DECODER.PADDING_MODE": ("replicate", "zeros"),
    "MODEL.MASK_DECODER.INIT": ("default", "identity"),
    "HYPOTHESIS.METHOD": ("crops", "image", "imported"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
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
    # Name in BIAS_HEAD_REGISTRY.
    cfg.MODEL.BIAS_HEAD.NAME = "ReCLIPPPBiasHead"
    # L, learnable vectors of the Reference prompt, Eq. (1); shortened where the longest class name needs room.
    cfg.MODEL.BIAS_HEAD.PROMPT_LENGTH = 73
    # Standard deviation of the vectors' initial values.
    cfg.MODEL.BIAS_HEAD.PROMPT_INIT_STD = 0.02
    # Projection of PE: "default" (PyTorch's), or "zero" (ours): start without a bias.
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

    # ---- rectified mask generation (section III-C) -----------------------------------------------------------
    cfg.MODEL.MASK_DECODER = CfgNode()
    # Without the decoder M_o = M (Table III).
    cfg.MODEL.MASK_DECODER.ENABLED = True
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

    # ---- inputs: CLIP's normalisation, the paper's augmentation ---------------------------------------------
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN = [122.7709, 116.7460, 104.0937]
    cfg.MODEL.PIXEL_STD = [68.5005, 66.6322, 70.3232]
    # Strength of brightness, contrast and saturation jitter in (0, 1); 0: off.
    cfg.INPUT.COLOR_JITTER = 0.0
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = [512, 512]

    # ---- solver: SGD, 0.9, 5e-4, poly 0.9 ------------------------------------------------------------------
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.WEIGHT_DECAY = 5e-4
    # Detectron2 would spare the norm layers; the papers do not.
    cfg.SOLVER.WEIGHT_DECAY_NORM = 5e-4
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"
    cfg.SOLVER.POLY_POWER = 0.9
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 12

    # ---- test --------------------------------------------------------------------------------------------
    cfg.TEST.SLIDING_WINDOW = CfgNode()
    # Predict in overlapping windows and average the logits, instead of the whole image at once.
    cfg.TEST.SLIDING_WINDOW.ENABLED = False
    # Window and step in pixels of the resized image, (height, width).
    cfg.TEST.SLIDING_WINDOW.SIZE = [512, 512]
    cfg.TEST.SLIDING_WINDOW.STRIDE = [341, 341]
    # Give the evaluator label maps made by upsample_argmax instead of (C, H, W) logits: same labels, less work.
    cfg.TEST.LABEL_MAPS = True
