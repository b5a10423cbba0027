"""Where a model takes its inputs, also when its weights are elsewhere until they are needed."""

import torch
from torch import nn

from lrqp_torch.errors import ModelError


def input_device(model: nn.Module) -> torch.device:
    """The device that a model's inputs belong on.

    That of its first weights. Where those are offloaded (``cpu_offload``, ``disk_offload`` and
    ``device_map`` of accelerate), it is the device on which they will be computed with.

    Raises:
        ModelError: the weights are on the meta device and nothing will fetch them.
    """
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            where = getattr(part, "execution_device", None)
            if where is not None:
                return torch.device(where)
    raise ModelError(
        f"the weights of {type(model).__name__} are on the meta device, where there are no values; "
        f"load them, or offload them with accelerate"
    )
