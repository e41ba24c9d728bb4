"""Memory and time of a PPO iteration: `docs/scaling.md` holds what this prints.

    python bench/scaling.py                                          # three model sizes, one GPU to a cluster, on paper
    python bench/scaling.py --costs bench/results/op_costs_cpu.json  # from costs that bench/op_costs.py has measured

On paper a GPU's rates are its data sheet's times the share that is assumed to be reached (`Machine`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

GiB = 2**30
WORKSPACE = 64 * 2**20  # bytes: the linear family's


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    width: int
    ffn: int  # per projection; a gated MLP has three, an ungated one two
    kv_width: int  # key-value heads times head size
    vocab: int
    tied: bool
    gated: bool = True

    @property
    def body(self) -> int:
        """Weights outside embedding and head."""
        attention = 2 * self.width * (self.width + self.kv_width)
        return self.layers * (attention + (3 if self.gated else 2) * self.width * self.ffn)

    @property
    def head(self) -> int:
        return self.width * self.vocab

    @property
    def weights(self) -> int:
        return self.body + self.head * (1 if self.tied else 2)


@dataclass(frozen=True)
class Machine:
    name: str
    memory: float  # bytes a device
    flops: float  # 1/s, of the dtype that computes
    bandwidth: float  # bytes/s, of the memory
    link: float  # bytes/s from one device to the others
    reached: float = 0.4  # share of `flops` in forward and backward
    streamed: float = 0.6  # share of `bandwidth` in decoding
    overhead: float = 0.3e-3  # seconds a layer and decode step: Python and kernel launches


@dataclass(frozen=True)
class Costs:
    """Seconds on one device at one job's sizes; "a sequence" is one prompt and its response."""

    prefill: float  # one prompt through the model
    step: float  # one token decoded and sampled, of all rows of the device together
    forward: float  # a sequence through the layers, without gradients
    train: float  # the same, and its backward
    head: float  # a response's logprobs from its hidden states, without gradients
    train_head: float  # the same, and their backward
    optimizer: float  # one step
    losses: float  # a sequence's share in advantages and losses


@dataclass(frozen=True)
class Job:
    model: Model
    devices: int
    sharded: bool = False  # FSDP 2, else every device holds everything
    lora: int = 0  # rank; reference and reward then share the base
    batch: int = 256
    micro: int = 4
    prompt: int = 256
    response: int = 256
    epochs: int = 4
    minibatches: int = 2
    frozen: int = 2  # bytes of a frozen weight: --dtype bfloat16
    mixed: bool = True  # matrix products in bf16 from rounded copies of the trained float32 weights
    checkpointing: bool = True
    gather: bool = True  # FSDP 2: --gather_for_rollout
    reward: bool = True  # on these devices; else a function that asks elsewhere

    @property
    def rows(self) -> float:
        """Sequences of one device."""
        return self.batch / self.devices

    @property
    def trained(self) -> int:
        """Parameters with gradient and optimizer states; LoRA on every linear layer of the body."""
        m = self.model
        if not self.lora:
            return m.weights
        shapes = [(m.width, m.width), (m.width, m.kv_width), (m.width, m.kv_width), (m.width, m.width)]
        shapes += [(m.width, m.ffn)] * (3 if m.gated else 2)
        return m.layers * self.lora * sum(a + b for a, b in shapes)


def frozen(job: Job) -> float:
    """Bytes of a frozen copy of the model: linear layers in bf16, the embedding in float32."""
    return job.model.weights * job.frozen + job.model.head * (4 - job.frozen)


def stored(job: Job) -> float:
    """Bytes of the policy's weights: what is trained is float32."""
    return frozen(job) + job.trained * 4 if job.lora else job.model.weights * 4


def rounded(job: Job) -> float:
    """Bytes of the copies of trained weights that autocast keeps for a forward pass or a rollout; none under FSDP 2."""
    return job.trained * 2 if job.mixed and not job.sharded else 0


def memory(job: Job) -> dict[str, float]:
    """Bytes on one device, by what holds them."""
    m, share = job.model, job.devices if job.sharded else 1
    tokens, rows = job.prompt + job.response, job.rows
    copies = 0 if job.lora else 1  # of the base, for each of reference and reward model
    rewards = copies * frozen(job) if job.reward else 0
    held = {
        "policy": stored(job) / share,
        "gradients, Adam": job.trained * 12 / share,
        "reference": copies * frozen(job) / share,
        "reward model": rewards / share,
    }
    layer = m.width * (18 + 4 * m.ffn / m.width) * 2  # bytes a token and layer that backward needs, attention fused
    kept = m.width * 2 * m.layers + layer if job.checkpointing else layer * m.layers
    update = job.micro * tokens * kept + WORKSPACE
    if not job.lora:  # the head's gradient, there from its forward on; of 16 bits it then becomes a float32 one
        update += m.head * (2 + 4 if job.mixed else 4)
    rollout = rows * tokens * m.layers * 2 * m.kv_width * 2  # keys and values
    rollout += rounded(job)
    if job.sharded:
        layer_at_work = (m.body / m.layers * 2 + m.head) * stored(job) / m.weights
        scoring = rewards * (1 - 1 / share)  # a reward model is gathered to score
        rollout = max(scoring, rollout + (stored(job) * (1 - 1 / share) if job.gather else layer_at_work))
        each = stored(job) / m.weights + (2 if job.mixed and not job.lora else 0)
        update += (m.body / m.layers * 2 + m.head * (1 if m.tied else 2)) * each  # layer at work, the next, the head
    else:
        update += rounded(job)
    return held | {"rollout": rollout, "update": update}


def peak(parts: dict[str, float]) -> float:
    return sum(parts.values()) - min(parts["rollout"], parts["update"])


def head_gemms(job: Job) -> float:
    """Of linear_logprobs in a micro-batch: two of a frozen head; of a trained one the logits twice, dH and dW.

    Not twice for rows of the first chunk, if those are no more than the width: their logits wait in the memory of dW.
    """
    if job.lora:
        return 2
    rows, width = job.micro * job.response, job.model.width
    limit = min(4096, WORKSPACE // (2 * width * (2 + 4 if job.mixed else 8)))
    chunk = -(-rows // -(-rows // limit))
    return 4 - (0.0 if chunk > width else chunk / rows)


def forward_flops(m: Model, tokens: int) -> float:
    """One sequence through the layers: GEMMs and causal attention."""
    return 2 * m.body * tokens + 2 * m.layers * tokens**2 * m.width


def on_paper(job: Job, machine: Machine) -> Costs:
    """From operations and bytes at the machine's rates; advantages and losses are left out as small."""
    m, tokens, rows = job.model, job.prompt + job.response, job.rows
    rate, weights = machine.flops * machine.reached, m.weights * (2 if job.mixed else 4)
    if job.sharded and not job.lora:
        weights = m.weights * 8  # read in float32, written and read in bf16: no copies are kept
    cache = rows * (job.prompt + job.response / 2) * m.layers * 2 * m.kv_width * 2
    step = max((weights + cache) / (machine.bandwidth * machine.streamed), rows * 2 * m.weights / rate)
    passes = 2 if job.lora else 3  # a frozen weight needs no gradient
    gemm = 2 * m.head * job.response / rate
    states = job.trained * 4 / (job.devices if job.sharded else 1)
    return Costs(
        prefill=forward_flops(m, job.prompt) / rate + 2 * m.head / rate,
        step=step + m.layers * machine.overhead,
        forward=forward_flops(m, tokens) / rate,
        train=passes * forward_flops(m, tokens) / rate,
        head=gemm,
        train_head=gemm * head_gemms(job),
        optimizer=7 * states / machine.bandwidth,  # Adam reads four and writes three numbers a parameter
        losses=0.0,
    )


def seconds(job: Job, costs: Costs, link: float) -> dict[str, float]:
    """Of one iteration, by phase; communication, at `link` bytes/s, is not hidden behind computation."""
    rows = job.rows
    rollout = rows * costs.prefill + job.response * costs.step
    scoring = rows * 2 * (costs.forward + costs.head) + (rows * costs.forward if job.reward else 0)
    one = costs.train + (costs.forward if job.checkpointing else 0) + costs.train_head + costs.losses
    steps = job.epochs * job.minibatches
    update = job.epochs * rows * one + steps * costs.optimizer
    wire = (job.devices - 1) / job.devices / link
    micros = max(1, round(rows / job.minibatches / job.micro))
    if job.sharded:
        gathered = stored(job) * wire
        exchange = steps * micros * (2 * gathered + job.trained * 4 * wire)  # twice, and the gradients
        exchange += gathered * (1 if job.gather else job.response)  # the rollout: once, or for every token
        reference = gathered if job.lora else frozen(job) * wire
        exchange += job.minibatches * micros * (gathered + reference)  # scoring
    else:
        exchange = steps * 2 * 4 * job.trained * wire  # sums in float32
    return {"rollout": rollout, "scoring": scoring, "update": update, "exchange": exchange}


LLAMA_1B = Model("1B", 16, 2048, 8192, 512, 128256, True)
LLAMA_8B = Model("8B", 32, 4096, 14336, 1024, 128256, False)
LLAMA_70B = Model("70B", 80, 8192, 28672, 1024, 128256, False)
# Data sheet of the H100 SXM: 80 GB, 989 TFLOP/s bf16, 3.35 TB/s; NVLink 450 GB/s a direction, InfiniBand 50 GB/s.
H100 = Machine("H100", 80e9, 989e12, 3.35e12, 450e9)
CLUSTER = replace(H100, link=50e9)

JOBS = [
    ("every weight", Job(LLAMA_1B, 1), H100),
    ("LoRA 16", Job(LLAMA_1B, 1, lora=16), H100),
    ("every weight, DDP", Job(LLAMA_1B, 8), H100),
    ("LoRA 16", Job(LLAMA_8B, 1, lora=16), H100),
    ("LoRA 16, DDP", Job(LLAMA_8B, 8, lora=16), H100),
    ("every weight, FSDP 2", Job(LLAMA_8B, 8, sharded=True), H100),
    ("LoRA 16, FSDP 2", Job(LLAMA_70B, 8, sharded=True, lora=16), H100),
    ("the same, by layers", Job(LLAMA_70B, 8, sharded=True, lora=16, gather=False, reward=False), H100),
    ("every weight, FSDP 2", Job(LLAMA_70B, 64, sharded=True, batch=1024), CLUSTER),
    (
        "the same, by layers",
        Job(LLAMA_70B, 64, sharded=True, batch=1024, micro=8, gather=False, reward=False),
        CLUSTER,
    ),
]


# A laptop's. What op_costs.py measures on a CPU, and runs.
GPT2_TINY = Model("GPT-2-like, 4 layers of 256", 4, 256, 1024, 256, 50257, True, gated=False)
GPT2_SMALL = Model("GPT-2's sizes, 124M", 12, 768, 3072, 768, 50257, True, gated=False)
QWEN_HALF = Model("Qwen2.5's sizes, 0.5B", 24, 896, 4864, 128, 151936, True)
_PLAIN: dict[str, Any] = {"minibatches": 1, "mixed": False, "frozen": 4, "checkpointing": False, "reward": False}
SMALL_JOBS = [
    ("every weight", Job(GPT2_TINY, 1, batch=32, micro=8, prompt=32, response=32, **_PLAIN), H100),
    ("every weight", Job(GPT2_SMALL, 1, batch=16, micro=4, prompt=64, response=64, **_PLAIN), H100),
    ("LoRA 16", Job(GPT2_SMALL, 1, lora=16, batch=16, micro=4, prompt=64, response=64, **_PLAIN), H100),
    ("LoRA 16", Job(QWEN_HALF, 1, lora=16, batch=8, micro=4, prompt=64, response=64, **_PLAIN), H100),
]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def memory_table() -> None:
    names = [*memory(JOBS[0][1])]
    print(row(["model", "how", "H100s", *names, "peak, GiB", "fits 80 GB"]))
    print(row(["---"] * (len(names) + 5)))
    for how, job, machine in JOBS:
        parts = memory(job)
        fits = "yes" if peak(parts) < 0.92 * machine.memory else "no"  # the rest: CUDA context, fragmentation
        cells = [f"{parts[name] / GiB:.1f}" for name in names]
        print(row([job.model.name, how, str(job.devices), *cells, f"{peak(parts) / GiB:.1f}", fits]))


def seconds_table(jobs: Sequence[tuple[str, Job, Costs, float]], device: str = "H100s") -> None:
    names = ["rollout", "scoring", "update", "exchange"]
    print(row(["model", "how", device, "batch", *names, "iteration, s", "response tokens/s"]))
    print(row(["---"] * (len(names) + 6)))
    for how, job, costs, link in jobs:
        parts = seconds(job, costs, link)
        total = sum(parts.values())
        cells = [f"{parts[name]:.1f}" for name in names]
        rate = f"{job.batch * job.response / total:.0f}"
        print(row([job.model.name, how, str(job.devices), str(job.batch), *cells, f"{total:.1f}", rate]))


def from_costs(record: dict[str, Any]) -> None:
    """The jobs that were measured, and beside them the phases of `rlhf ppo` where it ran too."""
    print(f"{record['environment']['device']}, {record['dtype']}\n")
    jobs = {f"{job.model.name}, {how}": (how, job, machine.link) for how, job, machine in [*JOBS, *SMALL_JOBS]}
    measured = {name: Costs(**found["costs"]) for name, found in record["jobs"].items()}
    rows = [(jobs[name][0], jobs[name][1], costs, jobs[name][2]) for name, costs in measured.items()]
    seconds_table(rows, "devices")
    ran = {name: found["rlhf ppo"] for name, found in record["jobs"].items() if "rlhf ppo" in found}
    if ran:
        print("\n" + row(["job", "phase", "from op costs, s", "`rlhf ppo`, s", "ratio"]))
        print(row(["---"] * 5))
    for name, phases in ran.items():
        _, job, link = jobs[name]
        predicted = seconds(job, measured[name], link)
        pairs = [(phase, predicted[phase], seen) for phase, seen in phases.items()]
        for phase, ours, seen in [*pairs, ("iteration", sum(x[1] for x in pairs), sum(phases.values()))]:
            print(row([name, phase, f"{ours:.2f}", f"{seen:.2f}", f"{seen / ours:.2f}"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--costs", type=Path, help="what op_costs.py wrote: seconds from measured costs")
    options = parser.parse_args()
    if options.costs:
        from_costs(json.loads(options.costs.read_text()))
    else:
        memory_table()
        print()
        seconds_table([(how, job, on_paper(job, machine), machine.link) for how, job, machine in JOBS])


if __name__ == "__main__":
    main()
