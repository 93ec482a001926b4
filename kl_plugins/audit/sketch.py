"""A gradient of the language-model head, V x H numbers, in at most a few thousand.

The score of a token with respect to the head's weight is the outer product of a vector over the vocabulary (one-hot
minus probabilities) and the last hidden state: so no backward pass is needed, and any term's gradient is a weighted
sum of such products.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Sketch:
    """A fixed linear map of (V, H) matrices to K numbers that keeps inner products.

    If V * H <= `size` it is the matrix itself, and nothing is lost. Else a tensor sketch (Pham and Pagh, "Fast and
    scalable polynomial kernels via explicit feature maps", KDD 2013): both vectors are count-sketched and convolved.
    Being linear it leaves an unbiased gradient unbiased; norms and cosines gain a relative error of the order of
    sqrt(8 / K), the same for all terms.
    """

    def __init__(self, vocabulary: int, hidden: int, *, size: int = 4096, seed: int = 0) -> None:
        self.exact = vocabulary * hidden <= size
        self.size = vocabulary * hidden if self.exact else size
        generator = torch.Generator().manual_seed(seed)
        self._bins = [torch.randint(size, (n,), generator=generator) for n in (vocabulary, hidden)]
        self._signs = [torch.randint(2, (n,), generator=generator) * 2 - 1 for n in (vocabulary, hidden)]

    def outer(self, over_vocabulary: Tensor, over_hidden: Tensor) -> Tensor:
        """(..., K) sketches of the outer products of (..., V) and (..., H)."""
        if self.exact:
            return (over_vocabulary[..., :, None] * over_hidden[..., None, :]).flatten(-2)
        first, second = (torch.fft.rfft(self._count(i, x)) for i, x in enumerate((over_vocabulary, over_hidden)))
        sketched: Tensor = torch.fft.irfft(first * second, n=self.size)
        return sketched

    def _count(self, which: int, x: Tensor) -> Tensor:
        bins, signs = self._bins[which].to(x.device), self._signs[which].to(x)
        return x.new_zeros(*x.shape[:-1], self.size).scatter_add(-1, bins.expand(x.shape), x * signs)
