"""Vision-language models as Detectron2 backbones.

An image becomes dense features Z so: ``vision.embed_patches`` cuts it into patch tokens with positions, all transformer
blocks but the last run as they are, a dense attention (``MODEL.CLIP.DENSE_ATTENTION``) takes the last one's place, and
``vision.project_dense`` takes its output to the joint embedding, each patch of length 1. Models see none of this: they
ask :class:`~reclip_d2.backbones.interface.VisionLanguageBackbone`.

To add an attention, put a file with a registered ``DenseAttention`` into ``dense_attention/``. To add a model, subclass
``VisionLanguageBackbone``, register it with ``BACKBONE_REGISTRY`` and name it in ``MODEL.BACKBONE.NAME``; ``dense.py``,
CLIP's, is an example.
"""

# The CLIP that ships with the package. Defined here so that reading it imports neither torch nor open_clip.
EMBEDDED_MODEL_NAME = "reclip-embedded"
