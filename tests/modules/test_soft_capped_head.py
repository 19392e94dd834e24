"""Capped logits, and their gradient through our loss."""

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules import TransformerDecoder

from qst_tune.modules import LinearCrossEntropyLoss
from qst_tune.modules.soft_capped_head import SoftCappedHead


class Model(TransformerDecoder):
    """What a loss sees of a model."""

    def __init__(self, output: nn.Module) -> None:
        nn.Module.__init__(self)
        self.output = output


def test_logits_are_capped_and_the_embedding_is_not_owned() -> None:
    embedding = nn.Embedding(11, 5)
    head, y = SoftCappedHead(embedding, 3.0), 10 * torch.randn(2, 4, 5)
    expected = 3 * torch.tanh(y @ embedding.weight.T / 3)
    torch.testing.assert_close(head(y), expected)
    assert head(y).abs().max() > 2.9
    assert dict(head.named_parameters()) == {}


def test_the_loss_has_the_gradient_of_the_capped_logits() -> None:
    embedding = nn.Embedding(11, 5)
    head, labels = SoftCappedHead(embedding, 3.0), torch.randint(11, (7,))
    loss = LinearCrossEntropyLoss(chunk_tokens=3)
    loss.set_model_output(Model(head))
    y = torch.randn(7, 5, requires_grad=True)
    logits = 3 * torch.tanh(y @ embedding.weight.T / 3)
    expected = F.cross_entropy(logits, labels)
    (expected_grad,) = torch.autograd.grad(expected, y)
    actual = loss(y, labels)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, y)[0], expected_grad)
