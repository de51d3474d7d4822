"""Batches of fixed views (``reclip_d2.modeling.view_batch``)."""

import torch
import torch.nn.functional as F

from reclip_d2.modeling.view_batch import batch_views, round_features


def test_padding_changes_nothing_inside_a_view():
    """The decoder's convolution on a padded batch equals that on each view alone, in the view."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(h, w, 3, generator=generator, dtype=torch.float32) for h, w in [(4, 7), (6, 5), (6, 7)]]
    weight = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float32)

    def convolve(batch: torch.Tensor, mode: str) -> torch.Tensor:
        return F.conv2d(F.pad(batch, [2] * 4, mode=mode), weight)

    for name, mode in (("replicate", "replicate"), ("zeros", "constant")):
        batch, _, grids = batch_views(views, [(64, 64)] * 3, torch.device("cpu"), name)
        assert grids == [(4, 7), (6, 5), (6, 7)] and batch.shape == (3, 3, 6, 7)
        for view, together in zip(views, convolve(batch, mode), strict=True):
            alone = convolve(view.permute(2, 0, 1)[None], mode)[0]
            torch.testing.assert_close(together[:, : view.shape[0], : view.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_views_of_one_grid_are_stacked():
    views = [torch.ones(2, 3, 4, dtype=torch.float16), torch.zeros(2, 3, 4, dtype=torch.float16)]
    batch = batch_views(views, [(32, 48), (30, 41)], torch.device("cpu"))
    assert batch.features.shape == (2, 4, 2, 3) and batch.features.dtype == torch.float32
    assert batch.features.permute(0, 2, 3, 1).is_contiguous()  # a patch's features lie in a row
    assert batch.grids is None and batch.image_sizes == [(32, 48), (30, 41)]
    larger = batch_views(views, [(32, 48)] * 2, torch.device("cpu"), smallest=(4, 2))
    assert larger.features.shape == (2, 4, 4, 3) and larger.grids == [(2, 3)] * 2
    assert (larger.features[0] == 1).all() and (larger.features[1] == 0).all()
    assert larger.features.permute(0, 2, 3, 1).is_contiguous()


def test_rounding_is_that_of_half_precision():
    exact = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_features(exact), exact.half().float()) and round_features(exact).dtype == torch.float32


def test_stored_features_under_autocast():
    """The store's float16 under bfloat16, as with SOLVER.AMP; also of several grids."""
    views = [torch.randn(h, 5, 3).half() for h in (4, 4, 6)]
    for chosen in (views[:2], views):
        expected = batch_views(chosen, [(64, 64)] * len(chosen), torch.device("cpu")).features
        with torch.autocast("cpu", torch.bfloat16):
            found = batch_views(chosen, [(64, 64)] * len(chosen), torch.device("cpu")).features
        assert found.dtype == torch.float32 and torch.equal(found, expected)
