"""Memory and time of a PPO iteration from formulas: `docs/scaling.md` holds what it prints.

    python bench/scaling.py                 # the tables: three model sizes, one GPU to a cluster, on paper
    python bench/scaling.py --measure       # the same formulas for this CPU, beside what `rlhf ppo` takes on it

Rates of a GPU are its data sheet's times the share that is assumed to be reached (`Machine`); nothing in the tables was
measured on a GPU. `--measure` takes the rates from one GEMM and one read of a large array, then runs PPO.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace

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
    tokens, rows = job.prompt + job.response, job.batch / job.devices
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


def forward_flops(job: Job, tokens: int, head_tokens: int) -> float:
    """One sequence through the model, once: GEMMs, causal attention, and the head where a logprob is wanted."""
    m = job.model
    return 2 * m.body * tokens + 2 * m.layers * tokens**2 * m.width + 2 * m.head * head_tokens


def seconds(job: Job, machine: Machine) -> dict[str, float]:
    """Of one iteration, by phase; communication is not hidden behind computation."""
    m, tokens, rows = job.model, job.prompt + job.response, job.batch / job.devices
    rate, weights = machine.flops * machine.reached, m.weights * (2 if job.mixed else 4)
    if job.sharded and not job.lora:
        weights = m.weights * 8  # read in float32, written and read in bf16: no copies are kept
    cache = rows * (job.prompt + job.response / 2) * m.layers * 2 * m.kv_width * 2
    step = max((weights + cache) / (machine.bandwidth * machine.streamed), rows * 2 * m.weights / rate)
    rollout = rows * forward_flops(job, job.prompt, 1) / rate
    rollout += job.response * (step + m.layers * machine.overhead)
    scoring = rows * 2 * forward_flops(job, tokens, job.response) / rate
    scoring += rows * forward_flops(job, tokens, 0) / rate if job.reward else 0
    one = forward_flops(job, tokens, 0)
    passes = (2 if job.lora else 3) + (1 if job.checkpointing else 0)  # a frozen weight needs no gradient
    head = 2 * m.head * job.response * head_gemms(job)
    update = job.epochs * rows * (one * passes + head) / rate
    steps = job.epochs * job.minibatches
    states = job.trained * 4 / (job.devices if job.sharded else 1)
    update += steps * 7 * states / machine.bandwidth  # Adam reads four and writes three numbers a parameter
    wire = (job.devices - 1) / job.devices / machine.link
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


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def tables() -> None:
    names = [*memory(JOBS[0][1])]
    print(row(["model", "how", "H100s", *names, "peak, GiB", "fits 80 GB"]))
    print(row(["---"] * (len(names) + 5)))
    for how, job, machine in JOBS:
        parts = memory(job)
        fits = "yes" if peak(parts) < 0.92 * machine.memory else "no"  # the rest: CUDA context, fragmentation
        cells = [f"{parts[name] / GiB:.1f}" for name in names]
        print(row([job.model.name, how, str(job.devices), *cells, f"{peak(parts) / GiB:.1f}", fits]))
    print()
    names = [*seconds(JOBS[0][1], H100)]
    print(row(["model", "how", "H100s", "batch", *names, "iteration, s", "response tokens/s"]))
    print(row(["---"] * (len(names) + 6)))
    for how, job, machine in JOBS:
        parts = seconds(job, machine)
        total = sum(parts.values())
        cells = [f"{parts[name]:.1f}" for name in names]
        rate = f"{job.batch * job.response / total:.0f}"
        print(row([job.model.name, how, str(job.devices), str(job.batch), *cells, f"{total:.1f}", rate]))


def rates() -> tuple[float, float]:
    """(FLOP/s of a float32 GEMM, bytes/s of reading a large array) here: the best of five."""
    import torch

    a = torch.randn(2048, 2048)
    x = torch.ones(1 << 26)

    def best(function: object) -> float:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            function()  # type: ignore[operator]
            times.append(time.perf_counter() - began)
        return min(times)

    return 2 * 2048**3 / best(lambda: a @ a), x.numel() * 4 / best(x.sum)


def measure() -> None:
    import torch

    from rlhf_trainer import PPOConfig, train_ppo
    from rlhf_trainer.new_model import build_model, build_tokenizer

    text = "a good bad day night red blue one two three yes no thanks sorry fool"
    tokenizer = build_tokenizer([text] * 4, 300)
    model = build_model("gpt2", tokenizer, hidden_size=256, layers=4, heads=4, max_length=64)
    model.resize_token_embeddings(50257, mean_resizing=False)
    shape = Model("GPT-2-like", 4, 256, 1024, 256, 50257, True, gated=False)
    job = Job(
        shape,
        1,
        batch=32,
        micro=32,
        prompt=32,
        response=32,
        minibatches=1,
        mixed=False,
        checkpointing=False,
        reward=False,
    )
    flops, bandwidth = rates()
    print(f"{torch.get_num_threads()} threads: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    machine = Machine("this CPU", 0, flops, bandwidth, 1.0, reached=1.0, streamed=1.0, overhead=0.0)
    cfg = PPOConfig(
        updates=4, batch_size=32, minibatches=1, max_new_tokens=32, missing_eos_penalty=1.0, lr=1e-6, device="cpu"
    )
    prompts = [" ".join(text.split()[i % 15] for i in range(start, start + 31)) for start in range(8)]
    result = train_ppo(cfg, model=model, tokenizer=tokenizer, reward=lambda _, c: [0.0] * len(c), prompts=prompts)
    predicted = seconds(job, machine)
    print(row(["phase", "formula, s", "measured, s (last of 4)", "ratio"]))
    print(row(["---"] * 4))
    for phase in ("rollout", "scoring", "update"):
        seen = result.metrics[-1][f"seconds/{phase}"]
        print(row([phase, f"{predicted[phase]:.3f}", f"{seen:.3f}", f"{seen / predicted[phase]:.2f}"]))
    lengths = {m["val/response_length"] for m in result.metrics}
    print(f"mean response lengths {sorted(lengths)}; the formula takes {job.response}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", action="store_true", help="compare the formulas with this machine")
    measure() if parser.parse_args().measure else tables()


if __name__ == "__main__":
    main()
