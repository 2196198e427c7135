"""The device beside the host: work is queued on it, and a clock read too early bills it to what comes next."""

import torch


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given; on a CPU everything is done already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
