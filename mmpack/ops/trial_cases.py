"""The ops that `mmpack tune` runs: their inputs, their implementations, and what each returns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpack import reference
from mmpack.ops.op_trials import OURS, OpTrial, Tensors
from mmpack.ops.tuning import ShapeClass
from mmpack.ops.varlen_attention import auto_impl, candidates, varlen_attention

# Segments to time: eight quantiles of 155,556 real supervised rows in tokens, and seven of their 57,031 images in
# patches, from benchmarks.bench_varlen_attention.
TEXT_ROWS = (36, 55, 82, 118, 181, 268, 513, 1703)
IMAGE_ROWS = (196, 224, 312, 576, 840, 1296, 3996)
SMALL_VOCABULARY = 4000  # of checks, so that errors are per row; the head cuts it into two chunks
PATCHES_PER_TOKEN = 2  # half of a pack's tokens are images', of four patches each


class AttentionTrial(OpTrial):
    """`varlen_attention`: sizes H, Hk, K, causal; window > 0 means that all segments have so many rows."""

    plain = "sdpa"
    by_row = ("q", "k", "v", "dout", "out", "dq", "dk", "dv")

    def __init__(self, shape: ShapeClass, tokens: int, device: torch.device) -> None:
        sizes = dict(shape.sizes)
        dtype = getattr(torch, shape.dtype)
        one_row = torch.empty(
            1, sizes["H"], sizes["K"], dtype=dtype, device=device, requires_grad=True
        )
        self.default, self._candidates = auto_impl(one_row), candidates(one_row)
        super().__init__(shape, tokens, device)

    def candidates(self) -> Sequence[str]:
        return self._candidates

    def timed_lengths(self) -> list[int]:
        if self.sizes["causal"]:
            return _fill(TEXT_ROWS, self.tokens)
        rows = (self.sizes["window"],) if self.sizes["window"] else IMAGE_ROWS
        return _fill(rows, PATCHES_PER_TOKEN * self.tokens)

    def inputs(self, lengths: Sequence[int], is_timed: bool) -> Tensors:
        H, Hk, K, T = *(self.sizes[name] for name in ("H", "Hk", "K")), sum(lengths)
        offsets = np.cumsum([0, *lengths]).astype(np.int32)
        tiles = reference.attention_tiles(offsets, causal=bool(self.sizes["causal"]))
        return {
            **{name: self.random(T, heads, K) for name, heads in zip("qkv", (H, Hk, Hk))},
            "dout": self.random(T, H, K),
            "tiles": torch.from_numpy(tiles).to(self.device),
            "segment_ids": torch.from_numpy(reference.segment_ids(offsets)).to(self.device),
            "cu_seqlens": torch.from_numpy(offsets).to(self.device),
            "offsets": torch.from_numpy(offsets),  # on the host
        }

    def run(self, name: str, given: Tensors) -> Tensors:
        q, k, v = (given[one].detach().requires_grad_() for one in "qkv")
        offsets = given["offsets"].numpy()
        out = varlen_attention(
            q,
            k,
            v,
            given["cu_seqlens"],
            int(np.diff(offsets).max()),
            causal=bool(self.sizes["causal"]),
            scale=self.sizes["K"] ** -0.5,
            tiles=(given["tiles"], given["segment_ids"]),
            offsets=offsets,  # type: ignore[arg-type]  # numpy integers serve as ints
            impl=name,
        )
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), given["dout"])
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


class RotaryTrial(OpTrial):
    """`apply_mrope`: sizes H, Hk, K, sections S0, S1 and, for text, S2; interleaved."""

    by_row = ("q", "k", "dq_out", "dk_out", "q_out", "k_out", "dq", "dk")

    def _sections(self) -> list[int]:
        return [size for size in (self.sizes[f"S{n}"] for n in range(3)) if size]

    def timed_lengths(self) -> list[int]:
        is_text = len(self._sections()) == 3
        return [self.tokens] if is_text else [PATCHES_PER_TOKEN * self.tokens]

    def inputs(self, lengths: Sequence[int], is_timed: bool) -> Tensors:
        T, sections = sum(lengths), self._sections()
        H, Hk, K = (self.sizes[name] for name in ("H", "Hk", "K"))
        frequencies = sum(sections) if len(sections) == 3 else sections[0]
        powers = torch.arange(frequencies, device=self.device) / frequencies
        positions = torch.arange(T, device=self.device) % 1000
        # (rows of positions, T)
        shifted = torch.stack([(positions * (n + 1)) % 977 for n in range(len(sections))])
        heads = {"q": H, "k": Hk, "dq_out": H, "dk_out": Hk}
        given = {name: self.random(T, count, K) for name, count in heads.items()}
        given |= {"position_ids": shifted, "inv_freq": 1e4**-powers}
        given["angles"] = self._angles(shifted, given["inv_freq"])
        return given

    def _angles(self, positions: Tensor, inv_freq: Tensor) -> Tensor:
        sections = self._sections()
        axes = reference.rotary_axes(sections, bool(self.sizes["interleaved"]))
        repeated = inv_freq.repeat(len(axes) // len(inv_freq))
        return (positions[axes].T.float() * repeated)[:, None]  # (T, 1, frequencies)

    def run(self, name: str, given: Tensors) -> Tensors:
        q, k = (given[one].detach().requires_grad_() for one in "qk")
        if name == OURS:
            from mmpack.ops.mrope import apply_mrope

            outputs = apply_mrope(
                q,
                k,
                given["position_ids"],
                given["inv_freq"],
                tuple(self._sections()),
                interleaved=bool(self.sizes["interleaved"]),
            )
        else:
            outputs = self._as_transformers(q, k, given)
        gradients = torch.autograd.grad(outputs, (q, k), (given["dq_out"], given["dk_out"]))
        names = ("q_out", "k_out", "dq", "dk")
        return dict(zip(names, (*(x.detach() for x in outputs), *gradients)))

    def _as_transformers(self, q: Tensor, k: Tensor, given: Tensors) -> tuple[Tensor, Tensor]:
        """As transformers rotates: text in its dtype, a tower in float32. cos and sin are made once for all layers
        there, so only their use is timed."""
        is_text = len(self._sections()) == 3
        exact = q.dtype if is_text else torch.promote_types(q.dtype, torch.float32)
        if "cos" not in given or given["cos"].dtype != exact:
            angles = given["angles"].repeat(1, 1, 2)
            given |= {"cos": angles.cos().to(exact), "sin": angles.sin().to(exact)}
        cos, sin = given["cos"], given["sin"]

        def rotate(x: Tensor) -> Tensor:
            rotary, rest = x[..., : cos.shape[-1]].to(exact), x[..., cos.shape[-1] :]
            first, second = rotary.chunk(2, dim=-1)
            rotated = rotary * cos + torch.cat([-second, first], dim=-1) * sin
            rotated = rotated.to(x.dtype)
            return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated

        return rotate(q), rotate(k)


class EmbeddingTrial(OpTrial):
    """`embed_features`: sizes V, D."""

    copied = ("out", "dfeatures")
    by_row = ("features", "dout", "out", "dfeatures")
    rows = {"features": "feature_token", "dfeatures": "feature_token"}

    def timed_lengths(self) -> list[int]:
        return [self.tokens]

    def inputs(self, lengths: Sequence[int], is_timed: bool) -> Tensors:
        T, D = sum(lengths), self.sizes["D"]
        V = self.sizes["V"] if is_timed else min(self.sizes["V"], 1000)
        places = torch.arange(T)
        is_feature = (places % 64) >= 32  # runs of 32: half of the tokens
        feature_index = torch.where(is_feature, is_feature.cumsum(0) - 1, -1).int()
        uniform = torch.rand(T, generator=torch.Generator().manual_seed(0))
        input_ids = (uniform**4 * V).long()  # a few ids are frequent
        order, offsets = reference.text_by_id(input_ids.numpy(), feature_index.numpy())
        indices = {
            "input_ids": input_ids,
            "feature_index": feature_index,
            "feature_token": places[is_feature].int(),
            "feature_offsets": torch.arange(int(is_feature.sum()) + 1, dtype=torch.int32),
            "text_order": torch.from_numpy(order),
            "text_id_offsets": torch.from_numpy(offsets),
        }
        return {
            "weight": self.random(V, D),
            "features": self.random(len(indices["feature_token"]), D),
            "dout": self.random(T, D),
            **{name: x.to(self.device) for name, x in indices.items()},
        }

    def run(self, name: str, given: Tensors) -> Tensors:
        weight, features = (given[one].detach().requires_grad_() for one in ("weight", "features"))
        if name == OURS:
            from mmpack.ops.embed_features import embed_features

            out = embed_features(
                given["input_ids"],
                given["feature_index"],
                weight,
                features,
                feature_token=given["feature_token"],
                feature_offsets=given["feature_offsets"],
                text_order=given["text_order"],
                text_id_offsets=given["text_id_offsets"],
            )
        else:
            text = F.embedding(given["input_ids"], weight)
            names = ("feature_index", "feature_token", "feature_offsets")
            repeated = reference.repeat_features(features, *(given[one] for one in names))
            out = reference.insert_features(text, repeated, given["feature_token"])
        dweight, dfeatures = torch.autograd.grad(out, (weight, features), given["dout"])
        return {"out": out.detach(), "dweight": dweight, "dfeatures": dfeatures}


class PatchTrial(OpTrial):
    """`patch_embed` of still images: sizes E, C, t, p."""

    default = plain = "torch"
    by_row = ("stills", "out")

    def candidates(self) -> Sequence[str]:
        return ["torch", OURS]

    def timed_lengths(self) -> list[int]:
        return [PATCHES_PER_TOKEN * self.tokens]

    def inputs(self, lengths: Sequence[int], is_timed: bool) -> Tensors:
        P, (E, C, t, p) = sum(lengths), (self.sizes[name] for name in "ECtp")
        values = torch.rand((P, C * p * p), generator=self._random, device=self.device)
        return {
            "stills": (256 * values).to(torch.uint8),
            "weight": self.random(E, C, t, p, p) * (C * t * p * p) ** -0.5,
            "dout": self.random(P, E),
        }

    def run(self, name: str, given: Tensors) -> Tensors:
        from mmpack.ops.patch_embed import patch_embed

        weight, channels = given["weight"].detach().requires_grad_(), (0.5,) * self.sizes["C"]
        out = patch_embed(given["stills"], None, weight, None, channels, channels, impl=name)
        (dweight,) = torch.autograd.grad(out, weight, given["dout"])
        return {"out": out.detach(), "dweight": dweight}


class LossTrial(OpTrial):
    """`supervised_cross_entropy`: size V. The backward overwrites the logits, so each run copies them."""

    default = plain = "torch"
    by_row = ("logits", "dlogits")

    def candidates(self) -> Sequence[str]:
        return ["torch", OURS]

    def timed_lengths(self) -> list[int]:
        return [min(2048, -(-self.tokens // 4))]  # supervised rows

    def inputs(self, lengths: Sequence[int], is_timed: bool) -> Tensors:
        L = sum(lengths)
        V = self.sizes["V"] if is_timed else min(self.sizes["V"], SMALL_VOCABULARY)
        return {"logits": self.random(L, V), "labels": self.labels(L, V)}

    def labels(self, L: int, V: int) -> Tensor:
        """Ids, every seventh -100."""
        ids = torch.arange(L, device=self.device)
        return torch.where(ids % 7 == 6, -100, ids * 7919 % V)

    def run(self, name: str, given: Tensors) -> Tensors:
        from mmpack.ops.supervised_cross_entropy import supervised_cross_entropy

        logits = given["logits"].clone().requires_grad_()
        loss = supervised_cross_entropy(logits, given["labels"], 100, impl=name)
        (dlogits,) = torch.autograd.grad(loss, logits)
        return {"loss": loss.detach().reshape(1, 1), "dlogits": dlogits}


class HeadTrial(LossTrial):
    """`supervised_linear_cross_entropy`: sizes V, D."""

    by_row = ("hidden", "dhidden")

    def inputs(self, lengths: Sequence[int], is_timed: bool) -> Tensors:
        L, D = sum(lengths), self.sizes["D"]
        V = self.sizes["V"] if is_timed else min(self.sizes["V"], SMALL_VOCABULARY)
        weight = self.random(V, D) * D**-0.5
        return {"hidden": self.random(L, D), "weight": weight, "labels": self.labels(L, V)}

    def run(self, name: str, given: Tensors) -> Tensors:
        from mmpack.ops.supervised_linear_cross_entropy import supervised_linear_cross_entropy

        hidden, weight = (given[one].detach().requires_grad_() for one in ("hidden", "weight"))
        loss = supervised_linear_cross_entropy(hidden, weight, given["labels"], 100, impl=name)
        dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
        return {"loss": loss.detach().reshape(1, 1), "dhidden": dhidden, "dweight": dweight}


TRIALS: dict[str, type[OpTrial]] = {
    "varlen_attention": AttentionTrial,
    "apply_mrope": RotaryTrial,
    "embed_features": EmbeddingTrial,
    "patch_embed": PatchTrial,
    "supervised_cross_entropy": LossTrial,
    "supervised_linear_cross_entropy": HeadTrial,
}


def make_trial(job: str) -> OpTrial:
    """The trial of "TOKENS SHAPE_CLASS" on the current CUDA device."""
    tokens, _, text = job.partition(" ")
    shape = ShapeClass.parse(text)
    return TRIALS[shape.op](shape, int(tokens), torch.device("cuda"))


def _fill(lengths: Sequence[int], total: int) -> list[int]:
    """Lengths in turn until they fill `total`; the last one is cut."""
    found: list[int] = []
    while (left := total - sum(found)) > 0:
        found.append(min(lengths[len(found) % len(lengths)], left))
    return found
