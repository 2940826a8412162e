"""At KV usage 1 a host computes what it did, whatever the parts hold; below, any split of a text gives the same."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from mixers import calibrate, kv_cache_bytes, set_kv_usage
from mixers.retrofit import attach, parts_of
from mixers.state import full_kv_bytes, kv_stored_bytes, state_bytes
from mixers.threshold import thresholds_of
from tests.mixers.retrofit.hosts import HOSTS, attached, host, tokens

X = tokens(3, 40)
LEFT, RIGHT = torch.ones(3, 40, dtype=torch.long), torch.ones(3, 40, dtype=torch.long)
LEFT[1, :7], RIGHT[2, -5:], LEFT[2, :1] = 0, 0, 0
ROUTERS = {
    "demand": {"name": "demand", "error": False, "hidden": 4},
    "error": {"name": "demand", "error": True},
    **{name: {"name": name} for name in ("residual", "cosine", "key_norm", "random", "static")},
    "recency": {"name": "recency", "length": 40},
}


def close(a, b, real=None):
    real = torch.ones(a.shape[:2], dtype=torch.bool) if real is None else real.bool()
    assert_close(a[real], b[real], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", params=HOSTS)
def pair(request):
    model = host(request.param)
    return model, attached(model)


@torch.no_grad()
def test_logits_are_the_hosts(pair):
    plain, ours = pair
    close(ours(X).logits, plain(X).logits)
    for mask in (LEFT, RIGHT, LEFT.bool()):
        close(ours(X, attention_mask=mask).logits, plain(X, attention_mask=mask).logits, mask)
    alone = dict(use_cache=False)
    starts = torch.cat([torch.arange(15), torch.arange(25)])[None]
    expected = plain(X[:1], position_ids=starts, **alone).logits
    close(ours(X[:1], position_ids=starts, **alone).logits, expected)
    inputs = dict(inputs_embeds=plain.get_input_embeddings()(X))
    close(ours(**inputs).logits, plain(**inputs).logits)


@torch.no_grad()
def test_packed_by_bounds():
    plain = host()
    ours = attached(plain)
    bounds = torch.tensor([0, 15, 40], dtype=torch.int32)
    starts = torch.cat([torch.arange(15), torch.arange(25)])[None]
    told = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=25, max_length_k=25, use_cache=False)
    got = ours(X[:1], position_ids=starts, **told).logits
    close(got[:, :15], plain(X[:1, :15]).logits)
    close(got[:, 15:], plain(X[:1, 15:]).logits)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_what_it_writes_is_the_hosts(pair, beams):
    plain, ours = pair
    options = dict(attention_mask=LEFT, max_new_tokens=10, do_sample=False, num_beams=beams)
    expected = plain.generate(X, **options)
    assert torch.equal(ours.generate(X, **options), expected)
    assert torch.equal(ours.generate(X, **options, use_cache=False), expected)
    if beams == 1:
        assert torch.equal(ours.generate(X, **options, prefill_chunk_size=7), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_the_hosts(pair, checkpointing):
    grads = []
    for model in map(copy.deepcopy, pair):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model.train()(X, attention_mask=RIGHT, labels=X.masked_fill(RIGHT == 0, -100))
        out.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if ".ham." not in name})
        grads[-1]["loss"] = out.loss.detach()
        assert all(grad is not None for grad in grads[-1].values())
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


@torch.no_grad()
def test_a_key_head_is_held_once(pair):
    """At usage 1 the cache weighs what the host's own does, and less than a page of 64 free places a head."""
    plain, ours = pair
    x = tokens(2, 512)
    caches = [model(x).past_key_values for model in pair]
    taken = [i for i, layer in enumerate(caches[1].layers) if hasattr(layer, "state")]
    assert len(taken) == len(parts_of(ours))
    states = [caches[1].layers[i].state for i in taken]
    own = sum(y.nbytes for i in taken for y in (caches[0].layers[i].keys, caches[0].layers[i].values))
    assert kv_stored_bytes(states) == full_kv_bytes(states) == own
    recent = sum(state.kv.recent.k.nbytes + state.kv.recent.v.nbytes for state in states)
    assert kv_cache_bytes(states) <= own * (1 + 64 / 512) + recent
    assert 0 < state_bytes(states) < own


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    plain = host(head_dim=16).to(dtype)
    ours = attached(plain)
    a, b = ours(X, attention_mask=LEFT), plain(X, attention_mask=LEFT)
    assert a.logits.dtype == dtype
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=0.1, atol=0.2)
    assert_close(a.logits[LEFT.bool()], b.logits[LEFT.bool()], **tolerance)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_memory_weighs_as_many_tokens_in_every_precision(dtype):
    model = attached(host(head_dim=16).to(dtype), router="key_norm", window=4, sinks=2)
    calibrate(model, [X])
    set_kv_usage(model, 0.4)
    cache = model(X[:, :-1]).past_key_values
    logits = model(X[:, -1:], past_key_values=cache).logits
    for state in (layer.state for layer in cache.layers):
        assert state.recurrent.dtype == dtype
        assert state.recurrent[0, 0].nbytes == 8 * 2 * 16 * dtype.itemsize  # K V = 16 * 16: 8 tokens of 2 * 16
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert_close(logits[:, -1], model(X).logits[:, -1], rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize(
    ("router", "memory"), [*((name, True) for name in ROUTERS), ("demand", False), ("residual", False)]
)
def test_any_split_gives_the_same(router, memory):
    model = attached(host().double(), router=ROUTERS[router], memory=memory, window=4, sinks=2)
    calibrate(model, [X])
    set_kv_usage(model, 0.4)
    expected = model(X).logits
    routed = [part.routing.stored for part in parts_of(model).values()]
    if router != "recency":
        assert any(0.1 < stored.float().mean() < 0.9 for stored in routed)
    for lengths in ([1] * 40, [7, 1, 20, 12], [39, 1]):
        cache, parts = DynamicCache(config=model.config), []
        for chunk in X.split(lengths, 1):
            parts.append(model(chunk, past_key_values=cache).logits)
        assert_close(torch.cat(parts, 1), expected, rtol=1e-7, atol=1e-7)
        assert cache.get_seq_length() == 40
    full = model(X, attention_mask=LEFT, position_ids=(LEFT.cumsum(1) - 1).clamp(min=0)).logits
    rows = [model(row[mask.bool()][None]).logits[0] for row, mask in zip(X, LEFT, strict=True)]
    assert_close(full[LEFT.bool()], torch.cat(rows), rtol=1e-7, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("router", ["demand", "error", "key_norm"])
def test_beams_reorder_the_cache(router):
    model = attached(host().double(), router=ROUTERS[router], window=4, sinks=2)
    calibrate(model, [X])
    set_kv_usage(model, 0.4)
    options = dict(attention_mask=LEFT, max_new_tokens=12, do_sample=False, num_beams=3)
    assert torch.equal(model.generate(X, **options), model.generate(X, **options, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("router", ["demand", "error", "residual", "key_norm", "random"])
@pytest.mark.parametrize("scope", ["model", "head"])
def test_the_usage_that_is_asked_for_is_held(router, scope):
    """Window and sinks are in it, and the cache holds what is said."""
    model, text = attached(host(), router=ROUTERS[router], window=8, sinks=2, scope=scope), tokens(8, 200)
    set_kv_usage(model, 0.25)
    calibrate(model, [text])
    cache = model(text).past_key_values
    usages = torch.cat([part.routing.usage for part in parts_of(model).values()])
    assert usages.mean() == pytest.approx(0.25, abs=0.03)
    states = [layer.state for layer in cache.layers]
    # the newest token's place in the window is not kept when it leaves: the next query sees one fewer
    assert kv_stored_bytes(states) / full_kv_bytes(states) == pytest.approx(float(usages.mean()), abs=0.01)
    set_kv_usage(model, 0.01)  # less than window and sinks
    model(text)
    usages = torch.cat([part.routing.usage for part in parts_of(model).values()])
    assert usages.mean() == pytest.approx(10 / 200, abs=0.01)


@torch.no_grad()
def test_what_is_generated_in_training_moves_no_threshold():
    model = attached(host(), router="key_norm", window=4, sinks=2)
    calibrate(model, [X])
    set_kv_usage(model.train(), 0.5)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for _ in range(3):
        model.generate(X[:, :20] * 0 + 7, max_new_tokens=2, do_sample=False)
    assert not any(threshold._pending for threshold in thresholds_of(model))
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name


@torch.no_grad()
def test_nothing_but_padding():
    """As the host, with and without a cache that holds something; what it answers is of no account."""
    model = attached(host(), window=4)
    cache = model(X).past_key_values
    for told in ({}, {"past_key_values": cache, "attention_mask": torch.cat([LEFT * 0 + 1, LEFT * 0], 1)}):
        out = model(X, **{"attention_mask": LEFT * 0} | told)
        assert out.logits.shape[:2] == X.shape and out.logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generating_under_autocast(dtype):
    plain = host()
    options = dict(max_new_tokens=3, do_sample=False)
    with torch.autocast("cpu", dtype):
        expected, got = (model.generate(X, **options) for model in (plain, attached(plain)))
    assert got.shape == expected.shape and torch.equal(got[:, : X.shape[1]], X)


@torch.no_grad()
def test_one_of_two_models_of_a_class():
    plain = host()
    twin = copy.deepcopy(plain)
    expected = plain(X).logits
    attach(twin, router="key_norm", window=4, kv_usage=0.0)
    assert torch.equal(plain(X).logits, expected) and not torch.equal(twin(X).logits, expected)
    shared = host()
    shared.config = plain.config  # as models made of one config have it
    attach(shared)
    assert not hasattr(plain.config, "mixer_retrofit") and type(plain.config) is not type(shared.config)
    assert plain.config._attn_implementation == "sdpa"


def test_some_layers_alone():
    model = host(num_hidden_layers=4)
    assert str(attach(model, layers=[-1, 1])).startswith("HAM around the attention of 2 of 4 modules")
    assert [*parts_of(model)] == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    with torch.no_grad():
        close(model(X).logits, host(num_hidden_layers=4)(X).logits)
