"""k-means without random numbers: the same centroids for every order, and those of well separated groups."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.centroids import centroids


def groups(count=3, size=20, width=4):
    torch.manual_seed(0)
    centres = 10 * torch.eye(width, dtype=torch.float64)[:count]
    return torch.cat([centre + 0.1 * torch.randn(size, width, dtype=torch.float64) for centre in centres])


def test_groups_are_found() -> None:
    x = groups()
    found = centroids(x, 3)
    means = torch.stack([part.mean(0) for part in x.split(20)])
    nearest = torch.cdist(means, found).argmin(1)
    assert sorted(nearest.tolist()) == [0, 1, 2]
    torch.testing.assert_close(found[nearest], means)


def test_order_does_not_matter() -> None:
    x = groups()
    for seed in range(5):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(centroids(x[order], 4), centroids(x, 4))


def test_repeated_vectors_count_as_often_as_they_are_given() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0], [10.0]])
    assert centroids(x, 2).flatten().sort().values.tolist() == [0.25, 10.0]


def test_fewer_vectors_than_centroids_repeat_one() -> None:
    found = centroids(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), 3)
    assert torch.equal(found, torch.tensor([[1.0, 2.0]] * 3, dtype=torch.float64))


def test_one_centroid_is_the_mean() -> None:
    x = groups()
    torch.testing.assert_close(centroids(x, 1)[0], x.mean(0))


def test_every_vector_stands_with_its_nearest_and_centroids_are_means() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = centroids(x, 6)
    nearest = torch.cdist(x, found).argmin(1)
    for place in range(6):
        torch.testing.assert_close(found[place], x[nearest == place].mean(0))


def test_nothing_and_not_finite_numbers_are_refused() -> None:
    for x in (torch.zeros(0, 3), torch.tensor([[float("nan")]])):
        with pytest.raises(IncompatibleError, match="expert 'a'"):
            centroids(x, 2, what="expert 'a'")
