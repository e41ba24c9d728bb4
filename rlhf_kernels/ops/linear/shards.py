"""A vocabulary sharded over the ranks of a process group: whose tokens are where, and one softmax from the shards'."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def local(op: str, name: str, x: Any, group: dist.ProcessGroup | None) -> Any:
    """This rank's rows of a DTensor, whose gradient becomes a DTensor again; others as they are."""
    if not hasattr(x, "to_local"):
        return x
    if group is None:
        raise TypeError(
            f"{op}: {name} is a DTensor; it takes {name}.full_tensor(), or with process_group a DTensor sharded by rows"
        )
    by_rows = x.device_mesh.ndim == 1 and x.placements[0].is_shard(0)
    if not by_rows or dist.get_process_group_ranks(x.device_mesh.get_group()) != dist.get_process_group_ranks(group):
        raise ValueError(
            f"{op}: {name} lies on {x.device_mesh} as {x.placements}; with process_group it takes (Shard(dim=0),) on "
            f"that group's mesh"
        )
    return x.to_local()


def group_of(name: str) -> dist.ProcessGroup:
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def gathered(x: Tensor, group: str) -> Tensor:
    """x of every rank [ranks, ...], in one collective."""
    handle = group_of(group)
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(handle))]
    dist.all_gather(parts, x, group=handle)
    return torch.stack(parts)


def summed(x: Tensor, group: str) -> Tensor:
    """x summed over the ranks, in place."""
    dist.all_reduce(x, group=group_of(group))
    return x


def merged(states: Tensor, temperature: float | Tensor) -> Tensor:
    """One softmax from those of the shards, summed in the order of the ranks on every rank."""
    m, s, w, label = states.unbind(-1)
    top = m.amax(0)
    shift = m - torch.where(top == float("-inf"), 0.0, top)
    scale = torch.exp(shift / temperature)
    w = torch.where(scale == 0, 0.0, (w + s * shift) * scale)
    seen = ~label.isnan()
    label = torch.where(seen.any(0), torch.where(seen, label, 0.0).sum(0), float("nan"))
    return torch.stack([top, (s * scale).sum(0), w.sum(0), label], -1)


def merged_kl(stats: Tensor, temperature: float | Tensor, forward: bool) -> tuple[Tensor, Tensor]:
    """KL [R] of the whole rows and their stats [R, 5], from full_kl's stats of the shards [ranks, R, 5] float64.

    The mean of d - d' over the first row's shard moves by the shifts of both maxima, and counts by the shard's share.
    """
    m, log_s, m_ref, log_s_ref, mean = stats.unbind(-1)
    top, log_sum = _merged_sum(m, log_s, temperature)
    top_ref, log_sum_ref = _merged_sum(m_ref, log_s_ref, temperature)
    rise, rise_ref = m - top, m_ref - top_ref
    if forward:
        shift, share, some = rise_ref - rise, _share(rise_ref, log_s_ref, log_sum_ref, temperature), rise_ref
        other, difference = rise, log_sum_ref - log_sum
    else:
        shift, share, some = rise - rise_ref, _share(rise, log_s, log_sum, temperature), rise
        other, difference = rise_ref, log_sum - log_sum_ref
    nothing = some == float("-inf")
    # The first row gives a chance, however small, where the second has none.
    beyond = ~nothing & ((other == float("-inf")) | mean.isinf())
    terms = torch.where(nothing, 0.0, torch.where(beyond, float("inf"), share * (mean + shift)))
    whole = terms.sum(0)
    return whole / temperature - difference, torch.stack([top, log_sum, top_ref, log_sum_ref, whole], -1)


def _merged_sum(m: Tensor, log_s: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and log sum of the whole rows, NaN where they are only -inf."""
    top = m.amax(0)
    terms = torch.where(m == float("-inf"), 0.0, torch.exp(log_s + (m - top) / temperature))
    return top, torch.where(top == float("-inf"), float("nan"), terms.sum(0).log())


def _share(rise: Tensor, log_s: Tensor, log_sum: Tensor, temperature: float | Tensor) -> Tensor:
    """What part of the rows' probability is in each shard."""
    return torch.exp(log_s + rise / temperature - log_sum)


def shard(group: dist.ProcessGroup | None, vocab: int, device: torch.device) -> tuple[int, int, int]:
    """Token of this rank's first row, tokens of all ranks and of the largest shard; one collective, one host sync."""
    if group is None:
        return 0, vocab, vocab
    counts: list[int] = gathered(torch.tensor(vocab, device=device), group.group_name).tolist()
    return sum(counts[: dist.get_rank(group)]), sum(counts), max(counts)
