"""Linear attention within segments: the forward bound on Gated DeltaNets (Qwen3.5).

A Gated DeltaNet sees earlier tokens through a causal convolution and through a state that every token updates. It
knows no positions, so only the calls themselves can keep segments apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmpack.hf.compat import has_linear_kernels, linear_keywords
from mmpack.hf.mmpack_dict import MmpackDict


def linear_forward(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward to bind on a Gated DeltaNet, given its class's forward `stock`.

    With a pack, stock is called once per segment, which is exact on every device. On CUDA with
    flash-linear-attention and causal-conv1d installed, it is called once, with the keywords by which their kernels
    begin each segment anew (not measured).
    """

    def forward(
        self: Any, hidden_states: torch.Tensor, mmpack: MmpackDict | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if mmpack is None:
            return stock(self, hidden_states, **kwargs)
        offsets = mmpack["offsets"]
        if mmpack["impl"] != "reference" and hidden_states.is_cuda and has_linear_kernels():
            on_host = torch.tensor(offsets, dtype=torch.int32)  # or the device would be asked
            return stock(self, hidden_states, **linear_keywords(mmpack), cu_seqlens_cpu=on_host)
        lengths = [end - start for start, end in zip(offsets, offsets[1:])]
        parts = hidden_states.split(lengths, dim=1)
        return torch.cat([stock(self, part) for part in parts], dim=1)

    return forward
