"""Synchronised batch norm where PyTorch has none, and one process's statistics for all."""

from __future__ import annotations

import logging

import torch
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import nn

logger = logging.getLogger(__name__)


def synchronize_on_cpu(model: nn.Module) -> nn.Module:
    """Let the ``SyncBN`` layers of a CPU model work in several processes; all else is left as it is.

    PyTorch's ``SyncBatchNorm`` refuses CPU input as soon as processes are connected; Detectron2's
    ``NaiveSyncBatchNorm`` takes it, and has the same parameters and buffers. Its statistics are those of the whole
    batch when all processes have equally many images of one size; its running variance is the biased one. In a single
    process PyTorch's layer is plain batch norm, on every device, and stays.

    Args:
        model: changed in place.
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
        logger.info("SyncBN on the CPU: Detectron2's naiveSyncBN serves in %d layers", replaced)
    return model


def broadcast_statistics(model: nn.Module) -> None:
    """Give all processes the running statistics of the main process's batch norms, those that a checkpoint holds.

    Each process gathers its own from its share of the images; a test that is shared by the processes is of one model
    only if they agree. Alone there is nothing to do.
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
