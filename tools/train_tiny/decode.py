"""Batched greedy decoding with a cache, drafting one token ahead with the MTP block to measure its acceptance.

For evaluation only: no scheduling, no sampling. Invariant: padded vocabulary rows are never chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train_tiny import chat
from tools.train_tiny.model import ForwardPlan, LayerCache, TinyModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """Greedy continuations and how often the draft agreed."""

    outputs: list[list[int]]  # without the end-of-sentence token
    num_drafts: int
    num_accepted: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """How to decode."""

    max_new_tokens: int = 640
    num_vocab: int = 3552  # tokenizer entries; rows above are padding
    is_sparse: bool = True


@torch.no_grad()
def decode_greedy(model: TinyModel, prompts: list[list[int]], config: DecodeConfig) -> Decoded:
    """Continues every prompt until its end-of-sentence token."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.full((len(prompts), longest), chat.PAD_ID, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    return _Decoder(model, config, longest + config.max_new_tokens).run(ids, lengths)


class _Decoder:
    """One batch: caches, and the loop."""

    def __init__(self, model: TinyModel, config: DecodeConfig, capacity: int) -> None:
        self.model, self.config, self.capacity = model, config, capacity
        self.caches = [LayerCache() for _ in model.model.layers]
        self.plan = ForwardPlan(is_sparse=config.is_sparse)

    def run(self, ids: Tensor, lengths: Tensor) -> Decoded:
        """ids: [B, S] right-padded; lengths: [B]"""
        last = (lengths - 1).unsqueeze(1)  # [B, 1], position of the newest cached token
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self.model.hidden_states(ids, positions, self.plan, self.caches, self.capacity)
        token = self._choose(_rows(hidden, last))  # [B, 1]
        next_ids = torch.cat((ids[:, 1:], ids[:, :1]), dim=1).scatter(1, last, token)
        draft = self._choose(_rows(self._mtp(hidden, next_ids, positions), last))
        outputs, drafts, accepted = [token], 0, 0
        running = token != chat.EOS_ID
        for _ in range(self.config.max_new_tokens - 1):
            last = last + 1
            hidden = self.model.hidden_states(token, last, self.plan, self.caches, self.capacity)
            token = torch.where(running, self._choose(hidden), chat.EOS_ID)
            drafts += int(running.sum())
            accepted += int(((draft == token) & running).sum())
            draft = self._choose(self._mtp(hidden, token, last))
            outputs.append(token)
            running = running & (token != chat.EOS_ID)
            if not bool(running.any()):
                break
        rows = torch.cat(outputs, dim=1).tolist()
        return Decoded(outputs=[_until_eos(row) for row in rows], num_drafts=drafts, num_accepted=accepted)

    def _mtp(self, hidden: Tensor, next_ids: Tensor, positions: Tensor) -> Tensor:
        return self.model.mtp_hidden_states(hidden, next_ids, positions, self.plan, self.caches[-1], self.capacity)

    def _choose(self, hidden: Tensor) -> Tensor:
        """Greedy ids [B, S]; the lowest id wins ties."""
        return self.model.lm_head(hidden).float()[..., : self.config.num_vocab].argmax(dim=-1)


def _rows(hidden: Tensor, at: Tensor) -> Tensor:
    """hidden [B, S, D] at positions [B, 1] -> [B, 1, D]"""
    return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def _until_eos(row: list[int]) -> list[int]:
    return row[: row.index(chat.EOS_ID)] if chat.EOS_ID in row else row
