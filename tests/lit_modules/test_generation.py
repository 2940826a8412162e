import pytest
import torch

from lit_modules.generation import generate


@pytest.mark.parametrize("mixer", ["ham", "gdn", "attention"])
def test_the_state_gives_what_reading_everything_again_gives(make_model, mixer):
    model = make_model(mixer=mixer).eval()
    prompt = torch.randint(0, 33, (2, 5))
    tokens = generate(model.decoder, prompt, num_tokens=6, temperature=0)
    assert tokens.shape == (2, 11) and torch.equal(tokens[:, :5], prompt)
    with torch.no_grad():
        for t in range(5, 11):
            assert torch.equal(tokens[:, t], model(tokens[:, :t])[:, -1].argmax(-1))


def test_draws_follow_the_seed(make_model):
    model = make_model().eval()
    prompt = torch.randint(0, 33, (2, 5))
    first, again, other = (generate(model.decoder, prompt, num_tokens=20, temperature=2.0, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
