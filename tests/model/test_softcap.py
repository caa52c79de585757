"""The logits' soft-cap, one for both signs or one for each."""

import torch
import torch.nn.functional as F

from pgolf.ops.softcapped_cross_entropy import soft_cap


def test_caps_of_either_sign(random_model):
    """Equal ones make no difference to the loss; others cap each sign at its own height."""
    model = random_model(torch.float32, asym_logit_rescale=True)
    tokens, targets = torch.randint(64, (2, 2, 9))
    with torch.no_grad():
        model.softcaps.fill_(model.config.logit_softcap)
        model.weights_changed()
        assert not model.caps_differ
        capped = model.capped(model(tokens))
        torch.testing.assert_close(soft_cap(model(tokens), model.softcaps), capped)
        expected = F.cross_entropy(capped.transpose(1, 2), targets, reduction="none")
        torch.testing.assert_close(model.loss(tokens, targets, "none"), expected)
        model.load_state_dict({**model.state_dict(), "softcaps": torch.tensor([2.0, 0.5])})
        assert model.caps_differ
        z = model(tokens)
        capped = torch.where(z > 0, 2.0 * torch.tanh(z / 2.0), 0.5 * torch.tanh(z / 0.5))
        expected = -capped.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(model.loss(tokens, targets, "none"), expected)
        torch.testing.assert_close(model.loss(tokens, targets), expected.mean())
