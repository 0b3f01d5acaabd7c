"""Two of seven windows belong to injured patients; counts below are worked out by hand from that."""

from __future__ import annotations

from collections import Counter

import pytest
from monai.data import CacheDataset, DataLoader, Dataset

from trauma_monai.samplers import BalancedSampler

HEALTHY = {"label": {"liver_low": 0, "bowel_injury": 0}}
INJURED = {"label": {"liver_low": 0, "bowel_injury": 1}}
WINDOWS = [HEALTHY, INJURED, HEALTHY, HEALTHY, INJURED, HEALTHY, HEALTHY]
INJURED_INDICES = {1, 4}


def test_an_epoch_is_every_injured_window_once_and_as_many_others():
    epoch = list(BalancedSampler(WINDOWS))
    assert len(epoch) == 4
    assert sorted(index for index in epoch if index in INJURED_INDICES) == [1, 4]
    assert len(BalancedSampler(WINDOWS)) == 4


def test_others_are_drawn_with_replacement():
    windows = [INJURED] * 5 + [HEALTHY]
    assert Counter(BalancedSampler(windows)) == Counter([0, 1, 2, 3, 4, 5, 5, 5, 5, 5])


def test_each_epoch_draws_anew_and_a_seed_repeats_it():
    windows = [INJURED] * 10 + [HEALTHY] * 90
    sampler = BalancedSampler(windows, seed=5)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert set(first) != set(second)
    sampler.set_epoch(0)
    assert list(sampler) == first == list(BalancedSampler(windows, seed=5))
    assert list(BalancedSampler(windows, seed=6)) != first


def test_injured_and_others_are_mixed():
    epoch = list(BalancedSampler([INJURED] * 50 + [HEALTHY] * 50))
    assert 10 < sum(index < 50 for index in epoch[:50]) < 40


def test_two_ranks_share_one_epoch():
    whole = list(BalancedSampler(WINDOWS, num_replicas=1, rank=0, seed=2))
    shares = [list(BalancedSampler(WINDOWS, num_replicas=2, rank=rank, seed=2)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2]
    assert [index for pair in zip(*shares, strict=True) for index in pair] == whole


def test_shares_of_three_ranks_are_equally_long_though_four_do_not_divide():
    shares = [list(BalancedSampler(WINDOWS, num_replicas=3, rank=rank)) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert {1, 4} <= {index for share in shares for index in share}


def test_more_ranks_than_twice_the_epoch_still_get_a_window_each():
    shares = [list(BalancedSampler([INJURED, HEALTHY], num_replicas=5, rank=rank)) for rank in range(5)]
    assert [len(share) for share in shares] == [1] * 5


def test_where_all_are_injured_each_window_is_shown_once():
    assert sorted(BalancedSampler([INJURED] * 3)) == [0, 1, 2]


def test_where_none_is_injured_it_refuses():
    with pytest.raises(ValueError, match="none of 2 windows belongs to an injured patient"):
        BalancedSampler([HEALTHY] * 2)


def test_an_item_without_label_is_named():
    with pytest.raises(KeyError, match="no 'label'"):
        BalancedSampler([{"image": "a.nii"}])


@pytest.mark.parametrize("dataset_class", [Dataset, CacheDataset])
def test_labels_are_those_of_the_items_not_of_the_transformed_samples(dataset_class):
    dataset = dataset_class(WINDOWS, transform=lambda item: item["label"]["bowel_injury"])
    shown = [int(batch) for batch in DataLoader(dataset, sampler=BalancedSampler(dataset), batch_size=1)]
    assert sum(shown) == 2
    assert len(shown) == 4
