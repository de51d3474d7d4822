"""SyncBN on the CPU: plain batch norm in one process, Detectron2's naiveSyncBN in several."""

import pytest
import torch
from detectron2.layers import get_norm
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from reclip_d2.engine.sync_batch_norm import broadcast_statistics, synchronize_on_cpu
from tests.helpers import make_rectified
from tests.processes import run_processes


def make_layers(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), get_norm(norm, 4), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1)))
    return layers.double().train()


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1


def loss_of(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.square().mean((1, 2, 3)).mean()


def test_in_one_process_it_is_plain_batch_norm():
    sync, plain = synchronize_on_cpu(make_layers("SyncBN")), make_layers("BN")
    assert type(sync[1]) is nn.SyncBatchNorm
    for model in (sync, plain):
        loss_of(model(images())).backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(sync.state_dict()[name], value), name
    assert torch.equal(sync[0].weight.grad, plain[0].weight.grad)


def test_a_decoder_with_synchronised_norm_trains_on_the_cpu():
    model = make_rectified(decoder={"norm": "SyncBN"})
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    sum(model([{"image": image, "hypothesis": torch.tensor([0, 2])}]).values()).backward()
    assert model.mask_decoder.norm.running_mean.abs().max() > 0
    model.load_state_dict(make_rectified(decoder={"norm": "BN"}).state_dict())  # their checkpoints are alike


def train_half(rank, folder):
    """Worker: forward and backward of half of the images."""
    half = images().chunk(2)[rank]
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        make_layers("SyncBN")(half)
    layers = make_layers("SyncBN")
    layers[1].eval()
    model = synchronize_on_cpu(layers)
    assert isinstance(model[1], NaiveSyncBatchNorm) and not model[1].training
    assert type(synchronize_on_cpu(make_layers("BN"))[1]) is type(make_layers("BN")[1])
    parallel = DistributedDataParallel(model.train(), broadcast_buffers=False)
    outputs = parallel(half)
    loss_of(outputs).backward()
    torch.save(
        {"outputs": outputs.detach(), "state": model.state_dict(), "grads": [p.grad for p in model.parameters()]},
        folder / f"{rank}.pt",
    )


def test_in_two_processes_the_statistics_are_those_of_the_whole_batch(tmp_path):
    run_processes(train_half, tmp_path)
    whole = make_layers("BN")
    before = whole(images())  # one forward pass: running statistics have moved once
    loss_of(before).backward()
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([half["outputs"] for half in halves]), before.detach(), rtol=1e-9, atol=1e-12)
    activations = whole[0](images())
    biased = 0.9 + 0.1 * activations.var((0, 2, 3), unbiased=False)
    for half in halves:
        torch.testing.assert_close(half["state"]["1.running_mean"], whole[1].running_mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(half["state"]["1.running_var"], biased, rtol=1e-9, atol=1e-12)
        for found, parameter in zip(half["grads"], whole.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-8, atol=1e-11)


def test_the_main_processes_statistics_for_all(tmp_path):
    layers = make_layers("BN")
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    broadcast_statistics(layers)  # alone: nothing happens
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    run_processes(share_statistics, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in (0, 1))
    half = images().chunk(2)[0]
    layers(half)  # process 0's own
    for name, value in layers[1].state_dict().items():
        assert torch.equal(first[name], value) and torch.equal(second[name], value), name


def share_statistics(rank, folder):
    """Worker: statistics of its half, then those of the main process."""
    layers = make_layers("BN")
    layers(images().chunk(2)[rank])
    broadcast_statistics(layers)
    torch.save(layers[1].state_dict(), folder / f"{rank}.pth")
