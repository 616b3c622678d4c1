"""torch.compile in a training run: two graphs, one for the first pack's sizes and one for all others, however many
segments, images and supervised tokens a pack has."""

import pytest
import torch
from builders import encoded, packed, small_config, small_spec, tiny_model, worst_difference
from test_head import small_chunks

from mmpack.hf import PackCollator, patch_model
from mmpack.ops import varlen_attention

NUM_SEGMENTS = (3, 5, 2, 7)


def counted():
    """A backend that runs graphs as they are, and the graphs that it was given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.mark.parametrize("causal", [True, False])
def test_attention_on_a_cpu_is_one_op(causal):
    """Against the loop over segments, some empty, forward and backward."""

    def attend(q, k, v, pack):
        cu_seqlens, offsets = pack["cu_seqlens"], pack["offsets"]
        return varlen_attention(
            q, k, v, cu_seqlens, 9, causal=causal, scale=0.3, offsets=offsets, impl="sdpa"
        )

    torch._dynamo.reset()
    torch.manual_seed(0)
    backend, graphs = counted()
    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for count in NUM_SEGMENTS:
        lengths = torch.tensor([*range(count), 9, 1])
        offsets = (0, *lengths.cumsum(0).tolist())
        pack = {"cu_seqlens": torch.tensor(offsets, dtype=torch.int32), "offsets": offsets}
        heads = (4, 2, 2)
        qkv = [torch.randn(offsets[-1], h, 8, requires_grad=True) for h in heads]
        out, expected = compiled(*qkv, pack), attend(*qkv, pack)
        assert torch.equal(out, expected)
        up = torch.randn_like(out)
        for ours, exact in zip(*(torch.autograd.grad(x, qkv, up) for x in (out, expected))):
            assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert len(graphs) == 2


def pack_of(family, count):
    """Segments with one or two images, of other sizes in each pack."""
    spec, some = small_spec(family), []
    for n in range(count):
        images = [(2, 2 + 2 * ((n + count) % 3)) for _ in range(1 + n % 2)]
        some.append(encoded(spec, range(5, 30 + 2 * n), *images, range(60, 70 + count * n % 19)))
    return packed(some, family, seed=count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "sums_in_the_head"),
    [("qwen2_vl", False), ("qwen2_vl", True), ("qwen2_5_vl", False), ("qwen3_vl", False)],
)
def test_a_model_is_two_graphs(family, sums_in_the_head, monkeypatch):
    if sums_in_the_head:
        small_chunks(monkeypatch)
    model = patch_model(tiny_model(small_config(family)))
    collate = PackCollator(model=model)
    torch._dynamo.reset()
    backend, graphs = counted()
    compiled = torch.compile(model, backend=backend)
    for count in NUM_SEGMENTS:
        batch = collate([pack_of(family, count)])
        both = []
        for one in (model, compiled):
            model.zero_grad()
            output = one(**batch, num_items_in_batch=torch.tensor(7.0, dtype=torch.float64))
            assert (output.logits is None) == sums_in_the_head
            output.loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            both.append((output.loss.item(), grads))
        assert both[1][0] == pytest.approx(both[0][0], rel=1e-6)
        difference, name = worst_difference(both[1][1], both[0][1])
        assert difference <= 1e-5, name
    assert len(graphs) == 2
