"""How fast are token embedding and feature insertion, compared with transformers and with a copy?

Peers: transformers' `masked_scatter`, plain torch by index, and the compiled definition. GB/s are the minimum
bytes of the task (each row read once and written once) divided by the time, so a candidate that moves more bytes
shows less; the ceiling is a large copy. Without a GPU, the kernel is not measured.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.harness import compare, device, measure
from benchmarks.peers import index_copy_insertion, transformers_insertion
from mmpack import reference
from mmpack.ops import accumulate_embedding_grad, embed_features

ON_GPU = torch.cuda.is_available()
VOCAB = 151_936 if ON_GPU else 8_192
IMAGE_TOKEN = VOCAB - 1
FEATURES_AN_IMAGE = 1024
COMPILED = torch.compile(reference.embed_features, dynamic=True)  # compiled on first call

CASES = [  # tokens, hidden size, share of image tokens
    *[(T, 3584, 0.7) for T in (2048, 8192, 32768, 65536)],
    *[(32768, D, 0.7) for D in (1536, 8192)],
    *[(32768, 3584, share) for share in (0.3, 0.95)],
]
CPU_CASES = [(2048, 1536, 0.7), (8192, 1536, 0.7), (8192, 1536, 0.3)]


class Case:
    """Inputs of one size, made before timing."""

    def __init__(self, T: int, D: int, share: float) -> None:
        rng = np.random.default_rng(0)
        dtype = torch.bfloat16
        num_images = max(1, round(T * share / FEATURES_AN_IMAGE))
        per_image = round(T * share / num_images)
        feature_index = np.full(T, -1, dtype=np.int32)
        gap = (T - num_images * per_image) // (num_images + 1)
        for image in range(num_images):  # images in a row, text between
            start = gap + image * (per_image + gap)
            feature_index[start : start + per_image] = np.arange(per_image) + image * per_image
        ids = rng.zipf(1.3, T) % (VOCAB - 1)  # word frequencies as in text
        ids[feature_index >= 0] = IMAGE_TOKEN
        text_order, text_id_offsets = reference.text_by_id(ids, feature_index)
        place = device()
        self.T, self.F, self.D = T, num_images * per_image, D
        self.num_ids = len(np.unique(ids[feature_index < 0]))
        self.input_ids = torch.from_numpy(ids).to(place)
        self.feature_index = torch.from_numpy(feature_index).to(place)
        self.indices = {
            "feature_token": torch.from_numpy(
                np.flatnonzero(feature_index >= 0).astype(np.int32)
            ).to(place),
            "feature_offsets": torch.arange(self.F + 1, dtype=torch.int32, device=place),
            "text_order": torch.from_numpy(text_order).to(place),
            "text_id_offsets": torch.from_numpy(text_id_offsets).to(place),
        }
        self.weight = torch.randn(VOCAB, D, device=place, dtype=dtype).requires_grad_()
        self.features = torch.randn(self.F, D, device=place, dtype=dtype).requires_grad_()
        self.images = list(self.features.split(per_image))
        self.dout = torch.randn(T, D, device=place, dtype=dtype)

    def forwards(self) -> dict:
        """The forward of each candidate."""
        token = self.indices["feature_token"]
        made = {
            "transformers": lambda: transformers_insertion(
                self.input_ids, self.weight, self.images, IMAGE_TOKEN
            ),
            "index_copy": lambda: index_copy_insertion(
                self.input_ids, self.weight, self.features, token
            ),
        }
        if ON_GPU:
            made["compiled reference"] = lambda: COMPILED(
                self.input_ids, self.feature_index, self.weight, self.features
            )
            made["mmpack"] = lambda: embed_features(
                self.input_ids, self.feature_index, self.weight, self.features, **self.indices
            )
        return made

    def backwards(self) -> dict:
        """The backward of each candidate, with a new gradient, after its forward."""
        made = {}
        for name, forward in self.forwards().items():
            out = forward()

            def backward(out=out):
                return torch.autograd.grad(
                    out, (self.weight, self.features), self.dout, retain_graph=True
                )

            made[name] = backward
        return made

    def accumulations(self) -> dict:
        """The backward into an existing gradient: with autograd, and ours, which only touches used rows."""
        grad = torch.zeros_like(self.weight)
        made = {}
        for name, backward in self.backwards().items():
            made[name] = lambda backward=backward: grad.add_(backward()[0])
        if ON_GPU:
            text = {name: self.indices[name] for name in ("text_order", "text_id_offsets")}
            token = self.indices["feature_token"].long()

            def accumulate():
                accumulate_embedding_grad(grad, self.dout, self.input_ids, **text)
                return self.dout.index_select(0, token)

            made["mmpack accumulating"] = accumulate
        return made

    def bytes(self, mode: str) -> int:
        """The minimum bytes of the task, for two-byte elements."""
        rows = {
            "forward": 2 * self.T,
            "backward": self.T + self.F + self.num_ids + VOCAB,
            "accumulate": self.T + self.F + 2 * self.num_ids,
        }
        return 2 * self.D * rows[mode]


@pytest.mark.cpu
@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward", "backward", "accumulate"])
@pytest.mark.parametrize(("T", "D", "share"), CASES if ON_GPU else CPU_CASES)
def test_insertion(mode, T, D, share, benchmark, recorder, copy_ceiling, quick):
    if quick and (T, D, share) not in ((2048, 1536, 0.7), (32768, 3584, 0.7)):
        pytest.skip("not among the quick cases")
    case = Case(T, D, share)
    makers = {
        "forward": case.forwards,
        "backward": case.backwards,
        "accumulate": case.accumulations,
    }
    candidates = makers[mode]()
    config = f"T={T} D={D} share={share} bf16"
    medians = measure(
        recorder,
        "embed_features",
        mode,
        candidates,
        x=("T", T),
        config=config,
        rate=("bandwidth", "GB/s", case.bytes(mode)),
        rounds=3 if quick else 20 if ON_GPU else 5,
        ceiling=copy_ceiling,
    )
    ours = next(name for name in ("mmpack accumulating", "mmpack", "index_copy") if name in medians)
    compare(benchmark, medians, ours, case=config)
    benchmark.pedantic(candidates[ours], rounds=3, warmup_rounds=1)
