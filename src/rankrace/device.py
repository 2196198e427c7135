"""The device beside the host: work is queued on it, and a clock read too early bills it to what comes next."""

import torch
from torch import Tensor


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given; on a CPU everything is done already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The same on the device, without waiting for it: a copy out of pageable memory begins when the GPU has done all
    that is queued, and until then nobody would prepare the next step."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class OneAhead:
    """Lets the host prepare the next step while the device works, and no more than that: clocks stay right, and a
    Ctrl-C is not answered after steps that were only queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: torch.cuda.Event | None = None

    def queued(self) -> None:
        """A step's work is queued: waits for that of the step before."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        if self.before is not None:
            self.before.synchronize()
        self.before = event
