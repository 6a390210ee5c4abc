"""A plugin of pytest, `-p second_device`: recipes that compute on the CPU compute on another device instead.

Which is the CPU too, but refuses what a GPU refuses: second_device.cpp. A process that has loaded it keeps it.
"""

from pathlib import Path
from types import ModuleType

import torch
from accelerate.state import PartialState
from torch.utils import cpp_extension

from mlcm_rl.training import devices

NAME = "second"


def compile_in(folder: Path) -> ModuleType:
    """Return the extension, which registers the device; compiled to `folder` unless it is there. A minute long."""
    source = Path(__file__).with_suffix(".cpp")
    return cpp_extension.load("second_device_extension", [source], extra_cflags=["-O1"], build_directory=folder)


def pytest_configure(config) -> None:
    compile_in(config.cache.mkdir("mlcm_rl-second-device"))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, module())
    torch.utils.generate_methods_for_privateuse1_backend()
    devices.device_of.__code__ = on_second_device.__code__  # which others have imported by name
    start = PartialState.__init__

    def started(self, cpu=False, **settings):
        start(self, cpu, **settings)
        if not cpu:
            self.device = torch.device(NAME, 0)

    PartialState.__init__ = started


def on_second_device(name):
    import torch

    return torch.device("second", 0)


def module() -> ModuleType:
    """What torch and its users ask of `torch.second`."""
    made = ModuleType(NAME)
    made.is_available = lambda: True
    made.device_count = lambda: 1
    made.current_device = lambda: 0
    made.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    made._is_in_bad_fork = lambda: False
    made.manual_seed_all = lambda seed: None
    return made
