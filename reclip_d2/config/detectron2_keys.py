"""Rules for Detectron2's keys that the package, or what it calls of Detectron2, reads.

A key that only some versions of Detectron2 have is checked where it exists.
"""

from __future__ import annotations

from reclip_d2.config.rules import Choice, Device, Fields, Flag, Items, Maybe, Number, Rule, Text, Whole

# Names of Detectron2's get_norm.
NORM = Choice(("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN"))
# Of an image, in pixels.
SIDE = Whole(1, 65_536)
PIXEL_MEAN = Items(Number(minimum=0, maximum=255), 3, 3)
PIXEL_STD = Items(Number(above=0, maximum=255), 3, 3)
# Learning rates; float32 ends at 3.4e38.
RATE = Number(minimum=0, maximum=1e38)
WEIGHT_DECAY = Number(minimum=0, maximum=1e6)
PERIOD = Whole(0)
CHANNELS = Whole(1, 65_536)

DETECTRON2_RULES: dict[str, Rule] = {
    "VERSION": Choice((2,)),
    "OUTPUT_DIR": Text(folder=True),
    # Processes add their number to it, and NumPy takes 32 bits.
    "SEED": Whole(0, also=-1),
    "CUDNN_BENCHMARK": Flag(),
    "VIS_PERIOD": PERIOD,
    "FLOAT32_PRECISION": Choice(("", "highest", "high", "medium")),
    # ---- model ------------------------------------------------------------------------------------------------
    "MODEL.DEVICE": Device(),
    "MODEL.META_ARCHITECTURE": Text(),
    "MODEL.WEIGHTS": Text(empty=True),
    "MODEL.PIXEL_MEAN": PIXEL_MEAN,
    "MODEL.PIXEL_STD": PIXEL_STD,
    # Proposals of boxes are of other tasks.
    "MODEL.LOAD_PROPOSALS": Choice((False,)),
    "MODEL.BACKBONE.NAME": Text(),
    "MODEL.BACKBONE.FREEZE_AT": Whole(0, 5),
    "MODEL.RESNETS.DEPTH": Choice((18, 34, 50, 101, 152)),
    "MODEL.RESNETS.NORM": NORM,
    "MODEL.RESNETS.NUM_GROUPS": Whole(1, 1024),
    "MODEL.RESNETS.WIDTH_PER_GROUP": CHANNELS,
    "MODEL.RESNETS.STRIDE_IN_1X1": Flag(),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": CHANNELS,
    # Of Detectron2's own builder, which a student may use too.
    "MODEL.RESNETS.OUT_FEATURES": Items(Choice(("stem", "res2", "res3", "res4", "res5")), 1, 5),
    "MODEL.RESNETS.RES5_DILATION": Choice((1, 2)),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": Items(Flag(), 4, 4),
    "MODEL.RESNETS.DEFORM_MODULATED": Flag(),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": Whole(1, 1024),
    # ---- input ------------------------------------------------------------------------------------------------
    "INPUT.FORMAT": Choice(("RGB",)),
    # 0: the image's own size.
    "INPUT.MIN_SIZE_TRAIN": Items(Whole(0, 65_536), 1, 1000),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": Choice(("choice", "range")),
    "INPUT.MAX_SIZE_TRAIN": SIDE,
    "INPUT.MIN_SIZE_TEST": Whole(0, 65_536),
    "INPUT.MAX_SIZE_TEST": SIDE,
    "INPUT.RANDOM_FLIP": Choice(("none", "horizontal", "vertical")),
    "INPUT.CROP.ENABLED": Flag(),
    "INPUT.CROP.TYPE": Choice(("absolute", "absolute_range", "relative", "relative_range")),
    "INPUT.CROP.SIZE": Items(Number(above=0, maximum=65_536), 2, 2),
    # ---- data -------------------------------------------------------------------------------------------------
    "DATASETS.TRAIN": Items(Text(), maximum=100),
    "DATASETS.TEST": Items(Text(), maximum=100),
    "DATALOADER.NUM_WORKERS": Whole(0, 1024),
    # ---- solver -----------------------------------------------------------------------------------------------
    "SOLVER.LR_SCHEDULER_NAME": Choice(
        ("WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
    ),
    "SOLVER.MAX_ITER": Whole(1),
    "SOLVER.BASE_LR": RATE,
    "SOLVER.BASE_LR_END": RATE,
    "SOLVER.MOMENTUM": Number(minimum=0, below=1),
    "SOLVER.NESTEROV": Flag(),
    "SOLVER.WEIGHT_DECAY": WEIGHT_DECAY,
    "SOLVER.WEIGHT_DECAY_NORM": Maybe(WEIGHT_DECAY),
    "SOLVER.WEIGHT_DECAY_BIAS": Maybe(WEIGHT_DECAY),
    "SOLVER.BIAS_LR_FACTOR": Number(minimum=0, maximum=1e6),
    "SOLVER.GAMMA": Number(above=0, maximum=1),
    "SOLVER.STEPS": Items(Whole(1), maximum=1000),
    "SOLVER.NUM_DECAYS": Whole(1, 1000),
    "SOLVER.RESCALE_INTERVAL": Flag(),
    "SOLVER.WARMUP_FACTOR": Number(minimum=0, maximum=1),
    "SOLVER.WARMUP_ITERS": Whole(0),
    "SOLVER.WARMUP_METHOD": Choice(("linear", "constant")),
    "SOLVER.CHECKPOINT_PERIOD": Whole(1),
    "SOLVER.IMS_PER_BATCH": Whole(1, 1_000_000),
    "SOLVER.REFERENCE_WORLD_SIZE": Whole(0, 1_000_000),
    "SOLVER.CLIP_GRADIENTS.ENABLED": Flag(),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": Choice(("value", "norm")),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": Number(above=0, maximum=1e38),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Number(above=0, infinite=True),
    "SOLVER.AMP.ENABLED": Flag(),
    # ---- test -------------------------------------------------------------------------------------------------
    "TEST.EVAL_PERIOD": PERIOD,
    "TEST.EXPECTED_RESULTS": Items(Fields((Text(), Text(), Number(), Number(minimum=0))), maximum=1000),
    "TEST.PRECISE_BN.ENABLED": Flag(),
    "TEST.PRECISE_BN.NUM_ITER": Whole(1),
}
