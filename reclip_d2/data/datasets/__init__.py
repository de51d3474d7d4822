"""Registration of the data sets: importing this package registers all of them."""

from reclip_d2.data.datasets import ade150, cityscapes19, coco_stuff, context59, embedded, voc20

__all__ = ["ade150", "cityscapes19", "coco_stuff", "context59", "embedded", "voc20"]
