"""Positional embeddings on any grid, and what is kept of them."""

import copy

import pytest
import torch

from reclip_d2.backbones import positions
from reclip_d2.backbones.positions import MOST_GRIDS, positions_on_grid, resize_positional_embedding
from tests.backbones.literal import literal_position_grid
from tests.helpers import tiny_clip, tiny_dense


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (3, 7)), ((2, 5), (6, 3)), ((3, 2), (1, 1)), ((4, 4), (8, 8))])
def test_positional_embedding_is_resized_as_torch_does(grid, size):
    embedding = torch.randn(1 + grid[0] * grid[1], 6, dtype=torch.float64)
    resized = resize_positional_embedding(embedding, grid, size)
    assert resized.shape == (1 + size[0] * size[1], 6)
    torch.testing.assert_close(resized, literal_position_grid(embedding, grid, size), rtol=0, atol=1e-12)
    assert torch.equal(resized[0], embedding[0])


def test_positional_embedding_of_the_native_grid_is_untouched():
    embedding = torch.randn(1 + 6, 4)
    assert resize_positional_embedding(embedding, (2, 3), (2, 3)) is embedding


def test_transposed_grid_is_resized_though_the_number_of_patches_is_the_same():
    embedding = torch.randn(1 + 6, 4, dtype=torch.float64)
    resized = resize_positional_embedding(embedding, (2, 3), (3, 2))
    torch.testing.assert_close(resized, literal_position_grid(embedding, (2, 3), (3, 2)))
    assert not torch.allclose(resized, embedding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positional_embedding_keeps_a_low_precision_dtype(dtype):
    embedding = torch.randn(1 + 9, 4)
    resized = resize_positional_embedding(embedding.to(dtype), (3, 3), (5, 4))
    assert resized.dtype == dtype
    torch.testing.assert_close(resized.float(), literal_position_grid(embedding, (3, 3), (5, 4)), rtol=0.05, atol=0.05)


# ---- kept embeddings ------------------------------------------------------------------------------------------


def expected(visual, size):
    return resize_positional_embedding(visual.positional_embedding.detach(), tuple(visual.grid_size), size)


@pytest.fixture
def visual():
    return tiny_clip().visual


def test_a_constant_embedding_is_resized_once(visual):
    with torch.inference_mode():
        first = positions_on_grid(visual, (3, 5))
    assert not first.is_inference()
    assert torch.equal(first, expected(visual, (3, 5)))
    assert positions_on_grid(visual, (3, 5)) is first
    assert positions_on_grid(visual, (4, 4)) is visual.positional_embedding  # the tower's own grid
    low = positions_on_grid(visual, (3, 5), torch.bfloat16)
    assert torch.equal(low, first.bfloat16()) and positions_on_grid(visual, (3, 5), torch.bfloat16) is low


def test_changes_are_noticed(visual):
    first = positions_on_grid(visual, (3, 5))
    other = copy.deepcopy(visual)
    assert positions_on_grid(other, (3, 5)) is not first
    with torch.no_grad():
        visual.positional_embedding.add_(1.0)
    torch.testing.assert_close(positions_on_grid(visual, (3, 5)), first + 1)
    visual.load_state_dict(other.state_dict())
    assert torch.equal(positions_on_grid(visual, (3, 5)), first)
    assert positions_on_grid(visual.double(), (3, 5)).dtype == torch.float64
    assert positions_on_grid(visual.to("meta"), (3, 5)).device.type == "meta"


def test_a_trained_embedding_is_not_kept(visual):
    visual.positional_embedding.requires_grad_(True)
    positions_on_grid(visual, (3, 5)).sum().backward()
    assert visual.positional_embedding.grad.abs().sum() > 0
    with torch.no_grad():
        assert positions_on_grid(visual, (3, 5)) is not positions_on_grid(visual, (3, 5))


def test_the_grids_used_last_are_kept(visual):
    first = positions_on_grid(visual, (1, 2))
    for width in range(1, 2 * MOST_GRIDS):
        positions_on_grid(visual, (3, width))
        assert positions_on_grid(visual, (1, 2)) is first
    assert len(positions._kept[visual].by_grid) == MOST_GRIDS


def test_a_graph_keeps_what_it_reads(monkeypatch):
    """Also when the weights change; and what is computed in a capture is not kept, since it has no values yet."""
    kept, source = positions._Kept(), torch.randn(1 + 4, 6)
    first = kept.get(source, (2, 2), (3, 5), source.dtype)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = source.as_subclass(type("OnGPU", (torch.Tensor,), {"is_cuda": True}))
    assert kept.get(on_gpu, (2, 2), (3, 5), source.dtype) is first
    kept.get(on_gpu, (2, 2), (4, 4), source.dtype)
    assert list(kept.by_grid) == [((3, 5), source.dtype)]
    source.add_(1)
    kept.get(source, (2, 2), (3, 5), source.dtype)
    assert list(kept.in_graphs.values()) == [first]


def test_the_backbone_reads_kept_embeddings(monkeypatch):
    dense, calls = tiny_dense(), []
    resize = positions.resize_positional_embedding
    monkeypatch.setattr(positions, "resize_positional_embedding", lambda *given: calls.append(given) or resize(*given))
    for _ in range(3):
        dense.dense(torch.randn(1, 3, 24, 40))
        dense.positional_embedding((3, 5))
    assert len(calls) == 1
