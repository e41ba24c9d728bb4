"""Two ranks over gloo: the run of one process with half the rows each; one writes; errors and SIGTERM stop both."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import Forked

from rlhf_trainer import ppo as ppo_stage
from rlhf_trainer.base import distributed
from rlhf_trainer.base.distributed import ProcessGroupInfo
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.cli import main
from rlhf_trainer.models.loading import save_folder
from rlhf_trainer.onpolicy.checks import check_shares
from rlhf_trainer.worlds.exact import PROMPTS, make_model, make_seq2seq, make_tokenizer

TIMES = ("seconds/", "eps", "tokens_per_second")
STAGES = {"ppo": 20, "gae": 5, "grpo": 3, "clip": 1}  # steps
STAGES |= {"sft": 5, "reward": 5, "dpo": 5, "t5-ppo": 2, "t5-sft": 5}
SUPERVISED = ("sft", "reward", "dpo", "t5-sft")


def run_all(folder, script):
    """Run argument lists one after the other, in the environments given with them; prints the exit code of each.

    What rank 1 writes below the folder is printed too.
    """
    written = []

    def hook(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        changes = writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if changes and str(arguments[0]).startswith(folder):
            written.append([event, str(arguments[0])])

    if os.environ["RANK"] == "1":
        sys.addaudithook(hook)
    codes = []
    for environment, arguments in script:
        os.environ.update(environment)
        try:
            with far_ratios(folder) if os.environ["RATIOS"] == "far" else nullcontext():
                codes.append(main(arguments))
        except SystemExit as error:
            codes.append(error.code)
    print(json.dumps([codes, written]))


FAR = 1.5  # nats: ratios of 4.5 and 0.22, where a clip of 0.2 ends at 1.2 and 0.8


@contextmanager
def far_ratios(folder):
    """As if the policy had moved since its rollout: every ratio of the update's first step is far past the clip.

    In one process the batch is kept in the folder.
    """
    compute = ppo_stage.compute_advantages

    def shifted(*arguments, **options):
        batch = compute(*arguments, **options)
        rows, columns = batch.logprobs.shape
        up = (torch.arange(rows)[:, None] + torch.arange(columns)) % 2 == 0
        shift = torch.where(up, FAR, -FAR)
        if "RANK" not in os.environ:
            kept = {"shift": shift, "advantages": batch.advantages, "mask": batch.rollout.response_mask}
            save_file({name: x.contiguous() for name, x in kept.items()}, f"{folder}/far.safetensors")
        return replace(batch, logprobs=batch.logprobs - shift)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_stage, "compute_advantages", shifted)
        patch.setattr(ppo_stage, "check_first_ratio", lambda *_, **__: None)
        yield


def two_ranks(folder, function, *arguments, **environment):
    """Both ranks' processes, which have ended; what they say lies in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        Forked(function, *arguments, folder=folder / str(rank), **environment, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            process.wait()
    finally:
        for process in ranks:
            process.process.kill()
    return ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tokenizer = make_tokenizer()
    save_folder(folder / "policy", make_model(tokenizer, 0), tokenizer)
    save_folder(folder / "t5", make_seq2seq(tokenizer, 0), tokenizer)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "reward.py").write_text(
        "import os, signal, time\ncalls = [0]  # anew for each command\n"
        "def score(prompts, completions):\n    return [float(len(text)) for text in completions]\n"
        "def fails(prompts, completions):\n    calls[0] += 1\n"
        "    if os.environ['RANK'] == '1' and calls[0] == 2:\n        raise ValueError('no more')\n"
        "    if os.environ['RANK'] == os.environ.get('SLEEPS') and calls[0] == 2:\n        time.sleep(600)\n"
        "    return score(prompts, completions)\n"
        "def stops(prompts, completions):\n    calls[0] += 1\n"
        "    if calls[0] == 3 and os.environ.get('RANK') == os.environ.pop('STOPS', ''):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return score(prompts, completions)\n"
    )
    letters = "abcd"
    texts = [(letters[i % 4] + letters[i // 4 % 4], letters[i // 2 % 4] * (1 + i % 5)) for i in range(29)]
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in texts]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")
    pairs = [
        {"prompt": prompt, "chosen": text, "rejected": text[::-1] + "a", "label": 1 - 0.1 * (i % 3)}
        for i, (prompt, text) in enumerate(texts)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    return folder


def ppo(folder, output, reward="score", **options):
    values = {
        "model": folder / "policy",
        "prompts": folder / "prompts.txt",
        "reward": f"{folder}/reward.py:{reward}",
        "output_dir": folder / output,
        "updates": 20,
        "batch_size": 8,
        "micro_batch_size": 2,
        "minibatches": 2,
        "epochs": 2,
        "max_new_tokens": 4,
        "lr": 1e-3,
        "adam_eps": 1e-3,  # above most gradients: Adam's step is then smooth where a gradient changes its sign
        "clip": 10.0,  # no ratio and no value comes near: one that rounding tips over its clip changes the whole run
        "value_clip": 100.0,
        "kl_target": 1.0,
        "save_every": 100,
        "report_to": "none",
        "device": "cpu",
    }
    return ["ppo", *(f"--{key}={value}" for key, value in (values | options).items())]


def supervised(folder, stage, output, **options):
    values = {
        "model": folder / "policy",
        "data": folder / ("examples.jsonl" if stage == "sft" else "pairs.jsonl"),
        "output_dir": folder / output,
        "batch_size": 5,
        "micro_batch_size": 2,
        "heldout": 7,
        "evals": 2,
        "lr": 1e-3,
        "save_every": STAGES["sft"],
        "report_to": "none",
        "device": "cpu",
    }
    return [stage, *(f"--{key}={value}" for key, value in (values | options).items())]


def commands(folder, prefix):
    """Every stage in few steps, PPO in 20."""
    lora = {"lora_r": 2, "advantage": "grpo", "group_size": 2}
    lora["gather_for_rollout"] = prefix != "fsdp"
    t5 = {"model": folder / "t5"}
    return {
        "ppo": ppo(folder, f"{prefix}-ppo"),
        "gae": ppo(folder, f"{prefix}-gae", reward="stops", updates=5, save_every=0),
        "grpo": ppo(folder, f"{prefix}-grpo", updates=3, **lora),
        "clip": ppo(folder, f"{prefix}-clip", updates=1, epochs=1, minibatches=1, clip=0.2),
        "sft": supervised(folder, "sft", f"{prefix}-sft"),
        "reward": supervised(folder, "reward", f"{prefix}-reward", lora_r=2),
        "dpo": supervised(folder, "dpo", f"{prefix}-dpo", micro_batch_size=1),
        "t5-ppo": ppo(folder, f"{prefix}-t5-ppo", updates=2, **t5),
        "t5-sft": supervised(folder, "sft", f"{prefix}-t5-sft", **t5),
    }


@pytest.fixture(scope="module")
def runs(folder):
    """One process's folders, those of two ranks and of two with FSDP 2; what rank 1 wrote.

    SIGTERM on rank 1 stops the runs named gae, which are then resumed.
    """
    for name, arguments in commands(folder, "one").items():
        with far_ratios(folder) if name == "clip" else nullcontext():
            assert main(arguments) == 0
    script = []
    for prefix, fsdp in (("two", "false"), ("fsdp", "true")):
        for name, arguments in commands(folder, prefix).items():
            environment = {"ACCELERATE_USE_FSDP": fsdp, "FSDP_VERSION": "2", "STOPS": ""}
            environment["RATIOS"] = "far" if name == "clip" else ""
            if name == "gae":
                script.append((environment | {"STOPS": "1"}, arguments))
                arguments = [*arguments, "--resume=true"]
            if (prefix, name) != ("fsdp", "ppo"):
                script.append((environment, arguments))
    whole = ppo(folder, "whole", reward="stops", updates=5, save_every=0)
    script.append(({"ACCELERATE_USE_FSDP": "false"}, whole))
    mixed = ppo(folder, "mixed", updates=1, lora_r=2, dtype="bfloat16", gradient_checkpointing=True)
    mixed.append(f"--reward={folder}/one-reward")  # an adapter on the same base
    script.append(({"ACCELERATE_USE_FSDP": "true"}, mixed))
    first, second = two_ranks(folder / "said", run_all, str(folder), script)
    assert (first.poll(), second.poll()) == (0, 0), first.stderr
    (codes, _), (other_codes, written) = (json.loads(rank.stdout) for rank in (first, second))
    assert codes == other_codes == [0, 143, *[0] * 8, 143, *[0] * 10], first.stderr
    return written


def newest_checkpoint(folder):
    """AdamW's moments after the last step, sums of all steps' gradients and of their squares."""
    return load_file(max((folder / "checkpoints").iterdir()) / "optimizer.safetensors")


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMES)} for line in lines]


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [*(("two", stage) for stage in STAGES), *(("fsdp", stage) for stage in STAGES if stage != "ppo")],
)
def test_two_ranks_give_the_run_of_one(folder, runs, ranks, stage):
    """What two ranks compute differs from one process's by the order of sums.

    Nothing here may turn that into more: no ratio is near the edge of its clip. AdamW (eps 1e-8) divides a gradient
    that is nothing but rounding by itself, so that its moments are compared, and the weights only within its steps.
    """
    one, two = (metrics(folder / f"{prefix}-{stage}") for prefix in ("one", ranks))
    assert len(one) == len(two) >= STAGES[stage]
    for first, second in zip(one, two, strict=True):
        for record in (first, second):
            record.pop("val/var_explained", None)  # 1 minus a ratio of variances, which may both be tiny
            if record["step"] == 1:
                record.pop("rewards/accuracies", None)  # DPO's policy is its reference still: the sign of a zero
            assert (record.get("policy/clipfrac_avg", 0) > 0) == (stage == "clip")
            assert record.get("val/clipfrac_avg", 0) == 0
        assert second == pytest.approx(first, abs=1e-5, rel=1e-5)
    names, others = ({path.name for path in (folder / f"{prefix}-{stage}").iterdir()} for prefix in ("one", ranks))
    assert names == others - ({"checkpoints"} if stage == "gae" else set())  # SIGTERM leaves one there
    for name in names:
        if name.endswith(".safetensors"):
            first, second = (load_file(folder / f"{prefix}-{stage}" / name) for prefix in ("one", ranks))
            assert first.keys() == second.keys()
            atol = 2 * STAGES[stage] * 1e-3 if stage in SUPERVISED else 1e-4
            assert all(torch.allclose(first[key], second[key], atol=atol) for key in first)
    if stage in SUPERVISED:
        first, second = (newest_checkpoint(folder / f"{prefix}-{stage}") for prefix in ("one", ranks))
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-4 * value.abs().max().item())


@pytest.mark.parametrize("ranks", ["one", "two", "fsdp"])
def test_ratios_far_past_the_clip_are_clipped_on_every_rank(folder, runs, ranks):
    far = load_file(folder / "far.safetensors")
    advantages, ratios = far["advantages"][far["mask"]].double(), far["shift"][far["mask"]].double().exp()
    free, clipped = ratios * advantages, ratios.clamp(0.8, 1.2) * advantages
    (record,) = metrics(folder / f"{ranks}-clip")
    assert record["val/ratio"] == pytest.approx(ratios.mean().item(), rel=1e-5)
    assert record["loss/policy_avg"] == pytest.approx(-torch.minimum(free, clipped).mean().item(), rel=1e-4)
    assert record["policy/clipfrac_avg"] == pytest.approx((clipped < free).double().mean().item())
    assert 0.3 < record["policy/clipfrac_avg"] < 0.7
    assert -free.mean() < record["loss/policy_avg"] - 0.1  # as it were without a clip


def test_only_rank_0_writes(runs):
    assert runs == []


def test_sigterm_on_one_rank_saves_and_a_resumed_run_has_the_same_bits(folder, runs):
    for prefix in ("two", "fsdp"):
        assert [path.name for path in (folder / f"{prefix}-gae" / "checkpoints").iterdir()] == ["step-00000003"]
    assert metrics(folder / "two-gae") == metrics(folder / "whole")
    first, second = (load_file(folder / name / "model.safetensors") for name in ("two-gae", "whole"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_bfloat16_and_checkpointing_with_fsdp(folder, runs):
    assert metrics(folder / "mixed")[0]["objective/kl"] == 0
    saved = load_file(folder / "mixed" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in saved.items() if "lora_B" in name)  # it was trained


@pytest.mark.parametrize("sleeps", ["", "0"], ids=["in a collective", "elsewhere"])
def test_an_error_on_one_rank_stops_both_with_its_message(folder, sleeps):
    arguments = ppo(folder, f"failed{sleeps}", reward="fails")
    first, second = two_ranks(folder / f"said-failed{sleeps}", main, arguments, SLEEPS=sleeps)
    assert (first.poll(), second.poll()) == (2, 2)
    assert "error: rank 1: the reward function raised ValueError: no more" in first.stderr
    assert "Traceback" not in first.stderr + second.stderr
    assert not list((folder / f"failed{sleeps}").glob("*.safetensors"))


# Without processes


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
@pytest.mark.parametrize("size", [None, 1, 2])
def test_deal_gives_every_row_once(world, count, size):
    for sharded in (False, True):
        dealt = [
            list(ProcessGroupInfo(rank, world, sharded=sharded).shard_microbatches(list(range(count)), size))
            for rank in range(world)
        ]
        rows = [row for parts in dealt for part, weight in parts if weight for row in part]
        assert sorted(rows) == list(range(count))
        assert all(len(part) <= (size or count) for parts in dealt for part, _ in parts)
        assert not sharded or len({len(parts) for parts in dealt}) == 1  # as many collectives on every rank
        assert sharded or all(weight == 1 for parts in dealt for _, weight in parts)


def test_blocks_are_whole_groups():
    blocks = [ProcessGroupInfo(rank, 3).contiguous_shard(16, 4) for rank in range(3)]
    assert [(block.start, block.stop) for block in blocks] == [(0, 4), (4, 8), (8, 16)]


def test_more_processes_than_rows_are_refused():
    with pytest.raises(UserError, match="3 processes share each minibatch of 2 responses"):
        check_shares(3, batch_size=4, minibatches=2)
    with pytest.raises(UserError, match="of 1 groups"):
        check_shares(2, batch_size=4, group_size=4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "told to use FSDP 1; --fsdp_version 2 is supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "told to use DEEPSPEED"),
    ],
)
def test_launches_that_are_not_supported(monkeypatch, variables, message):
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (launched | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.join(torch.device("cpu"))


def test_other_stages_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval"]) == 2
    assert "rlhf eval: error: it runs in one process" in capsys.readouterr().err


def test_one_process_needs_no_group():
    ranks = distributed.join(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    x = torch.ones(2)
    ranks.sum_(x)
    assert x.tolist() == [1, 1]
    assert (ranks.any(True), ranks.broadcast_object("a"), ranks.all_gather_object("a"), ranks.all_reduce_max(3)) == (
        True,
        "a",
        ["a"],
        3,
    )


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start several processes",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE=2 but not MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected a number"),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK is 'first', expected a number"),
    ],
)
def test_a_launchers_variable_alone_is_a_sentence(variables, told, monkeypatch):
    """Where it was a wait for processes that nobody starts."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        distributed.join(torch.device("cpu"))
