"""Vision-language models as Detectron2 backbones.

From an image to dense features Z: ``vision.embed_patches`` makes patch tokens with positions, all transformer blocks
but the last run unchanged, a dense attention (``MODEL.CLIP.DENSE_ATTENTION``) replaces the last one, and
``vision.project_dense`` projects its output to the joint embedding and normalises each patch to length 1. Models use
only the interface, :class:`~reclip_d2.backbones.interface.VisionLanguageBackbone`. ``vision`` is for ViTs of open_clip;
a ``towers.ImageTower`` hides whether the tower is one of these or, in ``timm_tower``, of timm.

To add an attention, put a file with a registered ``DenseAttention`` into ``dense_attention/``. To add a model, subclass
``VisionLanguageBackbone``, register it with ``BACKBONE_REGISTRY`` and name it in ``MODEL.BACKBONE.NAME``; ``dense.py``
is the one for CLIP.
"""

# The CLIP that ships with the package. Defined here so that reading it imports neither torch nor open_clip.
EMBEDDED_MODEL_NAME = "reclip-embedded"
