"""Pictures of predictions and biases."""

from reclip_d2.visualization.labels import class_colors, colorize_labels, label_panel, training_panel

__all__ = ["class_colors", "colorize_labels", "label_panel", "training_panel"]
