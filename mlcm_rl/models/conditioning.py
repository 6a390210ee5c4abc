"""Conditionings: batches of encoded prompts.

    B prompts   L tokens   D width of the context   P width of the pooled vector

A `Conditioning` is a dictionary of tensors with a batch dimension in front: "context" (B, L, D) float32 and, in some
families, more. Where prompts differ in length there is "lengths" (B,) int64: the first lengths[i] tokens of context[i]
are the prompt's and the rest are zeros, so that batches of other lengths can be joined, and stored trimmed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Conditioning = dict[str, Tensor]

CONTEXT, LENGTHS = "context", "lengths"


def on_device(conditioning: Conditioning, device: torch.device) -> Conditioning:
    """Return `conditioning` with its tensors on `device`."""
    return {name: value.to(device) for name, value in conditioning.items()}


def in_dtype(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """Return `conditioning` with its tensors in `dtype`, but for the lengths."""
    return {name: value if name == LENGTHS else value.to(dtype) for name, value in conditioning.items()}


def rows_of(conditioning: Conditioning) -> list[Conditioning]:
    """Return each prompt of a batch, without the batch dimension and without tokens that are not its own."""
    count = len(next(iter(conditioning.values())))
    rows = [{name: value[i] for name, value in conditioning.items()} for i in range(count)]
    if LENGTHS in conditioning:
        for row, length in zip(rows, conditioning[LENGTHS].tolist(), strict=True):
            row[CONTEXT] = row[CONTEXT][:length]
    return rows


def stacked(rows: Sequence[Conditioning]) -> Conditioning:
    """Return the batch of `rows`, each one prompt without a batch dimension; shorter contexts are padded with zeros."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    if LENGTHS in columns:
        columns[CONTEXT] = list(pad_sequence(columns[CONTEXT], batch_first=True))
    return {name: torch.stack(values) for name, values in columns.items()}


def concatenated(parts: Sequence[Conditioning]) -> Conditioning:
    """Return one batch of the batches `parts`; shorter contexts are padded with zeros."""
    columns = {name: [part[name] for part in parts] for name in parts[0]}
    if LENGTHS in columns:
        longest = max(value.shape[1] for value in columns[CONTEXT])
        columns[CONTEXT] = [_padded(value, longest) for value in columns[CONTEXT]]
    return {name: torch.cat(values) for name, values in columns.items()}


def mask_of(conditioning: Conditioning) -> Tensor:
    """Return which tokens (B, L) of a context are the prompts' own, as booleans."""
    context = conditioning[CONTEXT]
    return torch.arange(context.shape[1], device=context.device) < conditioning[LENGTHS][:, None]


def _padded(context: Tensor, length: int) -> Tensor:
    """Return `context` (B, L, D) with zeros up to `length` tokens."""
    return torch.nn.functional.pad(context, (0, 0, 0, length - context.shape[1]))
