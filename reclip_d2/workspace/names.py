"""Names that arguments offer and that take seconds to import where they are defined. A test compares the two."""

DEFAULT_CLIP, DEFAULT_PRETRAINED = "ViT-B-16-quickgelu", "openai"

# What a kind of model is called in messages.
TITLES = {"maskclip": "MaskCLIP", "rectified": "ReCLIP++, rectified", "student": "ReCLIP++, distilled student"}

# Keys of reclip_d2.export.export's FORMATS and INPUT_TYPES, and the default of its ExportOptions.tolerance.
EXPORT_FORMATS = ("onnx", "torchscript")
EXPORT_INPUT_TYPES = ("uint8", "float32")
EXPORT_TOLERANCE = 1e-3

# Of an image that `reclip app` takes: reclip_d2.app.limits.Limits.
APP_MEGAPIXELS, APP_MEGABYTES = 50, 64
