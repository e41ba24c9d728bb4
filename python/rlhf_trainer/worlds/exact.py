"""A world small enough to enumerate, in which the optimum of KL-regularised RL is known exactly.

4 letters and EOS, responses of at most 5 tokens: 4^0 + ... + 4^4 that end, 4^5 that do not, 1,365 in all. With reward r
and penalty beta the best policy is pi* = pi_ref exp(r / beta) / Z, its value J* = beta E log Z, and for every policy
J* - J(pi) = beta E KL(pi || pi*): how much of the gap from J(ref) to J* PPO closes is an exact number.

A separator closes every prompt: without it prompt "a" with response "b" is the same text as prompt "ab", and no model
could represent pi*.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_kernels import linear_logprobs
from rlhf_trainer.data.rows import encode_completion, encode_prompt, left_pad
from rlhf_trainer.models.forward import head_inputs
from rlhf_trainer.models.seq2seq import force_eager_attention, is_encoder_decoder

LETTERS = "abcd"
MAX_TOKENS = 5
PROMPTS = ["a", "b", "c", "d", "ab", "bc", "cd", "da"]  # two lengths, so that left padding matters
ExactReward = Callable[[Sequence[str], Sequence[str], Sequence[bool]], list[float]]  # prompts, responses, which ended


def oracle(prompts: Sequence[str], completions: Sequence[str], ended: Sequence[bool] | None = None) -> list[float]:
    """+1 if the first letter is the prompt's last, +0.5 for each successor letter (at most 2), -0.25 per letter that
    the length is away from 2, -1 without EOS. A text does not show its EOS: without `ended`, 5 letters have none."""
    if ended is None:
        ended = [len(text) < MAX_TOKENS for text in completions]
    return [_oracle(*each) for each in zip(prompts, completions, ended, strict=True)]


def _oracle(prompt: str, text: str, ended: bool) -> float:
    successors = sum(LETTERS[(LETTERS.index(a) + 1) % len(LETTERS)] == b for a, b in itertools.pairwise(text))
    return 1.0 * (text[:1] == prompt[-1]) + 0.5 * min(successors, 2) - 0.25 * abs(len(text) - 2) - 1.0 * (not ended)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """An ordinary tokenizer: one token a letter, and <sep> after every prompt."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<sep>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <sep>", special_tokens=[("<sep>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", sep_token="<sep>", padding_side="left"
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A two-layer Phi of width 32 that can only produce letters and EOS: its head has a bias, -1e4 at <pad> and <sep>.

    Otherwise probability on those two would leave the enumerated world, and the exact figures would not see it.
    """
    torch.manual_seed(seed)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            initializer_range=0.1,  # the usual 0.02 is for wide models: 0.978 of the gap instead of 0.989
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        model.lm_head.bias[[tokenizer.pad_token_id, tokenizer.sep_token_id]] = -1e4
    return model.eval()


def make_seq2seq(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A T5 with two layers of width 32 on either side, and the same bias in its head."""
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(
        T5Config(  # type: ignore[call-arg]  # what every config takes, transformers types nowhere
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.lm_head = torch.nn.Linear(32, len(tokenizer))  # T5's own has no bias
    with torch.no_grad():
        model.lm_head.bias[[tokenizer.pad_token_id, tokenizer.sep_token_id]] = -1e4
    return force_eager_attention(model.eval())


def corpus(size: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, response) pairs of a noisy Markov chain: a letter stays, steps on, jumps or ends."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number in range(size):
        prompt = PROMPTS[number % len(PROMPTS)]
        at, text = LETTERS.index(prompt[-1]), ""
        for draw in torch.rand(MAX_TOKENS, 2, generator=generator).tolist():
            if text and draw[0] < 0.25:
                break
            at = (at + 1) % 4 if draw[1] < 0.3 else at if draw[1] < 0.45 else int(draw[1] * 4e6) % 4
            text += LETTERS[at]
        pairs.append((prompt, text))
    return pairs


def fit_reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 400) -> None:
    """Next-token training on the corpus: the reference policy."""
    pairs = corpus(8192, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = [pairs[i] for i in torch.randint(len(pairs), (256,), generator=generator).tolist()]
        ids, mask, targets = _sequences(tokenizer, [p for p, _ in chosen], [r for _, r in chosen])
        loss = -_logprobs(model, ids, mask, targets, 1.0).sum() / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _sequences(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], responses: Sequence[str], max_tokens: int = MAX_TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and targets [B, L]: prompt + response + EOS (none after max_tokens letters), and its targets."""
    heads = {prompt: encode_prompt(tokenizer, prompt) for prompt in PROMPTS}
    tails = {text: encode_completion(tokenizer, text, eos=len(text) < max_tokens) for text in set(responses)}
    ids, mask = left_pad(
        [heads[prompt] + tails[text] for prompt, text in zip(prompts, responses, strict=True)], tokenizer.pad_token_id
    )
    counted = torch.tensor([len(tails[text]) for text in responses])
    return ids, mask, torch.arange(ids.shape[1]) >= ids.shape[1] - counted.unsqueeze(1)


def _logprobs(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    targets: Tensor,
    temperature: float,
    max_tokens: int = MAX_TOKENS,
) -> Tensor:
    """Logprob of every target token [B, L - 1] ([B, max_tokens] of an encoder-decoder model), 0 elsewhere."""
    start = 1
    if is_encoder_decoder(model):
        start = ids.shape[1] - max_tokens
        ids, mask, targets = _responses_right(ids, mask, targets, max_tokens)
    return linear_logprobs(**head_inputs(model, ids, mask, start), mask=targets[:, start:], temperature=temperature)


def _responses_right(ids: Tensor, mask: Tensor, targets: Tensor, max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, targets [B, L] of `_sequences` with responses beginning at column L - max_tokens.

    Where a response has fewer tokens, padding on the left of its row moves to the right.
    """
    lacking = max_tokens - targets.sum(-1, keepdim=True)
    columns = (torch.arange(ids.shape[1]) + lacking) % ids.shape[1]
    return ids.gather(1, columns), mask.gather(1, columns), targets.gather(1, columns)


@dataclass
class ExactMetrics:
    """Exact figures of a policy: J = E[r] - beta KL(pi || ref), and KL(pi || pi*), averaged over the prompts."""

    objective: float
    kl_to_optimum: float
    kl_to_reference: float
    reward: float
    length: float


class ExactWorld:
    """The enumerated world around a reference policy, at one beta and sampling temperature.

    reward: as `oracle`, which is the standard one. max_tokens: the longest response.
    """

    def __init__(
        self,
        reference: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        beta: float,
        temperature: float,
        *,
        reward: ExactReward = oracle,
        max_tokens: int = MAX_TOKENS,
    ):
        self.tokenizer, self.beta, self.temperature, self.max_tokens = tokenizer, beta, temperature, max_tokens
        texts = ["".join(t) for n in range(max_tokens + 1) for t in itertools.product(LETTERS, repeat=n)]
        self.pairs = [(prompt, text) for prompt in PROMPTS for text in texts]
        prompts, responses = [p for p, _ in self.pairs], [r for _, r in self.pairs]
        self.inputs = _sequences(tokenizer, prompts, responses, max_tokens)
        shape, ended = (len(PROMPTS), len(texts)), [len(response) < max_tokens for response in responses]
        self.rewards = torch.tensor(reward(prompts, responses, ended), dtype=torch.float64).view(shape)
        self.lengths = torch.tensor([len(r) for r in responses], dtype=torch.float64).view(shape)
        self.reference = self.log_policy(reference)
        tilted = self.reference + self.rewards / beta
        log_z = tilted.logsumexp(-1, keepdim=True)
        self.optimum = tilted - log_z
        self.best = beta * log_z.mean().item()

    @torch.no_grad()
    def log_policy(self, model: PreTrainedModel) -> Tensor:
        """Log-probability of every response to every prompt [8, 1365], float64."""
        total = _logprobs(model, *self.inputs, self.temperature, self.max_tokens).double().sum(-1)
        return total.view(self.rewards.shape)

    def measure(self, model: PreTrainedModel) -> ExactMetrics:
        log_pi = self.log_policy(model)
        pi = log_pi.exp()

        def mean(x: Tensor) -> float:
            return (pi * x).sum(-1).mean().item()

        kl = mean(log_pi - self.reference)
        reward = mean(self.rewards)
        kl_to_optimum = mean(log_pi - self.optimum)
        return ExactMetrics(reward - self.beta * kl, kl_to_optimum, kl, reward, mean(self.lengths))

    def score_deviation(self) -> float:
        """Standard deviation of the rewards of the optimum's answers to a prompt, averaged over the prompts."""
        pi = self.optimum.exp()
        mean = (pi * self.rewards).sum(-1, keepdim=True)
        return (pi * (self.rewards - mean) ** 2).sum(-1).sqrt().mean().item()

    def gap_closed(self, objective: float, at_reference: float) -> float:
        """Share of the way from J(ref) to J*: 0 at the reference, 1 at the optimum."""
        return (objective - at_reference) / (self.best - at_reference)
