"""ReCLIP and ReCLIP++ as a Detectron2 project: language-guided unsupervised semantic segmentation.

Importing the package alone loads neither torch nor Detectron2. ``reclip_d2.modeling`` registers the backbone and the
meta-architectures with Detectron2, ``reclip_d2.data.datasets`` the data sets.
"""

from reclip_d2.utils.library_messages import silence_library_messages

__version__ = "0.1.0"

silence_library_messages()
