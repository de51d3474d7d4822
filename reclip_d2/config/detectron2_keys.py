"""Rules for Detectron2's keys that keep Detectron2's defaults, if the package or the parts of Detectron2 it uses read
them. Keys with other defaults are in :mod:`reclip_d2.config.keys`.

Keys that only some versions of Detectron2 have are checked if they exist.
"""

from __future__ import annotations

from reclip_d2.config.rules import Choice, Device, Fields, Flag, Items, Number, Rule, Text, Whole

# Side of an image, in pixels.
SIDE = Whole(1, 65_536)
# Learning rates; the largest float32 is 3.4e38.
RATE = Number(minimum=0, maximum=1e38)
PERIOD = Whole(0)
CHANNELS = Whole(1, 65_536)

DETECTRON2_RULES: dict[str, Rule] = {
    "VERSION": Choice((2,)),
    "OUTPUT_DIR": Text(folder=True),
    # Processes add their rank to it, and NumPy accepts 32 bits.
    "SEED": Whole(0, also=-1),
    "CUDNN_BENCHMARK": Flag(),
    "VIS_PERIOD": PERIOD,
    "FLOAT32_PRECISION": Choice(("", "highest", "high", "medium")),
    # ---- model ------------------------------------------------------------------------------------------------
    "MODEL.DEVICE": Device(),
    "MODEL.META_ARCHITECTURE": Text(),
    "MODEL.WEIGHTS": Text(empty=True, path=True),
    # Box proposals are for other tasks.
    "MODEL.LOAD_PROPOSALS": Choice((False,)),
    "MODEL.BACKBONE.NAME": Text(),
    "MODEL.RESNETS.NUM_GROUPS": Whole(1, 1024),
    "MODEL.RESNETS.WIDTH_PER_GROUP": CHANNELS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": CHANNELS,
    # For Detectron2's own builder, which students can use, too.
    "MODEL.RESNETS.OUT_FEATURES": Items(Choice(("stem", "res2", "res3", "res4", "res5")), 1, 5),
    "MODEL.RESNETS.RES5_DILATION": Choice((1, 2)),
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": Items(Flag(), 4, 4),
    "MODEL.RESNETS.DEFORM_MODULATED": Flag(),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": Whole(1, 1024),
    # ---- input ------------------------------------------------------------------------------------------------
    # 0: the image's original size.
    "INPUT.MIN_SIZE_TRAIN": Items(Whole(0, 65_536), 1, 1000),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": Choice(("choice", "range")),
    "INPUT.MAX_SIZE_TRAIN": SIDE,
    "INPUT.MIN_SIZE_TEST": Whole(0, 65_536),
    "INPUT.MAX_SIZE_TEST": SIDE,
    "INPUT.RANDOM_FLIP": Choice(("none", "horizontal", "vertical")),
    "INPUT.CROP.ENABLED": Flag(),
    # ---- data -------------------------------------------------------------------------------------------------
    "DATASETS.TRAIN": Items(Text(), maximum=100),
    "DATASETS.TEST": Items(Text(), maximum=100),
    "DATALOADER.NUM_WORKERS": Whole(0, 1024),
    # ---- solver -----------------------------------------------------------------------------------------------
    "SOLVER.MAX_ITER": Whole(1),
    "SOLVER.BASE_LR_END": RATE,
    "SOLVER.NESTEROV": Flag(),
    "SOLVER.BIAS_LR_FACTOR": Number(minimum=0, maximum=1e6),
    "SOLVER.GAMMA": Number(above=0, maximum=1),
    "SOLVER.STEPS": Items(Whole(1), maximum=1000),
    "SOLVER.NUM_DECAYS": Whole(1, 1000),
    "SOLVER.RESCALE_INTERVAL": Flag(),
    "SOLVER.WARMUP_FACTOR": Number(minimum=0, maximum=1),
    "SOLVER.WARMUP_METHOD": Choice(("linear", "constant")),
    "SOLVER.CHECKPOINT_PERIOD": Whole(1),
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
