"""Edges and their overlap, by hand."""

import pytest
import torch

from mlcm_rl.equations.edges import edge_map, edge_overlap


def step(height: float, width: int = 8, at: int = 4) -> torch.Tensor:
    """A picture (1, 3, 6, width) that steps up by `height` in its green from column `at` on."""
    image = torch.zeros(1, 3, 6, width)
    image[:, 1, :, at:] = height
    return image


def columns(*indices: int, width: int = 8) -> torch.Tensor:
    edges = torch.zeros(1, 1, 6, width)
    edges[..., list(indices)] = 1.0
    return edges


def test_a_step_is_one_column_and_a_weak_one_is_none():
    """Sobel's filter gives a step its height, in the columns on both sides of it; the edge is the first."""
    assert torch.equal(edge_map(step(0.5)), columns(3))
    assert torch.equal(edge_map(step(0.5).transpose(2, 3)), columns(3).transpose(2, 3))
    assert torch.equal(edge_map(step(0.19)), columns())
    assert torch.equal(edge_map(step(0.19), threshold=0.1), columns(3))


def test_the_strongest_channel_counts_and_a_ramp_is_thinned_to_its_steepest():
    image = step(0.3) + step(0.9, at=6).roll(1, dims=1)
    image[:, 0, :, :] = 0.0
    assert torch.equal(edge_map(image), columns(3, 5))
    ramp = torch.zeros(1, 3, 6, 8)
    ramp[:] = torch.tensor([0.0, 0.0, 0.1, 0.4, 0.8, 0.9, 0.9, 0.9])  # differences over two columns: .1 .4 .7 .5 .1
    assert torch.equal(edge_map(ramp), columns(3))


def test_a_diagonal_step_is_thin_and_has_no_gap():
    image = (torch.arange(6)[:, None] < torch.arange(6)).float().expand(1, 3, -1, -1)
    edges = edge_map(image)[0, 0, 1:-1, 1:-1]
    assert set(edges.sum(dim=0).tolist()) | set(edges.sum(dim=1).tolist()) <= {1.0, 2.0}


def test_overlap_by_hand():
    """Of three columns one has a neighbour, of two columns one: precision 1/3, recall 1/2, F 0.4."""
    overlap = edge_overlap(columns(0, 4, 7, width=12), columns(1, 10, width=12))
    torch.testing.assert_close(overlap, torch.tensor([0.4]))
    torch.testing.assert_close(edge_overlap(columns(0), columns(2)), torch.tensor([0.0]))
    torch.testing.assert_close(edge_overlap(columns(0), columns(2), tolerance=2), torch.tensor([1.0]))


@pytest.mark.parametrize(("ours", "reference", "expected"), [((), (), 1.0), ((2,), (), 0.0), ((), (2,), 0.0)])
def test_pictures_without_edges(ours, reference, expected):
    assert edge_overlap(columns(*ours), columns(*reference)).item() == expected
