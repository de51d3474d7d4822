"""Synchronised batch norm on the CPU, and broadcasting of running statistics."""

from __future__ import annotations

import logging

import torch
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import nn

logger = logging.getLogger(__name__)


def synchronize_on_cpu(model: nn.Module) -> nn.Module:
    """Replace the ``SyncBN`` layers of a CPU model so that they work with several processes.

    PyTorch's ``SyncBatchNorm`` rejects CPU input in distributed training; Detectron2's ``NaiveSyncBatchNorm`` accepts
    it, and has the same parameters and buffers. Its statistics are those of the whole batch if all processes have the
    same number of images of the same size; its running variance is the biased one. In a single process nothing is
    replaced: PyTorch's layer is then plain batch norm on every device.

    Args:
        model: changed in place.

    Returns:
        the model.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return model
    replaced = 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.SyncBatchNorm) and all(b.device.type == "cpu" for b in layer.buffers()):
                setattr(parent, name, _naive(layer))
                replaced += 1
    if replaced:
        logger.info("SyncBN on the CPU: replaced %d layers by Detectron2's naiveSyncBN", replaced)
    return model


def broadcast_statistics(model: nn.Module) -> None:
    """Copy the running statistics of all batch norms from the main process, which are those of checkpoints.

    Each process has collected its own from its share of the images; without this, a distributed evaluation would
    evaluate different models. Does nothing in a single process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for statistic in layer.buffers(recurse=False):
                torch.distributed.broadcast(statistic, 0)


def _naive(layer: nn.SyncBatchNorm) -> NaiveSyncBatchNorm:
    """The same layer with the same tensors."""
    naive = NaiveSyncBatchNorm(
        layer.num_features,
        eps=layer.eps,
        momentum=layer.momentum,
        affine=layer.affine,
        track_running_stats=layer.track_running_stats,
    )
    naive.weight, naive.bias = layer.weight, layer.bias
    naive.running_mean, naive.running_var = layer.running_mean, layer.running_var
    naive.num_batches_tracked = layer.num_batches_tracked
    return naive.train(layer.training)
