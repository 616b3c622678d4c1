"""Argument checks shared by several ops, and the device on which kernels are launched."""

import functools

import torch
import triton


def check_indices(indices, device):
    """Check that indices are flat int32 on a device that runs kernels."""
    for name, tensor in indices.items():
        if tensor.dtype != torch.int32 or tensor.ndim != 1 or tensor.device != device:
            raise ValueError(
                f"{name} must be flat int32 on {device}, got {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}"
            )
    check_device(device)


def check_device(device):
    """Check that a device runs kernels."""
    if torch.compiler.is_compiling():  # checked in eager mode
        return
    if not runs_kernels(device.type):
        raise ValueError(f"the kernel needs a CUDA device, the tensors are on {device}")
    if device.type == "cuda" and not torch.version.hip:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError(
                "the kernel needs a GPU of compute capability 8.0 or newer, {} has {}.{}".format(
                    device, *capability
                )
            )


def runs_kernels(device):
    """Whether kernels run on tensors of this type of device, such as "cuda"."""
    return device in ("cuda", "meta") or triton.knobs.runtime.interpret


def on_its_device(launches):
    """Decorate a function that launches kernels, so that its first argument's device is the current one: Triton
    launches on the current device, wherever the tensors are. Has no effect without CUDA."""

    @functools.wraps(launches)
    def run(first, *args, **kwargs):
        with torch.cuda.device_of(first):
            return launches(first, *args, **kwargs)

    return run
