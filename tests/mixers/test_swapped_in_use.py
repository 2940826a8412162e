"""What people do with a swapped model beside plain training: copies, prompts read before, generating half-way, DPO."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from transformers import DynamicCache

from mixers import build_mixer, calibrate, set_kv_usage, swap_mixers
from mixers.hf import MixerConfig, MixerForCausalLM
from mixers.retrofit import attach
from mixers.threshold import thresholds_of
from tests.mixers.hosts import Attention, Stack, decoder, plain, tokens

HAM = {"name": "ham", "kv_usage": 0.25}


def ours(**options):
    torch.manual_seed(0)
    mixer = HAM | {"num_heads": 2, "head_dim": 8}
    return MixerForCausalLM(MixerConfig(vocab_size=50, dim=32, depth=2, mixer=mixer, **options))


@pytest.fixture(params=["swapped", "ours"])
def model(request):
    made = decoder("llama", HAM, dtype=torch.float32) if request.param == "swapped" else ours()
    calibrate(made, [tokens(4, 40)])
    return made


def test_generating_in_training_mode_moves_no_threshold(model):
    set_kv_usage(model, 0.1)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    written = model.train().generate(tokens(2, 20), **options)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert torch.equal(model.eval().generate(tokens(2, 20), **options), written)


def gradients(model, *, checkpointed, passes=2):
    """Of a loss over several forward passes, all of a step of training."""
    model = copy.deepcopy(model).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for threshold in thresholds_of(model):
        threshold.micro_batches = passes
    draws = [(tokens(2, 30) + n) % 50 for n in (0, 3)]
    sum(model(x[:, :: n + 1]).logits.sin().sum() for n, x in enumerate(draws)).backward()
    for threshold in thresholds_of(model):
        threshold.close_step()
    return torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_several_forward_passes_before_a_checkpointed_backward_pass():
    """The threshold moves in between: it is said, and told of them it does not."""
    model = decoder("llama", HAM, dtype=torch.float64)
    calibrate(model, [tokens(4, 40)])
    with pytest.warns(UserWarning, match="several forward passes .* set threshold.micro_batches"):
        gradients(model, checkpointed=True, passes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(gradients(model, checkpointed=True), gradients(model, checkpointed=False))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for _ in range(3):
            model(tokens(2, 20)).logits.sum().backward()


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "a hybrid"])
@pytest.mark.parametrize("mixer", ["ham", "gdn", "attention"])
def test_an_encoder_as_pytorch_makes_it(mixer, layers):
    """Evaluated with padding on the right, it goes a path of its own around its layers, if it may."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    swap_mixers(encoder, mixer, layers=layers)
    x, padding = torch.randn(2, 9, 16), torch.arange(9) >= torch.tensor([[9], [5]])
    if mixer == "ham":
        calibrate(encoder, [x])
    with torch.no_grad():
        out = encoder.eval()(x, src_key_padding_mask=padding)
        assert_close(out[1, :5], encoder(x[1:, :5])[0], rtol=1e-5, atol=1e-5)


def test_a_copy_of_a_prompts_cache_is_gone_on_with(model):
    model.eval()
    x, cache = tokens(1, 30), DynamicCache()
    with torch.no_grad():
        model(x[:, :20], past_key_values=cache)
        other = copy.deepcopy(cache)
        golden = model(x[:, 20:], past_key_values=cache).logits
        assert torch.equal(model(x[:, 20:], past_key_values=other).logits, golden)
        assert cache.get_seq_length() == other.get_seq_length() == 30
        with pytest.raises(ValueError, match="filled by another mixer"):
            copy.deepcopy(model)(x, past_key_values=other)


def test_a_model_in_training_is_copied_and_averaged():
    model = decoder("llama", {"name": "ham", "router": "demand"}, dtype=torch.float32).train()
    x = tokens(2, 10)
    model(x).logits.sum().backward()
    for other in (copy.deepcopy(model), AveragedModel(model).module):
        assert torch.equal(other.eval()(x).logits, model.eval()(x).logits)
        model.train()


def test_a_wrapper_keeps_no_graph():
    model = decoder("llama", HAM, dtype=torch.float32).train()
    model(tokens(2, 10))
    routing = [module.routing for module in model.modules() if getattr(module, "routing", None) is not None]
    assert len(routing) == 4 and not any(x.requires_grad for one in routing for x in (one.g, one.scores))


def test_a_filled_cache_is_read_in_training_too():
    """With gradients into what is in it; an empty one, which models make of themselves, costs nothing."""
    x, fixed = tokens(2, 20), {"name": "ham", "threshold": {"name": "fixed", "tau": 0.05}}
    model = decoder("llama", fixed, dtype=torch.float64).train()
    cache, first = DynamicCache(), model.model.embed_tokens(x[:, :12]).detach().requires_grad_()
    model.eval()(inputs_embeds=first, past_key_values=cache)
    logits = model.train()(x[:, 12:], past_key_values=cache).logits
    assert cache.get_seq_length() == 20
    assert_close(logits, model(x).logits[:, 12:], rtol=1e-9, atol=1e-9)
    logits.sum().backward()
    assert first.grad.abs().max() > 0
    empty = DynamicCache()
    model(x, past_key_values=empty)
    assert empty.get_seq_length() == 0
    with pytest.raises(ValueError, match="in training keeps no cache of what it read"):
        model(x, past_key_values=empty)
    with torch.no_grad():
        keys = plain("llama")[0].double()(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="its layer 0 holds the keys of an attention layer"):
        model(x, past_key_values=keys)


def test_a_model_that_was_put_into_eval_before_the_swap_keeps_its_cache():
    """As one from a checkpoint is; with gradients, which a loop of one's own may have forgotten to turn off."""
    model = plain("llama")[0].double().eval()
    swap_mixers(model, {"name": "ham", "threshold": {"name": "fixed", "tau": 0.05}})
    assert not any(module.training for module in model.modules())
    x = tokens(2, 20)
    cache = model(x[:, :12], use_cache=True).past_key_values
    assert cache.get_seq_length() == 12
    assert_close(model(x[:, 12:], past_key_values=cache).logits, model(x).logits[:, 12:], rtol=1e-9, atol=1e-9)


def test_the_cache_of_a_model_that_is_gone_is_refused():
    cache = DynamicCache()
    with torch.no_grad():
        decoder("llama", HAM, dtype=torch.float32).eval()(tokens(2, 12), past_key_values=cache)
        gc.collect()
        with pytest.raises(ValueError, match="the cache is of another model"):
            decoder("llama", HAM, dtype=torch.float32).eval()(tokens(2, 12), past_key_values=cache)


def test_a_usage_set_after_two_swaps_is_noted_of_both():
    model = plain("llama")[0]
    swap_mixers(model, HAM, layers=[0])
    swap_mixers(model, HAM, layers=[0], router="cosine")  # of those that are left
    set_kv_usage(model, 0.75)
    assert [swap["mixer"]["kv_usage"] for swap in model.config.mixer_swaps] == [0.75, 0.75]


def test_another_value_or_direction_is_refused():
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2, batch_first=True)})
    swap_mixers(attention, "gdn")
    q, x = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match="query and value differ"):
        attention["a"](q, q, x)
    stack = Stack(Attention)
    swap_mixers(stack, "gdn", causal=True)
    block = next(module for module in stack.modules() if hasattr(module, "reads"))
    with pytest.raises(ValueError, match="reads forwards .* is_causal=False was asked for"):
        block(x, is_causal=False)
    causal = torch.ones(5, 5).tril() > 0
    assert_close(block(x, attn_mask=causal, is_causal=False), block(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threshold", ["calibrated", "controlled", "learned"])
def test_a_threshold_that_is_loaded_is_of_the_usage_asked_for(threshold):
    torch.manual_seed(0)
    options = dict(dim=16, num_heads=2, head_dim=8, threshold=threshold)
    one, other = (build_mixer("ham", kv_usage=usage, **options) for usage in (0.5, 0.1))
    x = torch.randn(4, 60, 16)
    calibrate(one, [x])
    set_kv_usage(one, 0.5)
    other.load_state_dict(one.state_dict())
    assert abs(other.eval()(x).routing.usage.mean() - 0.1) < 0.03
    again = build_mixer("ham", kv_usage=0.5, **options)
    before = {name: value for name, value in one.state_dict().items() if not name.endswith("current_usage")}
    again.load_state_dict(before)  # as it was saved before that was noted
    assert torch.equal(again.eval()(x).routing.stored, one.eval()(x).routing.stored)


@pytest.mark.parametrize("tie", [True, False])
def test_more_tokens(tie):
    model = ours(tie_embeddings=tie)
    model.resize_token_embeddings(60)
    assert model(tokens(1, 5) % 50 + 10).logits.shape == (1, 5, 60) and model.config.vocab_size == 60
    assert (model.decoder.head.weight is model.decoder.embedding.weight) == tie


def test_hidden_states_are_refused():
    with pytest.raises(ValueError, match="MixerForCausalLM gives logits alone: output_hidden_states=True"):
        ours()(tokens(1, 5), output_hidden_states=True)


@pytest.mark.parametrize("kind", ["swapped", "attached"])
def test_a_static_cache_is_refused(kind):
    """Layers beside ours would attend to its empty places."""
    made = decoder("llama", HAM, dtype=torch.float32) if kind == "swapped" else plain("llama")[0]
    if kind == "attached":
        attach(made, layers=[0])
    with pytest.raises(ValueError, match="a static cache was asked for"):
        made.eval().generate(tokens(2, 8), max_new_tokens=2, cache_implementation="static", pad_token_id=0)


def test_batches_that_are_accumulated_weigh_a_routers_loss_once():
    torch.manual_seed(0)
    mixer = {"name": "ham", "num_heads": 2, "router": "demand", "threshold": {"name": "fixed", "tau": 0.5}}
    made = MixerForCausalLM(MixerConfig(vocab_size=50, dim=32, depth=2, mixer=mixer)).double().train()
    ids = tokens(4, 20)

    def gradients(parts):
        made.zero_grad()
        for part in ids.chunk(parts):
            made(part, labels=part, num_items_in_batch=ids[:, 1:].numel()).loss.backward()
        return torch.cat([w.grad.flatten() for name, w in made.named_parameters() if ".router." in name]).norm()

    assert_close(gradients(4), gradients(1), rtol=0.3, atol=0)  # a part's own loss is not quite a part of the whole's


def test_what_transformers_asks_of_a_model():
    made, ids = ours().eval(), tokens(2, 8)
    logits = made(ids).logits
    assert torch.equal(made(ids, return_dict=False)[0], logits)
    with pytest.raises(ValueError, match="reads input_ids: inputs_embeds were given"):
        made(inputs_embeds=made.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="reads input_ids: nothing was given"):
        made()
