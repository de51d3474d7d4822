"""The name of the CLIP that ships with the package; no import of torch, for the arguments of commands."""

EMBEDDED_MODEL_NAME = "reclip-embedded"
