"""Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438), the scan written as its recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.reference import tokens
from rlhf_kernels.reference.common import select, upcast


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    """rewards, values [B, T], mask [B, T] bool or None, bootstrap [B] or None -> advantages, returns [B, T].

    Right to left: delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.
    """
    rewards, values = upcast(rewards), upcast(values)
    batch, time = rewards.shape
    zeros = rewards.new_zeros(batch)
    next_value = zeros if bootstrap is None else bootstrap.to(rewards.dtype)
    running = zeros
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for t in reversed(range(time)):
        counted = None if mask is None else mask[:, t]
        reward, value = rewards[:, t], values[:, t]
        if counted is not None:
            reward, value = torch.where(counted, reward, 0.0), torch.where(counted, value, 0.0)
        delta = reward + gamma * next_value - value
        scanned = delta + gamma * lam * running
        if counted is None:
            advantages[:, t], returns[:, t] = scanned, scanned + value
            next_value, running = value, scanned
            continue
        advantages[:, t] = torch.where(counted, scanned, 0.0)
        returns[:, t] = torch.where(counted, scanned + value, 0.0)
        if masked == "zero":  # the hole is a step of reward 0 and value 0
            next_value, running = value, scanned
        else:  # "skip" carries across the hole, "stop" starts anew behind it
            kept_value, kept_running = (next_value, running) if masked == "skip" else (zeros, zeros)
            next_value = torch.where(counted, value, kept_value)
            running = torch.where(counted, scanned, kept_running)
    return advantages, returns


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor,
    gamma: float,
    lam: float,
    masked: str,
) -> tuple[Tensor, Tensor]:
    """rewards, values, mask [total], bootstrap [S] or None, cu_seqlens [S + 1] -> advantages, returns [total].

    `gae` on the sequences padded to the longest, on the left: what the scan meets after a sequence's first token
    changes nothing. Reads the longest length, on a GPU with a sync.
    """
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    longest = int((ends - starts).max()) if starts.numel() else 0
    place = ends - longest + torch.arange(longest, device=rewards.device)
    inside = place >= starts
    place = place.clamp(min=0)
    padded_mask = None if mask is None else mask[place]
    padded = gae(rewards[place], values[place], padded_mask, bootstrap, gamma, lam, masked)
    advantages, returns = (x[inside] for x in padded)
    return advantages, returns


def ppo_advantages(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logprobs, ref_logprobs, values, mask [B, T], scores [B] -> advantages, returns, kl [B, T].

    The single ops one after the other; the advantages are not whitened if eps is None.
    """
    kl = select(mask, tokens.per_token_kl(logprobs, ref_logprobs, "k1"))
    rewards = tokens.shaped_rewards(scores, kl, mask, kl_coef, None)
    advantages, returns = gae(rewards, values, mask, None, gamma, lam, "skip")
    if eps is not None:
        advantages = tokens.whiten(advantages, mask, True, eps, None)
    return advantages, returns, kl
