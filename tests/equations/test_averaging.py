import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlcm_rl.equations.averaging import ema_decay, ema_update_


def test_decay_by_hand():
    assert ema_decay(0, 0.999) == 0.1
    assert ema_decay(8, 0.999) == 0.5
    assert ema_decay(90, 0.999) == 0.91
    assert ema_decay(10**6, 0.999) == 0.999
    assert ema_decay(0, 0.0) == 0.0


def test_average_by_hand():
    mean, value = [torch.tensor([1.0, 0.0]), torch.tensor(10.0)], [torch.tensor([2.0, 4.0]), torch.tensor(20.0)]
    ema_update_(mean, value, 0.75)
    assert mean[0].tolist() == [1.25, 1.0]
    assert mean[1].item() == 12.5
    assert value[0].tolist() == [2.0, 4.0]


def test_no_decay_copies_and_full_decay_keeps():
    mean = [torch.tensor([1 / 3])]
    ema_update_(mean, [torch.tensor([0.1])], 1.0)
    assert mean[0].item() == torch.tensor(1 / 3).item()
    ema_update_(mean, [torch.tensor([0.1])], 0.0)
    assert mean[0].item() == torch.tensor(0.1).item()


def test_averages_are_taken_in_the_averages_precision():
    """A bfloat16 student moves a float32 average by steps that bfloat16 could not hold."""
    mean = [torch.ones(1)]
    ema_update_(mean, [torch.tensor([1.5], dtype=torch.bfloat16)], 0.9999)
    torch.testing.assert_close(mean[0], torch.tensor([1.00005]), atol=1e-7, rtol=0)


def test_the_average_is_a_weighted_sum_of_the_past():
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = [torch.zeros((), dtype=torch.float64)]
    for value in values:
        ema_update_(mean, [value], 0.8)
    weights = 0.2 * 0.8 ** torch.arange(19, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(mean[0], (weights * values).sum())


def test_averaging_leaves_no_graph_and_refuses_unequal_lists():
    parameter = torch.nn.Parameter(torch.ones(2))
    mean = torch.nn.Parameter(torch.zeros(2))
    ema_update_([mean], [parameter], 0.5)
    assert mean.tolist() == [0.5, 0.5]
    assert mean.grad_fn is None
    with pytest.raises(ValueError, match=r"shorter|longer"):
        ema_update_([mean], [parameter, parameter], 0.5)


class Operations(TorchDispatchMode):
    """The names of the operations that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.name())
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.95, 0.9999, 1.0])
def test_all_parameters_are_averaged_in_one_call_to_the_bits_of_one_by_one(decay):
    draws = torch.Generator().manual_seed(0)
    means, values = ([torch.randn(7, size, generator=draws) for size in (1, 33, 1000)] for _ in range(2))
    expected = [mean.clone().lerp_(value, 1.0 - decay) for mean, value in zip(means, values, strict=True)]
    with Operations() as dispatched:
        ema_update_(means, values, decay)
    assert all(torch.equal(mean, one) for mean, one in zip(means, expected, strict=True))
    assert [name for name in dispatched.names if "lerp" in name] == ["aten::_foreach_lerp_.Scalar"]
