"""A teacher whose masks are files, for the distillation of any system."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY

from reclip_d2.modeling.meta_arch.maskclip import MaskCLIP


@META_ARCH_REGISTRY.register()
class MaskFolder(MaskCLIP):
    """Teacher with the masks of ``MODEL.TEACHER.MASKS`` (Eq. 8) and the features of CLIP (Eq. 9).

    With it, a student learns from the predictions of any system on unlabelled images, like the students ReCo+ and
    CLIPpy+ (supplement of ReCLIP++, Table 11). The masks come with the training samples, as ``pseudo_labels``: they
    pass through the image's augmentation (:class:`~reclip_d2.data.dataset_mapper.UnlabelledDatasetMapper`). CLIP's
    image encoder runs only if a loss needs its features. The student inherits the text features of the class names.
    """
