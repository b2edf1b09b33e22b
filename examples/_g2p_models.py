"""Encoder-decoders from letters to phonemes, and the search for the most probable phonemes.

All have the same three methods: ``forward(letters, lengths, previous)`` has the logits of every step at once (teacher
forcing: ``previous`` are the true phonemes before each step); ``start`` encodes words for the search, ``step`` has the
logits of one step. A state is a tuple of tensors with the words in the first dimension.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from examples._common import layers, run_lengths
from examples._g2p_data import END, LETTER_COUNT, LONGEST, PAD, PHONEME_COUNT, START

State = tuple[Tensor, ...]


class Decoder(Protocol):
    """What the search needs of a model."""

    def start(self, letters: Tensor, lengths: Tensor) -> State: ...

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]: ...


class Attention(nn.Module):
    """Where to look: Luong et al. (2015), by their "dot", or "additive" as in Bahdanau et al. (2015).

    Not divided by sqrt(H) as in a Transformer: states lie between -1 and 1, and it then took longer to learn where to
    look. The queries come from all steps of the decoder's layer at once, and nothing goes back into it.
    """

    def __init__(self, size: int, score: str) -> None:
        super().__init__()
        self.additive = score == "additive"
        if self.additive:
            self.of_key = nn.Linear(size, size // 2)
            self.of_query = nn.Linear(size, size // 2, bias=False)
            self.score = nn.Linear(size // 2, 1, bias=False)
        self.combine = nn.Linear(2 * size, size)

    def keys(self, memory: Tensor) -> Tensor:
        """What the queries are compared with, of ``memory [N, T, H]``: once a word, not once a step."""
        return self.of_key(memory) if self.additive else memory

    def weights(self, query: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        """``[N, S, T]``, zero where not ``valid [N, T]``, of ``query [N, S, H]``; a step's weights add up to one."""
        if self.additive:
            score = self.score(torch.tanh(self.of_query(query).unsqueeze(2) + keys.unsqueeze(1))).squeeze(-1)
        else:
            score = query @ keys.transpose(1, 2)
        return score.masked_fill(~valid.unsqueeze(1), -math.inf).softmax(-1)

    def forward(self, query: Tensor, memory: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
        """``[N, S, H]`` of what was found and what was asked."""
        found = self.weights(query, keys, valid) @ memory
        return torch.tanh(self.combine(torch.cat([found, query], -1)))


class Recurrent(nn.Module):
    """Two LSTM layers; the encoder's last state is where the decoder begins.

    Parameters
    ----------
    attention : None: all that the decoder knows of the word is that state, Sutskever et al. (2014). "dot", "additive":
        the encoder reads in both directions, and the decoder attends to its outputs.
    hidden : the decoder's width; each direction of two has half of it.
    """

    def __init__(self, attention: str | None, hidden: int, embedding: int, backend: str) -> None:
        super().__init__()
        lstm = layers(backend).LSTM
        both = attention is not None
        self.letters = nn.Embedding(LETTER_COUNT, embedding, padding_idx=PAD)
        self.phonemes = nn.Embedding(PHONEME_COUNT, embedding, padding_idx=PAD)
        self.encoder = lstm(embedding, hidden // 2 if both else hidden, batch_first=True, bidirectional=both)
        self.decoder = lstm(embedding, hidden, batch_first=True)
        self.attention = Attention(hidden, attention) if attention else None
        self.logits = nn.Linear(hidden, PHONEME_COUNT)

    def start(self, letters: Tensor, lengths: Tensor) -> State:
        """``letters [N, T]`` to ``h, c [N, H]`` and with attention ``memory, keys [N, T, ...], valid [N, T]``."""
        memory, hidden = run_lengths(self.encoder, self.letters(letters), lengths)
        state = tuple(one.transpose(0, 1).flatten(1) for one in hidden)  # two directions beside each other
        if self.attention is None:
            return state
        valid = torch.arange(letters.size(1)) < lengths.unsqueeze(1)
        return *state, memory, self.attention.keys(memory), valid

    def run(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """The decoder's layer over ``tokens [N, S]``: its outputs ``[N, S, H]``, and the state after them."""
        h, c, *rest = state
        output, (h, c) = self.decoder(self.phonemes(tokens), (h.unsqueeze(0).contiguous(), c.unsqueeze(0).contiguous()))
        return output, (h.squeeze(0), c.squeeze(0), *rest)

    def forward(self, letters: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        return self.steps(previous, self.start(letters, lengths))[0]

    def steps(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits ``[N, S, V]`` after each of ``tokens [N, S]``, and the state."""
        output, state = self.run(tokens, state)
        if self.attention is not None:
            output = self.attention(output, *state[2:])
        return self.logits(output), state

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        logits, state = self.steps(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state

    @torch.no_grad()
    def alignment(self, letters: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        """The attention's weights ``[N, S, T]``."""
        assert self.attention is not None
        query, (_, _, _, keys, valid) = self.run(previous, self.start(letters, lengths))
        return self.attention.weights(query, keys, valid)


class Transformer(nn.Module):
    """torch.nn's encoder and decoder, Vaswani et al. (2017), with the norms first and learned positions."""

    def __init__(self, size: int, heads: int = 4, wide: int = 256, depth: int = 2) -> None:
        super().__init__()
        options: dict[str, Any] = {"dim_feedforward": wide, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.letters = nn.Embedding(LETTER_COUNT, size, padding_idx=PAD)
        self.phonemes = nn.Embedding(PHONEME_COUNT, size, padding_idx=PAD)
        self.positions = nn.Embedding(LONGEST, size)
        encoder = nn.TransformerEncoderLayer(size, heads, **options)
        decoder = nn.TransformerDecoderLayer(size, heads, **options)
        self.encoder = nn.TransformerEncoder(encoder, depth, nn.LayerNorm(size), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, depth, nn.LayerNorm(size))
        self.logits = nn.Linear(size, PHONEME_COUNT)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.xavier_uniform_(weight)

    def embed(self, table: nn.Embedding, tokens: Tensor) -> Tensor:
        """``[N, T]`` to ``[N, T, size]``, with positions."""
        return table(tokens) + self.positions.weight[: tokens.size(1)]

    def start(self, letters: Tensor, lengths: Tensor) -> State:
        """``memory [N, T, size]``, what of it is padding ``[N, T]``, and no phonemes yet ``[N, 0]``."""
        padding = torch.arange(letters.size(1)) >= lengths.unsqueeze(1)
        memory = self.encoder(self.embed(self.letters, letters), src_key_padding_mask=padding)
        return memory, padding, letters.new_empty(len(letters), 0)

    def forward(self, letters: Tensor, lengths: Tensor, previous: Tensor) -> Tensor:
        memory, padding, _ = self.start(letters, lengths)
        return self.logits(self.decode(previous, memory, padding))

    def decode(self, tokens: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """The decoder's outputs ``[N, S, size]``, each from the tokens up to it."""
        future = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).triu(1)
        embedded = self.embed(self.phonemes, tokens)
        return self.decoder(embedded, memory, tgt_mask=future, memory_key_padding_mask=padding)

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """From the start again: torch.nn's decoder keeps no keys and values of the steps before."""
        memory, padding, before = state
        before = torch.cat([before, tokens.unsqueeze(1)], 1)
        return self.logits(self.decode(before, memory, padding)[:, -1]), (memory, padding, before)


@torch.no_grad()
def beam_search(
    model: Decoder, letters: Tensor, lengths: Tensor, width: int, limit: int = LONGEST
) -> tuple[Tensor, Tensor]:
    """The most probable phonemes among those that stay within the best ``width`` at every step; 1: greedy.

    Parameters
    ----------
    letters : int64 ``[N, T]``. lengths : int64 ``[N]``.
    limit : the largest number of steps; what has not ended by then is cut off.

    Returns
    -------
    phonemes : int64 ``[N, limit]``, with END, if it was reached, and PAD after it.
    score : ``[N]``, the logarithm of their probability.
    """
    words, left = len(letters), torch.arange(len(letters))
    result, result_scores = torch.full((words, limit), PAD), torch.zeros(words)
    state = tuple(one.repeat_interleave(width, 0) for one in model.start(letters, lengths))
    tokens = torch.full((words * width,), START)
    scores = torch.full((words, width), -math.inf)
    scores[:, 0] = 0  # all hypotheses of a word are the same as yet
    found = torch.empty(words * width, 0, dtype=torch.int64)
    for step in range(limit):
        logits, state = model.step(tokens, state)
        steps = logits.log_softmax(-1)
        steps[:, [PAD, START]] = -math.inf
        ended = (tokens == END) | (tokens == PAD)
        steps[ended] = -math.inf
        steps[ended, PAD] = 0
        scores, best = (scores.unsqueeze(-1) + steps.view(len(left), width, -1)).flatten(1).topk(width)
        # No hypothesis gains by going on: a word whose best one has ended is done, and leaves the search.
        done = (best[:, 0] % PHONEME_COUNT == END) | (best[:, 0] % PHONEME_COUNT == PAD)
        if step == limit - 1:
            done[:] = True
        rows = torch.arange(len(left)).unsqueeze(1) * width + best // PHONEME_COUNT
        found = torch.cat([found[rows], (best % PHONEME_COUNT).unsqueeze(-1)], -1)
        result[left[done], : step + 1], result_scores[left[done]] = found[done, 0], scores[done, 0]
        if done.all():
            break
        left, scores, found = left[~done], scores[~done], found[~done].flatten(0, 1)
        tokens, state = found[:, -1], tuple(one[rows[~done].flatten()] for one in state)
    return result, result_scores
