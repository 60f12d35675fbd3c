"""The continuous bag of words: predict a word from the mean of its neighbours' vectors.

*Source*: T. Mikolov et al., "Efficient Estimation of Word Representations in Vector Space",
arXiv:1301.3781; a word model on which arXiv:2312.12226 tests its parametrization. No bias by default,
as in word2vec; a full softmax over the vocabulary.
"""

from __future__ import annotations

from torch import Tensor, nn

from mupx.models.arguments import require_sequence, require_sizes, require_token_ids


class CBOW(nn.Module):
    """``embedding → mean over the window → output``."""

    def __init__(self, width: int, vocabulary: int, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.output = nn.Linear(width, vocabulary, bias=bias)

    def forward(self, context: Tensor) -> Tensor:
        """Return logits ``[N, classes]`` of the word in the middle of each window ``[N, 2 w]``."""
        require_token_ids("cbow", context)
        logits: Tensor = self.output(self.embedding(context).mean(-2))
        return logits


def build(width: int, *, input_shape: tuple[int, ...], classes: int, bias: bool = False) -> CBOW:
    """Build a CBOW with torch's default init.

    Args:
        width: Length of a word vector.
        input_shape: ``[2 w]``: w words on either side of the one to predict.
        classes: Vocabulary size.
        bias: Whether the read-out has a bias.

    Raises:
        UsageError: An argument is out of range.
    """
    require_sizes(width, input_shape, classes)
    require_sequence("cbow", input_shape)
    return CBOW(width, classes, bias)
