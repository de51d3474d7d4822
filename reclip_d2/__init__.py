"""ReCLIP and ReCLIP++ as a Detectron2 project: language-guided unsupervised semantic segmentation.

Importing the package registers its data sets, backbone and meta-architectures with Detectron2.
"""

__version__ = "0.1.0"
