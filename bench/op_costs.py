"""What the parts of a PPO iteration cost on this machine, for scaling.py, and what one of `rlhf ppo` then takes.

    python bench/op_costs.py --out bench/results/op_costs_cpu.json           # small models, on the CPU
    python bench/op_costs.py --device cuda --out bench/results/op_costs.json # the models of docs/scaling.md, on a GPU

Layers are timed in models of one and of three, and more are taken to cost the same each; the head's logprobs, sampling,
advantages, losses and Adam are timed at their own sizes. `--ppo 2` runs the trainer on the whole model for so many
iterations, the last of which is kept; on a GPU the default is not to.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import words
from harness import Contender, compare, environment
from scaling import JOBS, SMALL_JOBS, Costs, Job, from_costs
from torch import Tensor, nn

import rlhf_kernels as rk
from rlhf_trainer.models import precision

FEW, MORE = 1, 3  # layers
HEAD_SIZE = 64


def model_of(job: Job, layers: int, length: int) -> nn.Module:
    """Randomly initialised, of the job's shape and that many layers, in evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    m, heads = job.model, job.model.width // HEAD_SIZE
    torch.manual_seed(0)
    ids = {"pad_token_id": m.vocab - 2, "bos_token_id": m.vocab - 1, "eos_token_id": m.vocab - 1}
    if not m.gated:
        sizes = {"n_layer": layers, "n_embd": m.width, "n_head": heads, "n_inner": m.ffn, "n_positions": length}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=m.vocab, **sizes, **drops, **ids)).eval()
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=m.vocab,
            hidden_size=m.width,
            intermediate_size=m.ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=m.kv_width // HEAD_SIZE,
            max_position_embeddings=length,
            tie_word_embeddings=m.tied,
            **ids,
        )
    ).eval()


def prepared(job: Job, layers: int, device: torch.device) -> nn.Module:
    """With the job's adapters and precision."""
    model = model_of(job, layers, job.prompt + job.response).to(device)
    if job.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=job.lora, target_modules="all-linear", fan_in_fan_out=not job.model.gated)
        )
    precision.to_bf16(model, "bfloat16" if job.mixed else "float32")
    return model


class Timer:
    """Median seconds of calls in turn, under the job's autocast, the device's queue waited for."""

    def __init__(self, job: Job, device: torch.device, rounds: int, quiet: float) -> None:
        self._job, self._device, self._rounds, self._quiet = job, device, rounds, quiet
        self.others = 0.0  # share of the cores that other processes had

    def __call__(self, **calls: Callable[[], object] | Contender) -> dict[str, float]:
        contenders = {}
        for name, call in calls.items():
            given = call if isinstance(call, Contender) else Contender(call)
            contenders[name] = Contender(self._waited(given.call), given.prepare)
        found = compare(contenders, self._rounds, quiet=self._quiet)
        self.others = max(self.others, found.others)
        return {name: timing.median / 1e3 for name, timing in found.timings.items()}

    def _waited(self, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            result = call()
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            return result

        return run

    def autocast(self) -> torch.autocast:
        return precision.autocast("bfloat16" if self._job.mixed else "float32", self._device)


def layer_costs(job: Job, layers: int, device: torch.device, timer: Timer) -> dict[str, float]:
    """prefill, step, forward and train of a model of so many layers, as Costs has them."""
    model = prepared(job, layers, device)
    head = rk.head_of(model)
    rows, width = max(1, round(job.rows)), job.prompt + job.response
    ids = torch.randint(0, job.model.vocab - 2, (rows, width), device=device)
    micro, half = ids[: job.micro], job.prompt + job.response // 2
    upstream = torch.ones(*micro.shape, job.model.width, device=device)

    @torch.no_grad()
    def prompts(length: int) -> Any:
        with timer.autocast():
            return model(input_ids=ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values

    cache = prompts(half)

    @torch.no_grad()
    def step() -> Tensor:
        with timer.autocast():
            logits = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits[:, -1]
        return rk.sample_tokens(logits, seed=0)[0]

    def shortened() -> None:
        if cache.get_seq_length() > half:
            cache.crop(half - cache.get_seq_length())

    def hidden() -> Tensor:
        with timer.autocast():
            return head.hidden_states(input_ids=micro)

    found = timer(
        prefill=lambda: prompts(job.prompt),
        step=Contender(step, prepare=shortened),
        forward=torch.no_grad()(hidden),
        train=lambda: hidden().backward(upstream),
    )
    shares = {"prefill": rows, "step": 1, "forward": len(micro), "train": len(micro)}
    return {name: value / shares[name] for name, value in found.items()}


def other_costs(job: Job, device: torch.device, timer: Timer) -> dict[str, float]:
    """head, train_head, optimizer and losses, as Costs has them."""
    m, rows = job.model, max(1, round(job.rows))
    hidden = torch.randn(job.micro, job.response, m.width, device=device, requires_grad=True)
    weight = (torch.randn(m.vocab, m.width, device=device) / m.width**0.5).requires_grad_(not job.lora)
    labels = torch.randint(0, m.vocab, hidden.shape[:2], device=device)
    leaf, other, old, values = (torch.randn(rows, job.response, device=device) for _ in range(4))
    mask = torch.ones(rows, job.response, dtype=torch.bool, device=device)
    parameters = [torch.zeros(min(job.trained, 1 << 24), device=device, requires_grad=True)]
    parameters[0].grad = torch.ones_like(parameters[0])
    adam = torch.optim.Adam(parameters, lr=0.0, fused=True)

    def logprobs() -> Tensor:
        with timer.autocast():
            return rk.linear_logprobs(hidden, weight, labels)

    def optimizer() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()

    def losses() -> None:
        now, value = (x.detach().requires_grad_() for x in (leaf, values))
        _, advantages, returns = rk.ppo_advantages(leaf, other, leaf[:, 0], values, mask, kl_coef=0.05)
        loss = rk.policy_loss(now, old, advantages, mask)[0] + rk.value_loss(value, values, returns, mask)[0]
        loss.backward()

    found = timer(
        head=torch.no_grad()(logprobs),
        train_head=lambda: logprobs().sum().backward(),
        optimizer=optimizer,
        losses=losses,
    )
    shares = {"head": job.micro, "train_head": job.micro, "losses": rows}
    shares["optimizer"] = parameters[0].numel() / job.trained
    return {name: value / shares[name] for name, value in found.items()}


def measured(job: Job, device: torch.device, timer: Timer) -> Costs:
    few, more = (layer_costs(job, layers, device, timer) for layers in (FEW, MORE))
    steps = (job.model.layers - FEW) / (MORE - FEW)
    layers = {name: few[name] + steps * (more[name] - few[name]) for name in few}
    return Costs(**layers, **other_costs(job, device, timer))


def ppo(job: Job, device: torch.device, updates: int) -> dict[str, float]:
    """Seconds of each phase of the last of `updates` iterations of the trainer."""
    from rlhf_trainer import PPOConfig, train_ppo

    with tempfile.TemporaryDirectory() as folder:
        cfg = PPOConfig(
            output_dir=folder,
            updates=updates,
            batch_size=job.batch,
            minibatches=job.minibatches,
            micro_batch_size=job.micro,
            epochs=job.epochs,
            max_new_tokens=job.response,
            lora_r=job.lora,
            lora_targets=["all-linear"],
            lr=1e-6,
            save_every=0,
            dtype="bfloat16" if job.mixed else "float32",
            gradient_checkpointing=job.checkpointing,
            device=device.type,
        )
        result = train_ppo(
            cfg,
            model=model_of(job, job.model.layers, job.prompt + job.response),
            tokenizer=words.tokenizer(job.model.vocab),
            reward=lambda _, completions: [0.0] * len(completions),
            prompts=words.prompts(job.model.vocab, 4 * job.batch, job.prompt),
        )
    return {phase: result.metrics[-1][f"seconds/{phase}"] for phase in ("rollout", "scoring", "update")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quiet", type=float, default=0.3, help="share of the cores others may use while it measures")
    parser.add_argument("--ppo", type=int, help="iterations of `rlhf ppo` beside the costs (2 on a CPU, else 0)")
    parser.add_argument("--only", nargs="*", help="parts of the jobs' names, such as 124M or '8B, LoRA'")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    updates = (2 if device.type == "cpu" else 0) if options.ppo is None else options.ppo
    record: dict[str, Any] = {"environment": environment(), "jobs": {}}
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    record["environment"]["device"] = gpu or f"{record['environment']['cpu']}, {torch.get_num_threads()} threads"
    jobs = SMALL_JOBS if device.type == "cpu" else JOBS
    record["dtype"] = "bfloat16" if jobs[0][1].mixed else "float32"
    for how, job, _ in jobs:
        name = f"{job.model.name}, {how}"
        if options.only and not any(part in name for part in options.only):
            continue
        print(name, flush=True)
        timer = Timer(job, device, options.rounds, options.quiet)
        found: dict[str, Any] = {"costs": asdict(measured(job, device, timer)), "others": timer.others}
        if updates:
            found["rlhf ppo"] = ppo(job, device, updates)
        record["jobs"][name] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    from_costs(record)


if __name__ == "__main__":
    main()
