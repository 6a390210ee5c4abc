"""Checks for NaN and infinity: only finite tensors are written, so that no later stage goes on from a broken one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LARGEST = {torch.float16: "65,504", torch.bfloat16: "3.4e38", torch.float32: "3.4e38"}


def is_finite(values: Tensor) -> bool:
    """Return whether `values` hold neither NaN nor infinity. They are not copied."""
    if not values.is_floating_point() or not values.numel():
        return True
    return bool(torch.stack(torch.aminmax(values.detach())).isfinite().all())  # with a NaN both are NaN


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first of `tensors` that holds NaN or infinity; None if all are finite."""
    return next((name for name, values in tensors.items() if not is_finite(values)), None)


def first_bad_row(values: Tensor) -> int | None:
    """Return the index of the first row of `values` (B, ...) that holds NaN or infinity; None if all are finite."""
    return None if is_finite(values) else next(place for place, row in enumerate(values) if not is_finite(row))


def refuse_weights(weights: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError if one of the `weights`, in the dtype to be written, holds NaN or infinity."""
    if (name := first_nonfinite(weights)) is not None:
        dtype = weights[name].dtype
        raise ValueError(
            f"{what}: {name} is not made of finite numbers in {_short(dtype)}, whose largest is {LARGEST[dtype]}: "
            "nothing was written. Training has diverged (lower learning_rate), or the weights need another precision"
        )


def refuse_of_others(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if one of the `weights`, of a file that somebody else made, is no matrix of finite numbers."""
    for name, values in weights.items():
        if not values.is_floating_point():
            raise ValueError(f"{where}: {name} is in {_short(values.dtype)}: only weights in floating point are read")
    wide = {name: values.float() if values.element_size() == 1 else values for name, values in weights.items()}
    if (bad := first_nonfinite(wide)) is not None:
        raise ValueError(
            f"{where}: {bad} is not made of finite numbers: the file is damaged, download or make it again"
        )


def refuse_encoded(conditioning: Mapping[str, Tensor], prompts: Sequence[str], dtype: torch.dtype) -> None:
    """Raise ValueError for the first of `prompts` (B) whose conditioning (B, ...) holds NaN or infinity."""
    for values in conditioning.values():
        if (place := first_bad_row(values)) is not None:
            raise ValueError(
                f"prompt {prompts[place]!r}: what the text encoders make of it is not finite in {_short(dtype)}; "
                f"{way_out(dtype)}"
            )


def way_out(dtype: torch.dtype) -> str:
    """Return the advice for a teacher that yields NaN or infinity in `dtype`."""
    damaged = "its weights are damaged, or are not a teacher's: fetch them again"
    if dtype == torch.float32:
        return f"the largest float32 is {LARGEST[dtype]}: {damaged}"
    precision = f"the largest {_short(dtype)} is {LARGEST[dtype]}: set teacher.dtype: float32"
    instead = " or bfloat16, which reaches 3.4e38 too" if dtype == torch.float16 else ""
    return f"{precision}{instead}. If it is the same there, {damaged}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
