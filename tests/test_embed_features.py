"""The fused embedding against the specification: copies equal to the bit, sums within the budget."""

import numpy as np
import pytest
import torch
from builders import SMALL_SPEC, assert_within_budget, encoded
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpack import assemble, reference
from mmpack.ops import accumulate_embedding_grad, embed_features
from mmpack.ops.embed_features import MAX_RUN, embed_features_bwd

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def dtypes(device, sums):
    """bf16 can be copied in the interpreter, but not added."""
    half = [torch.float16] if device.type == "cpu" and sums else [torch.float16, torch.bfloat16]
    return [torch.float32, *half]


def indices_of(input_ids, feature_rows, device):
    """The pack's indices for ids (T,) with features at `feature_rows`."""
    feature_index = np.full(len(input_ids), -1, dtype=np.int32)
    feature_index[feature_rows] = np.arange(len(feature_rows))
    text_order, text_id_offsets = reference.text_by_id(input_ids.cpu().numpy(), feature_index)
    arrays = {
        "feature_token": np.array(feature_rows, dtype=np.int32),
        "feature_offsets": np.arange(len(feature_rows) + 1, dtype=np.int32),
        "text_order": text_order,
        "text_id_offsets": text_id_offsets,
    }
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return torch.from_numpy(feature_index).to(device), tensors


def make_case(T, F, V, D, dtype, device, where="scattered"):
    rng = np.random.default_rng(T + F + D)
    places = {
        "scattered": np.sort(rng.permutation(T)[:F]),
        "first": range(F),
        "last": range(T - F, T),
    }
    rows = np.array(places[where], dtype=np.int64)
    input_ids = torch.from_numpy(rng.integers(0, V, T))
    input_ids[rows] = V - 1  # the placeholder id
    feature_index, indices = indices_of(input_ids, rows, device)
    weight, features, dout = (torch.randn(n, D).to(device, dtype) for n in (V, F, T))
    return input_ids.to(device), feature_index, weight, features, dout, indices


def run(fn, input_ids, feature_index, weight, features, dout, **indices):
    weight, features = weight.detach().requires_grad_(), features.detach().requires_grad_()
    out = fn(input_ids, feature_index, weight, features, **indices)
    out.backward(dout)
    no_grad = torch.zeros_like(features)
    return out.detach(), weight.grad, no_grad if features.grad is None else features.grad


SIZES = [
    (1, 0, 3, 1),
    (1, 1, 3, 8),
    (7, 3, 5, 70),
    (26, 8, 4, 1030),
    (300, 100, 40, 16),
    (150, 0, 3, 33),  # three ids: runs of more than MAX_RUN tokens
    (64, 63, 9, 24),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("T", "F", "V", "D"), SIZES)
def test_forward_and_gradients(T, F, V, D, device):
    for dtype in dtypes(device, sums=True):
        *case, indices = make_case(T, F, V, D, dtype, device)
        exact = [x.double() if x.is_floating_point() else x for x in case]
        out, dweight, dfeatures = run(embed_features, *case, **indices)
        torch_out, torch_dweight, torch_dfeatures = run(reference.embed_features, *case)
        assert torch.equal(out, torch_out)
        assert torch.equal(dfeatures, torch_dfeatures)
        _, exact_dweight, _ = run(reference.embed_features, *exact)
        assert_within_budget(f"dweight {dtype}", dweight, torch_dweight, exact_dweight)


@pytest.mark.parametrize(("T", "D"), [(9, 1), (30, 24), (14, 1030)])
def test_features_at_several_tokens(T, D, device):
    """Their gradients: sums in the order of the tokens, equal to the bit in two runs; a feature at one token or at
    none among them."""
    rng = np.random.default_rng(T)
    index = np.where(rng.random(T) < 0.7, rng.integers(0, 4, T), -1).astype(np.int32)
    index[:2] = 4, 6  # at one token; 5 is at none
    tokens = [np.flatnonzero(index == f) for f in range(7)]
    input_ids = torch.from_numpy(np.where(index < 0, rng.integers(0, 5, T), 8))
    order, runs = reference.text_by_id(input_ids.numpy(), index)
    arrays = {
        "feature_token": np.concatenate(tokens).astype(np.int32),
        "feature_offsets": np.cumsum([0, *map(len, tokens)]).astype(np.int32),
        "text_order": order,
        "text_id_offsets": runs,
    }
    indices = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    feature_index = torch.from_numpy(index)
    for dtype in [torch.float64, *dtypes(device, sums=True)]:
        made = (torch.randn(n, D).to(device, dtype) for n in (9, 7, T))
        case = [input_ids.to(device), feature_index.to(device), *made]
        one, other = (run(embed_features, *case, **indices) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(one, other))
        out, _, dfeatures = one
        assert torch.equal(out, reference.embed_features(*case[:4]))
        exact = torch.promote_types(dtype, torch.float32)
        for f, at in enumerate(tokens):
            summed = torch.zeros(D, dtype=exact, device=device)
            for token in at:
                summed += case[4][token]
            assert torch.equal(dfeatures[f], summed.to(dtype))

        features = case[3].requires_grad_()
        names = ("feature_token", "feature_offsets")
        repeated = reference.repeat_features(features, case[1], *(indices[n] for n in names))
        repeated.backward(case[4][indices["feature_token"].long()])
        again = features.grad
        rounding = 0 if dtype == exact else torch.finfo(dtype).eps  # ties round either way
        assert ((again - dfeatures).abs() <= rounding * dfeatures.abs()).all()


@pytest.mark.parametrize("where", ["first", "last"])
def test_images_first_and_last(where, device):
    *case, indices = make_case(40, 25, 9, 20, torch.float32, device, where)
    for ours, theirs in zip(
        run(embed_features, *case, **indices), run(reference.embed_features, *case)
    ):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_forward_is_a_copy_in_every_dtype(device):
    for dtype in [*dtypes(device, sums=False), torch.float64]:
        input_ids, feature_index, weight, features, _, indices = make_case(
            50, 20, 9, 100, dtype, device
        )
        out = embed_features(input_ids, feature_index, weight, features, **indices)
        assert torch.equal(
            out, reference.embed_features(input_ids, feature_index, weight, features)
        )


def test_no_token_at_all(device):
    *case, indices = make_case(0, 0, 5, 8, torch.float32, device)
    indices["text_id_offsets"] = torch.zeros(1, dtype=torch.int32, device=device)
    out, dweight, dfeatures = run(embed_features, *case, **indices)
    assert out.shape == (0, 8)
    assert (dweight == 0).all()


pieces = st.lists(
    st.one_of(st.integers(1, 20), st.sampled_from([(2, 2), (4, 6), [7] * 33])),
    min_size=1,
    max_size=8,
)


@settings(max_examples=8, deadline=None)
@given(samples=st.lists(pieces.map(lambda p: encoded(SMALL_SPEC, *p)), min_size=1, max_size=3))
def test_indices_of_assembled_packs(samples):
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU here, not in the interpreter")
    pack = assemble(samples, pixels=False)
    F, D = len(pack.feature_token), 6
    names = ("feature_token", "feature_offsets", "text_order", "text_id_offsets")
    indices = {name: torch.from_numpy(getattr(pack, name)) for name in names}
    input_ids, feature_index = map(torch.from_numpy, (pack.input_ids, pack.feature_index))
    case = [
        input_ids,
        feature_index,
        torch.randn(100, D),
        torch.randn(F, D),
        torch.randn(len(input_ids), D),
    ]
    ours, theirs = run(embed_features, *case, **indices), run(reference.embed_features, *case)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])
    assert torch.allclose(ours[1], theirs[1], atol=1e-5)


@pytest.mark.parametrize(
    "count", [MAX_RUN, MAX_RUN + 1, 2_000, pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_one_id_many_times(count, device):
    """The table's gradient alone, as the forward of 10^4 rows is slow in the interpreter."""
    D = 8
    input_ids = torch.cat([torch.full((count,), 1), torch.tensor([0, 2, 1])]).to(device)
    _, indices = indices_of(input_ids, [], device)
    dout = torch.randn(len(input_ids), D, device=device)
    dweight = torch.full((4, D), 5.0, device=device)  # row 3 is no id of the text
    embed_features_bwd(dout, dweight, dout[:0], input_ids, indices.values(), padding_idx=-1)
    exact, torchs = (
        torch.zeros(4, D, dtype=dtype, device=device).index_add_(0, input_ids, dout.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget("dweight", dweight[:3], torchs[:3], exact[:3])
    assert (dweight[3] == 5.0).all()


def test_two_backward_runs_give_the_same_bits(device):
    *case, indices = make_case(300, 100, 4, 40, torch.float32, device)
    one, other = (run(embed_features, *case, **indices) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_rows_that_lie_apart(device):
    input_ids, feature_index, weight, features, dout, indices = make_case(
        40, 15, 9, 24, torch.float32, device
    )
    wide = [torch.randn(len(x), 50, device=device) for x in (weight, features, dout)]
    tall = [torch.randn(24, len(x), device=device) for x in (weight, features, dout)]
    for weight, features, dout in ([x[:, 3:27] for x in wide], [x.T for x in tall]):
        case = (input_ids, feature_index, weight, features, dout)
        ours, theirs = run(embed_features, *case, **indices), run(reference.embed_features, *case)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[2], theirs[2])
        assert torch.allclose(ours[1], theirs[1], atol=1e-5)
    expanded = torch.ones(1, 24, device=device).expand(40, 24)  # sum().backward() gives such a one
    case = (input_ids, feature_index, weight, features, expanded)
    ours, theirs = run(embed_features, *case, **indices), run(reference.embed_features, *case)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))


def test_the_padding_row_gets_no_gradient(device):
    input_ids, feature_index, weight, features, dout, indices = make_case(
        200, 20, 3, 8, torch.float32, device
    )
    for padding_idx in (0, 1):
        _, dweight, _ = run(
            embed_features,
            input_ids,
            feature_index,
            weight,
            features,
            dout,
            **indices,
            padding_idx=padding_idx,
        )
        table = torch.nn.Embedding(3, 8, padding_idx=padding_idx, _weight=weight.clone()).to(device)
        text = feature_index < 0
        table(input_ids)[text].backward(dout[text])
        assert torch.allclose(dweight, table.weight.grad, atol=1e-5)
        assert (dweight[padding_idx] == 0).all()


@pytest.mark.parametrize("frozen", ["weight", "features"])
def test_what_is_frozen_costs_no_gradient(frozen, device):
    input_ids, feature_index, weight, features, dout, indices = make_case(
        30, 10, 9, 8, torch.float32, device
    )
    weight.requires_grad_(frozen != "weight")
    features.requires_grad_(frozen != "features")
    embed_features(input_ids, feature_index, weight, features, **indices).backward(dout)
    assert (weight.grad is None) == (frozen == "weight")
    assert (features.grad is None) == (frozen == "features")
    if frozen == "weight":
        assert torch.equal(features.grad, dout[indices["feature_token"].long()])


def test_the_gradient_of_a_table_without_text(device):
    *case, indices = make_case(6, 6, 9, 8, torch.float32, device)
    _, dweight, dfeatures = run(embed_features, *case, **indices)
    assert (dweight == 0).all()
    assert torch.equal(dfeatures, case[-1])


def test_accumulation_touches_used_rows_only(device):
    for dtype in dtypes(device, sums=True):
        input_ids, _, _, _, dout, indices = make_case(200, 50, 5, 40, dtype, device)
        del indices["feature_token"], indices["feature_offsets"]
        main_grad = torch.randn(8, 40, device=device)  # rows 5 to 7 are no ids
        before = main_grad.clone()
        accumulate_embedding_grad(main_grad, dout, input_ids, **indices)
        text = indices["text_order"].long()
        exact = before.double().index_add_(0, input_ids[text], dout[text].double())
        torchs = before.clone().index_add_(0, input_ids[text], dout[text].float())
        assert_within_budget(f"main_grad {dtype}", main_grad, torchs, exact)
        unused = torch.ones(8, dtype=torch.bool, device=device)
        unused[input_ids[text]] = False
        assert unused.sum() >= 3
        assert torch.equal(main_grad[unused], before[unused])


def test_accumulating_twice_into_a_half_gradient(device):
    input_ids, _, weight, _, dout, indices = make_case(100, 30, 5, 16, torch.float16, device)
    del indices["feature_token"], indices["feature_offsets"]
    grad = torch.zeros_like(weight)
    for _ in range(2):
        accumulate_embedding_grad(grad, dout, input_ids, **indices, padding_idx=0)
    text = indices["text_order"].long()
    exact = torch.zeros(5, 16, dtype=torch.float64, device=device)
    exact.index_add_(0, input_ids[text], 2 * dout[text].double())
    exact[0] = 0
    assert (grad.double() - exact).abs().max() <= 2e-3 * exact.abs().max()


def test_the_operator_is_well_formed(device):
    """Schema, fake and autograd of the custom op, as torch checks them."""
    input_ids, feature_index, weight, features, _, indices = make_case(
        12, 4, 6, 8, torch.float32, device
    )
    arguments = (
        input_ids,
        feature_index,
        weight.requires_grad_(),
        features.requires_grad_(),
        *indices.values(),
        -1,
    )
    torch.library.opcheck(torch.ops.mmpack.embed_features.default, arguments)


def test_it_runs_on_the_meta_device():
    *case, indices = make_case(30, 10, 9, 8, torch.float32, torch.device("cpu"))
    indices = {name: index.to("meta") for name, index in indices.items()}
    out, dweight, dfeatures = run(embed_features, *[x.to("meta") for x in case], **indices)
    assert (out.shape, dweight.shape, dfeatures.shape) == ((30, 8), (9, 8), (10, 8))


def test_what_does_not_fit_is_told(device):
    input_ids, feature_index, weight, features, dout, indices = make_case(
        30, 10, 9, 8, torch.float32, device
    )
    call = {"input_ids_T": input_ids, "feature_index_T": feature_index, "weight_VD": weight}
    call |= {"features_FD": features, **indices}
    cases = [
        (
            {"features_FD": features[:9]},
            r"features must be \(10, 8\) to fill 10 placeholders, got \(9, 8\)",
        ),
        (
            {"features_FD": features.half()},
            "features are torch.float16, the table is torch.float32",
        ),
        ({"feature_index_T": feature_index[:5]}, "30 input_ids but 5 feature indices"),
        ({"text_order": indices["text_order"][:5]}, "text_order must have 20 entries .* got 5"),
        (
            {"feature_offsets": indices["feature_offsets"][:5]},
            r"features must be \(4, 8\) to fill 10 placeholders",
        ),
        ({"feature_offsets": indices["feature_offsets"].long()}, "feature_offsets must be flat"),
        ({"feature_token": indices["feature_token"].long()}, "feature_token must be flat int32"),
        ({"features_FD": features.to("meta")}, "features are on meta, the table is on"),
        (
            {"text_id_offsets": indices["text_id_offsets"].to("meta")},
            "text_id_offsets must be .* on meta",
        ),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            embed_features(**{**call, **change})
    del indices["feature_token"], indices["feature_offsets"]
    with pytest.raises(
        ValueError, match=r"dout must be \(30, 8\), one row per token, got \(29, 8\)"
    ):
        accumulate_embedding_grad(weight, dout[:29], input_ids, **indices)
    with pytest.raises(ValueError, match="grad must be contiguous"):
        accumulate_embedding_grad(torch.zeros(8, 9, device=device).T, dout, input_ids, **indices)


def test_without_a_gpu_it_says_so(monkeypatch):
    import triton

    *case, indices = make_case(3, 1, 3, 4, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="the kernel needs a CUDA device, the tensors are on cpu"):
        embed_features(*case[:4], **indices)


def test_runs_are_cut_where_the_kernel_expects_it():
    assert reference.MAX_RUN == MAX_RUN
