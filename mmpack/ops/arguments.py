"""What the public ops check of their arguments, where more than one op does, and where kernels run."""

import functools

import torch
import triton


def check_indices(indices, device):
    """Indices the kernels can read, on a device they run on."""
    for name, tensor in indices.items():
        if tensor.dtype != torch.int32 or tensor.ndim != 1 or tensor.device != device:
            raise ValueError(
                f"{name} must be flat int32 on {device}, got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    check_device(device)


def check_device(device):
    """A device kernels run on."""
    if torch.compiler.is_compiling():  # the eager run has seen the device
        return
    if device.type not in ("cuda", "meta") and not triton.knobs.runtime.interpret:
        raise ValueError(f"the kernel needs a CUDA device, the tensors are on {device}")


def on_its_device(launches):
    """For what launches kernels: the device of its first argument is the current one meanwhile, for
    Triton launches on the current device wherever the tensors are. Nothing off CUDA."""

    @functools.wraps(launches)
    def run(first, *args, **kwargs):
        with torch.cuda.device_of(first):
            return launches(first, *args, **kwargs)

    return run
