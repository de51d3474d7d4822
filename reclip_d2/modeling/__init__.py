"""Models. Importing this package registers backbone, bias heads and meta-architectures with Detectron2."""

from reclip_d2.clip.dense import DenseCLIP
from reclip_d2.modeling.bias_head import BIAS_HEAD_REGISTRY, ReCLIPPPBiasHead
from reclip_d2.modeling.mask_decoder import MaskDecoder
from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP
from reclip_d2.modeling.meta_arch.rectified_clip import RectifiedCLIP

__all__ = ["BIAS_HEAD_REGISTRY", "DenseCLIP", "MaskCLIP", "MaskDecoder", "ReCLIPPPBiasHead", "RectifiedCLIP"]
