"""Training and scoring hold no logits: no op's result is as large as those of the tokens that count."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from rlhf_trainer import PPOConfig, dpo, ppo, sft
from rlhf_trainer.data.records import Pair
from rlhf_trainer.data.rows import TokenizedExample, TokenizedPair
from rlhf_trainer.judging.judges import ModelJudge
from rlhf_trainer.models import logprobs
from rlhf_trainer.models.from_scratch import build_tokenizer
from rlhf_trainer.models.seq2seq import force_eager_attention
from rlhf_trainer.onpolicy.value_head import ValueHead
from rlhf_trainer.sampling.rollout import Rollout

V, D, B, P, R = 5000, 16, 32, 4, 32
LLAMA = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64}
T5 = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
CAUSAL = lambda: LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=D, **LLAMA))  # noqa: E731
MODELS = {
    "causal": CAUSAL,
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=V, d_model=D, decoder_start_token_id=0, **T5)
    ),
}


class Largest(TorchDispatchMode):
    """The largest result of any op that runs in the block, forward or backward, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = 0 if tensor.is_meta else tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, min(storage, math.prod(tensor.shape)))
        return result


def made(name):
    torch.manual_seed(0)
    return force_eager_attention(MODELS[name]().eval())


def rows_of_text(count):
    generator = torch.Generator().manual_seed(0)
    return [TokenizedExample(torch.randint(2, V, (P + R,), generator=generator).tolist(), P) for _ in range(count)]


def test_the_watch_sees_logits():
    model, ids = made("causal"), torch.ones(B, R, dtype=torch.long)
    with Largest() as largest:
        model(ids)
    assert largest.elements == B * R * V


@pytest.mark.parametrize("name", MODELS)
def test_ppo_assesses_and_updates_without_logits(name):
    model, head = made(name), ValueHead(D)
    ids = torch.randint(2, V, (B, P + R), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).bool()
    rollout = Rollout(ids, mask, P, torch.ones(B).bool(), ["x"] * B, ["y"] * B)
    cfg = PPOConfig(batch_size=B, minibatches=1, entropy_coef=0.01, micro_batch_size=None)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    with Largest() as largest:
        batch = ppo.compute_advantages(model, made(name), head, rollout, torch.randn(B), torch.arange(B), 0.1, cfg)
        stats = ppo.update_policy(model, head, optimizer, batch, [torch.arange(B)] * 2, 0, cfg)
    assert stats[0]["ratio"] == 1.0 != stats[1]["ratio"]
    assert V * D <= largest.elements < B * R * V / 4


@pytest.mark.parametrize("name", MODELS)
def test_supervised_losses_without_logits(name):
    model = made(name)
    with Largest() as largest:
        logprobs.completion_losses(model, rows_of_text(B), 0).sum().backward()
        sft.mean_loss(model, rows_of_text(B), 0, B)
    assert V * D <= largest.elements < B * R * V / 4
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_dpo_without_logits():
    model, rows, cfg = made("causal"), rows_of_text(B), dpo.DPOConfig()
    items = [
        dpo.PairWithReference(TokenizedPair(Pair("p", "c", "r"), *pair), -1.0, -1.0)
        for pair in zip(rows[::2], rows[1::2], strict=True)
    ]
    with Largest() as largest:
        dpo.PairLoss(model, 0, cfg).losses(items).sum().backward()
        dpo.all_logprobs(model, rows, 0, cfg)
    assert V * D <= largest.elements < B * R * V / 4


@pytest.mark.parametrize("name", MODELS)
def test_a_judge_reads_two_letters_without_logits(name):
    tokenizer = build_tokenizer(["x A B"] * 4, 262)
    judge = ModelJudge(made(name), tokenizer, "?")
    with Largest() as largest:
        judge._forward([[2] * P] * (B * R))
    assert V * D <= largest.elements < B * R * V / 4
