"""A frozen network that turns captions into embeddings: one for each token, and one for the whole."""

from collections.abc import Callable, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TextEncoder", "Tokenize"]

# Part of every fingerprint: to be raised when this file makes other numbers of the same weights and options.
VERSION = 1
# Captions that go through the network together, on a CPU and on other devices; always as many, as in image_encoder.py.
CHUNK = {"cpu": 8}
DEVICE_CHUNK = 32
# A token that the original takes for padding wherever it stands. In CLIP's vocabulary it is also a "!" which something
# else follows without a space, and networks that were trained on the original's encodings never saw that one.
PADDING = 0

# From a caption to the numbers of its tokens, the start and the end included; of any length.
Tokenize = Callable[[str], Sequence[int]]


class TextEncoder:
    """The text half of a CLIP.

    What it makes of a caption does not depend on the captions that come with it.

    Attributes:
        net: from tokens [B, num_tokens] to states [B, num_tokens, dim], after its last norm, and projections
            [B, embed_dim]. A state depends on the tokens up to its own alone.
        dim: numbers in the encoding of a token.
        embed_dim: numbers in the embedding of a caption.
        num_tokens: tokens that it sees, the start and the end included. Of a longer caption it sees the beginning.
        num_cut: captions that were longer than that, so far.
    """

    def __init__(
        self,
        net: nn.Module,
        tokenize: Tokenize,
        *,
        end: int,
        dim: int,
        embed_dim: int,
        num_tokens: int,
        vocabulary: str,
    ) -> None:
        """Wrap a network.

        Args:
            net: see above.
            tokenize: makes its tokens.
            end: the token that ends a caption.
            dim, embed_dim, num_tokens: see above.
            vocabulary: says what `tokenize` does; equal for those that make equal tokens.
        """
        self.net = net.float().eval().requires_grad_(False)
        self.dim, self.embed_dim, self.num_tokens = dim, embed_dim, num_tokens
        self.num_cut = 0
        self._tokenize, self._end, self._vocabulary = tokenize, end, vocabulary

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides an encoding: weights, tokens and options; computed when first asked for."""
        facts = (VERSION, type(self.net).__name__, self.num_tokens, self._end, self._vocabulary)
        digest = sha256(repr(facts).encode())
        digest.update(repr(getattr(self.net, "options", None)).encode())
        for name, tensor in sorted(self.net.state_dict().items()):
            if tensor.is_floating_point():  # the others are counters and tables of places
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()))
        return digest.hexdigest()[:32]

    def to(self, device: torch.device | str) -> Self:
        """This encoder, on a device."""
        self.net.to(device)
        return self

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Encodings of the tokens of each caption, float32 [B, num_tokens, dim], on the device of the network.

        As DALLE2-pytorch's CLIP adapters have them: zeros after the token that ends the caption, and where a token's
        number is 0.
        """
        return self._run(captions)[0]

    def pooled(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of the captions, projected and of length 1; float32 [B, embed_dim], where the network is."""
        return F.normalize(self._run(captions)[1], dim=1)

    @torch.no_grad()
    def _run(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        device = next(self.net.parameters()).device
        chunk = CHUNK.get(device.type, DEVICE_CHUNK)
        found = [
            self._chunk(captions[start : start + chunk], chunk, device) for start in range(0, len(captions), chunk)
        ]
        if not found:
            return torch.empty(0, self.num_tokens, self.dim, device=device), torch.empty(
                0, self.embed_dim, device=device
            )
        states, embeds = zip(*found, strict=True)
        return torch.cat(states), torch.cat(embeds)

    def _chunk(self, captions: Sequence[str], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = [self._row(caption) for caption in captions]
        tokens = torch.tensor(rows + rows[-1:] * (size - len(rows)), device=device)  # [size, num_tokens]
        with torch.autocast(device.type, enabled=False):  # the same encoding in any run's precision
            states, embed = self.net(tokens)
        ended = (tokens == self._end).cumsum(1) - (tokens == self._end).int()  # ends before each token
        hidden = (ended > 0) | (tokens == PADDING)
        states = states.float().masked_fill(hidden[..., None], 0.0)
        return states[: len(rows)], embed[: len(rows)].float()

    def _row(self, caption: str) -> list[int]:
        """A caption's tokens: the end stands last, also of one that was cut; then it is repeated."""
        tokens = list(self._tokenize(caption))
        if len(tokens) > self.num_tokens:
            self.num_cut += 1
            tokens = [*tokens[: self.num_tokens - 1], self._end]
        return tokens + [self._end] * (self.num_tokens - len(tokens))
