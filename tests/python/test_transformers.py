"""Hugging Face transformers: the drop-in and whole patched models against the originals."""

import importlib
import inspect

import pytest
import torch
from oracle import DTYPES, same

transformers = pytest.importorskip("transformers")

from fused_rope.compat.transformers import apply_rotary_pos_emb, patch, unpatch  # noqa: E402
from fused_rope.compat.transformers.forms import find_form  # noqa: E402

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def called(function):
    """A function, which the `kernels` package, where it is installed, wraps as a layer."""
    return getattr(function, "forward", function)


def build(family, device="cpu", dtype=torch.float32, **options):
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**SIZES, **options)
    model = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config)
    return model.to(device=device, dtype=dtype).eval()


def original_and_ours(model, run, **options):
    original = run()
    assert list(patch(model, **options).left_alone) == []
    try:
        ours = run()
    finally:
        unpatch(model)
    return original, ours


# --- the function -------------------------------------------------------------------------------


def tables(family, x, position_ids, **options):
    """cos and sin as the family's own rotary module makes them."""
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**{**SIZES, **options})
    rotary = getattr(modeling(family), f"{FAMILIES[family]}RotaryEmbedding")(config)
    return rotary.to(x.device)(x, position_ids)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_function_is_bitwise_the_original(family, dtype, unsqueeze_dim, device):
    B, S, D = 2, 33, SIZES["head_dim"]
    if unsqueeze_dim == 1:  # as the models pass them: [B, H, S, D] over memory of [B, S, H, D]
        shaped = [torch.randn(B, S, H, D, device=device).to(dtype).transpose(1, 2) for H in (4, 2)]
    else:
        shaped = [torch.randn(B, S, H, D, device=device).to(dtype) for H in (4, 2)]
    q, k = (x.detach().requires_grad_() for x in shaped)
    left_padded = (torch.arange(S) - 5).clamp(min=0)
    for position_ids in (
        torch.arange(S)[None],
        torch.stack([torch.arange(S), left_padded]),
        torch.randint(0, 4000, (B, S)),
    ):
        cos, sin = tables(family, q, position_ids.to(device))
        original = modeling(family).apply_rotary_pos_emb
        want = original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        got = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        g = [torch.randn_like(t) for t in want]
        want_grads = torch.autograd.grad(want, (q, k), g)
        got_grads = torch.autograd.grad(got, (q, k), g)
        for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
            same(a, b)


def test_one_rounding_is_closer_to_the_truth():
    q, k = torch.randn(1, 4, 512, 64), torch.randn(1, 2, 512, 64)
    cos, sin = tables("llama", q, torch.arange(512)[None], head_dim=64)
    truth = modeling("llama").apply_rotary_pos_emb(q.double(), k.double(), cos, sin)[0]
    q, k, cos, sin = (t.bfloat16() for t in (q, k, cos, sin))
    errors = [
        (apply_rotary_pos_emb(q, k, cos, sin, precision=precision)[0].double() - truth)
        .square()
        .mean()
        for precision in ("fp32", "model")
    ]
    assert errors[0] < errors[1]


def test_partial_rotation():
    q, k = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32)
    cos, sin = tables("llama", q, torch.arange(9)[None].expand(2, 9))
    got = apply_rotary_pos_emb(q, k, cos, sin)
    want = modeling("llama").apply_rotary_pos_emb(q[..., :16], k[..., :16], cos, sin)
    for a, b, x in zip(got, want, (q, k), strict=True):
        same(a, torch.cat([b, x[..., 16:]], -1))


@pytest.mark.parametrize("unsqueeze_dim", [0, 3])
def test_other_dimensions_are_refused(unsqueeze_dim):
    q, cos = torch.randn(2, 4, 9, 16), torch.randn(2, 9, 16)
    with pytest.raises(ValueError, match="unsqueeze_dim"):
        apply_rotary_pos_emb(q, q, cos, cos, unsqueeze_dim=unsqueeze_dim)
    with pytest.raises(ValueError, match="cos"):
        apply_rotary_pos_emb(q, q, cos[None], cos[None])


@pytest.mark.parametrize("unsqueeze_dim", [0, 1])
def test_tables_without_a_batch(unsqueeze_dim):
    q, cos, sin = torch.randn(2, 4, 9, 16), torch.randn(9, 16), torch.randn(9, 16)
    cos, sin = (torch.cat([t[:, :8]] * 2, -1) for t in (cos, sin))
    q = q if unsqueeze_dim == 0 else q.transpose(1, 2).contiguous()
    want = modeling("llama").apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=unsqueeze_dim)
    got = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=unsqueeze_dim)
    for a, b in zip(got, want, strict=True):
        same(a, b)


@pytest.mark.parametrize(
    "shape,unsqueeze_dim",
    [((1, 1, 16), 1), ((2, 1, 16), 1), ((1, 1, 16), 2), ((1, 16), 0), ((1, 16), 1)],
    ids=str,
)
def test_a_single_row_is_that_of_all_tokens(shape, unsqueeze_dim, device):
    q, k = torch.randn(2, 9, 9, 16, device=device), torch.randn(2, 9, 9, 16, device=device)
    angle = torch.rand(*shape[:-1], 8, device=device)
    cos, sin = (torch.cat([t, t], -1) for t in (angle.cos(), angle.sin()))
    want = modeling("llama").apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    got = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    for a, b in zip(got, want, strict=True):
        same(a, b)


# --- models -------------------------------------------------------------------------------------


def forward_backward(model, ids, **inputs):
    def run():
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, **inputs)
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        return out.logits.detach().clone(), grads

    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["left padding", "position_ids", "plain"])
def test_models(family, dtype, case, device):
    model = build(family, device, dtype)
    ids = torch.randint(0, 97, (2, 19), device=device)
    inputs = {}
    if case == "left padding":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :6] = 0
    elif case == "position_ids":
        inputs["position_ids"] = torch.randint(0, 1000, (2, 19), device=device)
    run = forward_backward(model, ids, **inputs)
    original, ours = original_and_ours(model, run)
    if device == "cpu":
        same(ours[0], original[0])
    bfloat16 = {"rtol": 2e-2, "atol": 2e-3}
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else bfloat16
    torch.testing.assert_close(ours[0], original[0], **tolerance)
    for name, grad in original[1].items():
        torch.testing.assert_close(
            ours[1][name], grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    again = run()
    same(again[0], original[0])


def test_autocast_keeps_the_numbers():
    """Under autocast the original returns float32, which attention rounds; ours rounds it."""
    model = build("llama")
    ids = torch.randint(0, 97, (2, 19))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids).logits

    original, ours = original_and_ours(model, run)
    same(ours, original)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, device):
    model = build(family, device)
    ids = torch.randint(1, 97, (2, 7), device=device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def run():
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=mask, **options)

    original, ours = original_and_ours(model, run)
    assert torch.equal(original, ours)


def test_compiles_without_a_graph_break(device):
    torch._dynamo.reset()
    model = build("llama", device)
    ids = torch.randint(0, 97, (2, 19), device=device)
    want = model(input_ids=ids).logits
    patch(model)
    try:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        got = compiled(input_ids=ids).logits
    finally:
        unpatch(model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- patch and unpatch --------------------------------------------------------------------------


def test_replacement_has_the_original_signature():
    module = modeling("llama")
    original = module.apply_rotary_pos_emb
    model = build("llama")
    report = patch(model)
    try:
        ours = module.apply_rotary_pos_emb
        assert ours is not original and inspect.signature(ours) == inspect.signature(
            called(original)
        )
        assert "modeling_llama" in str(report) and "half" in str(report)
    finally:
        report = unpatch(model)
    assert module.apply_rotary_pos_emb is original
    assert "restored" in str(report)


def test_models_of_a_family_are_counted():
    module = modeling("llama")
    original = module.apply_rotary_pos_emb
    other = modeling("mistral").apply_rotary_pos_emb
    first, second = build("llama"), build("llama")
    patch(first)
    patch(second)
    assert unpatch(first).restored == []
    assert module.apply_rotary_pos_emb is not original
    assert unpatch(second).restored
    assert module.apply_rotary_pos_emb is original
    assert not unpatch(second).restored
    assert modeling("mistral").apply_rotary_pos_emb is other


def test_one_precision_for_a_family():
    model = build("llama")
    with pytest.raises(ValueError, match="precision"):
        patch(model, precision="fast")
    patch(model, precision="fp32")
    try:
        with pytest.raises(ValueError, match="precision"):
            patch(model, precision="model")
    finally:
        unpatch(model)


@pytest.mark.parametrize(
    "error,rows", [(TypeError, 1.5), (TypeError, "64"), (ValueError, 0), (ValueError, -1)]
)
def test_rows_are_an_int_above_0(error, rows):
    model = build("llama")
    original = modeling("llama").apply_rotary_pos_emb
    with pytest.raises(error, match=r"^patch: expected rows"):
        patch(model, rows=rows)
    assert modeling("llama").apply_rotary_pos_emb is original


def test_precision_of_the_patch_reaches_the_operator():
    model = build("llama", dtype=torch.bfloat16)
    q, k = (torch.randn(2, H, 9, 16).bfloat16() for H in (4, 2))
    cos, sin = tables("llama", q, torch.arange(9)[None])
    patch(model, precision="fp32")
    try:
        got = modeling("llama").apply_rotary_pos_emb(q, k, cos, sin)
    finally:
        unpatch(model)
    for a, b in zip(got, apply_rotary_pos_emb(q, k, cos, sin, precision="fp32"), strict=True):
        same(a, b)


def test_somebody_else_s_replacement_is_left_alone():
    module = modeling("llama")
    original = module.apply_rotary_pos_emb
    model = build("llama")
    patch(model)
    try:
        module.apply_rotary_pos_emb = theirs = lambda *args: None
        report = unpatch(model)
        assert module.apply_rotary_pos_emb is theirs and report.left_alone
    finally:
        module.apply_rotary_pos_emb = original


def test_unknown_forms_are_left_alone(monkeypatch):
    """A function of the right name and signature, but with other numbers, is not guessed at."""
    module = modeling("llama")
    original = module.apply_rotary_pos_emb

    def twice(q, k, cos, sin, unsqueeze_dim=1):
        return original(*original(q, k, cos, sin), cos, sin)

    def mean(q, k, cos, sin, unsqueeze_dim=1):
        return (x.float().mean().to(x.dtype) for x in (q, k))

    def rounded_twice(q, k, cos, sin, unsqueeze_dim=1):
        wide = original(*(t.double() for t in (q, k, cos, sin)))
        return wide[0].float().to(q.dtype), wide[1].float().to(k.dtype)

    for other in (twice, rounded_twice, lambda q, k, freqs: (q, k), lambda *args: mean(*args)):
        monkeypatch.setattr(module, "apply_rotary_pos_emb", other)
        report = patch(build("llama"))
        assert not report.patched and "unknown" in str(report)
        assert module.apply_rotary_pos_emb is other


def test_tables_of_another_form_end_the_patch():
    """The drop-in reads half of the table, so a model whose halves differ is not for it."""
    module = modeling("llama")
    original = module.apply_rotary_pos_emb

    class Twisted(type(build("llama").model.rotary_emb)):
        def forward(self, x, position_ids):
            cos, sin = super().forward(x, position_ids)
            return cos.flip(-1) * torch.arange(cos.shape[-1]), sin

    model = build("llama")
    model.model.rotary_emb.__class__ = Twisted
    ids = torch.randint(0, 97, (2, 19))
    want = model(input_ids=ids).logits
    assert patch(model).patched
    with pytest.warns(UserWarning, match="tables"):
        same(model(input_ids=ids).logits, want)
    assert module.apply_rotary_pos_emb is original
    assert not unpatch(model).restored


def test_tables_without_values_are_looked_at_later():
    module, model = modeling("llama"), build("llama")
    q, table = torch.randn(1, 4, 3, 16), torch.randn(1, 3, 16)
    patch(model)
    try:
        meta = table.to("meta")
        module.apply_rotary_pos_emb(q.to("meta"), q.to("meta"), meta, meta)
        with pytest.warns(UserWarning, match="tables"):
            module.apply_rotary_pos_emb(q, q, table, table)
    finally:
        unpatch(model)


def test_a_model_without_rotary_functions():
    assert "found no" in str(patch(torch.nn.Linear(2, 2)))


def test_probes_leave_the_random_state_alone():
    state = torch.get_rng_state()
    form, _ = find_form("apply_rotary_pos_emb", modeling("llama").apply_rotary_pos_emb)
    assert form.name == "half"
    assert torch.equal(torch.get_rng_state(), state)
