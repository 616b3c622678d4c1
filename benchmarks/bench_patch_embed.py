"""How fast do pixels become vision hidden states: bytes in a folded product, or floats in a Conv3d?

Forward, and forward with the weight's gradient, from pixels on the device; and on a GPU the copy from pinned host
memory. Peers: transformers' Conv3d on floats, and the same floats in one linear product. GB/s count the minimum
bytes of the task: each patch's bytes read once, its hidden state written once (and read once in the backward); the
ceiling is a large copy.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import compare, device, measure
from benchmarks.peers import conv3d_patch_embed, linear_patch_embed
from mmpack import VisionSpec
from mmpack.data import images
from mmpack.ops import patch_embed

ON_GPU = torch.cuda.is_available()
CASES = [  # patches, patch side, hidden size: Qwen2-VL and Qwen3-VL
    *[(P, p, E) for p, E in ((14, 1280), (16, 1152)) for P in (4096, 32768)],
]
CPU_CASES = [(128, 14, 1280), (2048, 14, 1280), (2048, 16, 1152)]


class Case:
    """Inputs of one size, made before timing."""

    def __init__(self, P: int, p: int, E: int) -> None:
        spec = VisionSpec(min_pixels=1, max_pixels=1, patch_size=p)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (P, spec.patch_values), generator=generator).byte()
        pixel_values = torch.from_numpy(images.normalize_patches(pixels.numpy(), spec))
        place, dtype = device(), torch.bfloat16
        self.P, self.E, self.values = P, E, spec.patch_values
        self.host = {"uint8": pixels, "float32": pixel_values}
        if ON_GPU:
            self.host = {name: x.pin_memory() for name, x in self.host.items()}
        self.pixels, self.pixel_values = pixels.to(place), pixel_values.to(place)
        self.normalization = spec.image_mean, spec.image_std
        weight = torch.randn(E, 3, 2, p, p, generator=generator) * (2 * spec.patch_values) ** -0.5
        self.weight = weight.to(place, dtype).requires_grad_()
        self.dout = torch.randn(P, E, generator=generator).to(place, dtype)

    def forwards(self) -> dict:
        """The forward of each candidate."""

        def ours(impl):
            arguments = self.pixels, None, self.weight, None, *self.normalization
            return lambda: patch_embed(*arguments, impl=impl)

        made = {
            "transformers": lambda: conv3d_patch_embed(self.pixel_values, self.weight),
            "linear": lambda: linear_patch_embed(self.pixel_values, self.weight),
            "mmpack": ours("torch"),
        }
        return made | ({"mmpack, cast_patches": ours("triton")} if ON_GPU else {})

    def steps(self) -> dict:
        """The forward and backward of each candidate."""

        def step(forward):
            return torch.autograd.grad(forward(), self.weight, self.dout)

        return {
            name: lambda forward=forward: step(forward) for name, forward in self.forwards().items()
        }

    def copies(self) -> dict:
        """Copies from host to device, by pixel format."""
        place = device()
        return {
            "transformers": lambda: self.host["float32"].to(place, non_blocking=True),
            "mmpack": lambda: self.host["uint8"].to(place, non_blocking=True),
        }

    def bytes(self, mode: str) -> int:
        """The minimum bytes of the task."""
        hidden = 2 * self.E
        per_patch = {
            "forward": self.values + hidden,
            "forward and backward": 2 * (self.values + hidden),
            "to the device": self.values,
        }
        return self.P * per_patch[mode]


MODES = ["forward", "forward and backward", *(["to the device"] if ON_GPU else [])]


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("P", "p", "E"), CASES if ON_GPU else CPU_CASES)
def test_patch_embed(mode, P, p, E, benchmark, recorder, copy_ceiling, quick):
    if quick and (P not in (128, 32768) or p == 16):
        pytest.skip("not among the quick cases")
    case = Case(P, p, E)
    makers = {
        "forward": case.forwards,
        "forward and backward": case.steps,
        "to the device": case.copies,
    }
    candidates = makers[mode]()
    config = f"P={P} p={p} E={E} bf16"
    medians = measure(
        recorder,
        "patch_embed",
        mode,
        candidates,
        x=("P", P),
        config=config,
        rate=("bandwidth", "GB/s", case.bytes(mode)),
        rounds=20 if ON_GPU and not quick else 5,
        ceiling=copy_ceiling if mode != "to the device" else None,
    )
    for name in medians:
        sent = case.host["uint8" if name.startswith("mmpack") else "float32"].nbytes
        recorder.add(
            "patch_embed", name, mode, metric="to the device", unit="B", values=[sent],
            x=("P", P), config=config,
        )  # fmt: skip
    compare(benchmark, medians, "mmpack", case=config)
    benchmark.pedantic(candidates["mmpack"], rounds=3, warmup_rounds=1)
