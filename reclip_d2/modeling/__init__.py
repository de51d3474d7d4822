"""Models. Importing this package registers backbone, bias heads and meta-architectures with Detectron2."""

from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY, BiasHead, ReCLIPPPBiasHead
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.meta_arch.distillation import Distillation
from reclip_d2.modeling.meta_arch.mask_folder import MaskFolder
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP
from reclip_d2.modeling.meta_arch.student import Student
from reclip_d2.modeling.reclip_bias_head import ReCLIPBiasHead
from reclip_d2.modeling.student.network import build_dilated_resnet_backbone

__all__ = [
    "BIAS_HEAD_REGISTRY",
    "BiasHead",
    "DenseCLIP",
    "Distillation",
    "MaskCLIP",
    "MaskDecoder",
    "MaskFolder",
    "ReCLIPBiasHead",
    "ReCLIPPPBiasHead",
    "RectifiedCLIP",
    "Student",
    "build_dilated_resnet_backbone",
]
