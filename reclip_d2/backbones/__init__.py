"""Vision-language models as Detectron2 backbones."""

# The CLIP that ships with the package. Defined here so that reading it imports neither torch nor open_clip.
EMBEDDED_MODEL_NAME = "reclip-embedded"
