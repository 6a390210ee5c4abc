"""Batches of encoded prompts whose prompts differ in length."""

import torch

from mlcm_rl.models.conditioning import concatenated, in_dtype, rows_of, stacked

ROWS = [
    {"context": torch.full((length, 3), float(length)), "lengths": torch.tensor(length), "pooled": torch.ones(2)}
    for length in (2, 4, 1)
]


def equal(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_rows_are_padded_with_zeros_to_the_longest_and_come_back_as_they_were():
    batch = stacked(ROWS)
    assert batch["context"].shape == (3, 4, 3)
    assert batch["context"][0, 2:].eq(0).all()
    assert all(map(equal, rows_of(batch), ROWS))


def test_batches_of_other_lengths_are_joined():
    joined = concatenated([stacked(ROWS[:1]), stacked(ROWS[1:])])
    assert equal(joined, stacked(ROWS))
    assert equal(concatenated([stacked(ROWS[1:]), stacked(ROWS[:1])]), stacked([*ROWS[1:], ROWS[0]]))


def test_without_lengths_every_token_is_the_prompts():
    batch = {"context": torch.arange(12.0).reshape(2, 3, 2)}
    assert [row["context"].shape for row in rows_of(batch)] == [(3, 2), (3, 2)]
    assert equal(stacked(rows_of(batch)), batch)
    assert concatenated([batch, batch])["context"].shape == (4, 3, 2)


def test_lengths_stay_whole_numbers_in_any_precision():
    half = in_dtype(stacked(ROWS), torch.float16)
    assert (half["context"].dtype, half["lengths"].dtype) == (torch.float16, torch.int64)
