"""Checkpoints: killed at any moment, resumed to the same bits; damage, changed inputs and full disks are named."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from support.processes import PATIENCE, Forked, command

from rlhf_trainer import train_ppo
from rlhf_trainer.base.errors import UserError
from rlhf_trainer.models.loading import save_folder
from rlhf_trainer.onpolicy.config import PPOConfig
from rlhf_trainer.training.checkpoint import why_invalid
from rlhf_trainer.worlds.exact import PROMPTS, make_model, make_tokenizer, oracle

TOKENIZER = make_tokenizer()
UPDATES = 12
TIMES = ("eps", "tokens_per_second", "seconds/rollout", "seconds/scoring", "seconds/update")
PYTHONS = "python_rng = random.random(); numpy_rng = numpy.random.rand(); torch_rng = torch.rand(1).item()"
REWARD = f"""
import random, time, numpy, torch

def score(prompts, completions):
    {PYTHONS}  # the reward draws from all three: a resumed run must go on with the same draws
    time.sleep(0.1)  # so that a kill comes before the end, where this machine is busy too
    return [len(text) + python_rng + numpy_rng + torch_rng for text in completions]
"""


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "policy", make_model(TOKENIZER, 0), TOKENIZER)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def start(folder, out, *more):
    options = {
        "model": folder / "policy",
        "prompts": folder / "prompts.txt",
        "reward": f"{folder}/reward.py:score",
        "output_dir": folder / out,
        "updates": UPDATES,
        "batch_size": 16,
        "max_new_tokens": 5,
        "lr": 0.003,
        "kl_target": 1.0,
        "kl_horizon": 100,
        "save_every": 1,
        "device": "cpu",
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return command("ppo", *arguments, *more, folder=folder / f"said-{out}")


def wait_for_checkpoint(process, folder, beyond=0):
    """Until the run has finished `beyond` or more updates; returns the newest checkpoint's step."""
    for _ in range(100 * PATIENCE):
        steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
        if max(steps, default=0) > beyond:
            return max(steps)
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint within {PATIENCE} seconds")


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def same_result(first, second):
    names = {"model.safetensors", "value_head.safetensors"}
    assert names <= {path.name for path in first.iterdir()}
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert metrics(first) == metrics(second)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.sweep)])
def test_killed_at_random_and_resumed_gives_the_same_bits(kills, folder):
    whole = start(folder, "whole")
    assert whole.wait() == 0, whole.stderr
    reached, pause = 0, random.Random()
    for _ in range(kills):
        process = start(folder, "killed", "--resume")
        reached = wait_for_checkpoint(process, folder / "killed", beyond=reached)
        time.sleep(pause.uniform(0, 0.1))
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (folder / "killed" / "model.safetensors").exists()
    final = start(folder, "killed", "--resume")
    assert final.wait() == 0, final.stderr
    same_result(folder / "whole", folder / "killed")
    checkpoints = sorted(path.name for path in (folder / "killed" / "checkpoints").iterdir())
    assert checkpoints == [f"step-{step:08d}" for step in (UPDATES - 1, UPDATES)]


def test_sigterm_saves_and_exits_143(folder):
    process = start(folder, "out", "--updates=1000")  # more than it will come to
    wait_for_checkpoint(process, folder / "out")
    process.signal(signal.SIGTERM)
    assert process.wait() == 143
    done = metrics(folder / "out")[-1]["step"]
    newest = max((folder / "out" / "checkpoints").iterdir())
    assert newest.name == f"step-{done:08d}"
    assert why_invalid(newest) is None


@pytest.fixture
def heeds_ctrl_c():
    """As in a terminal: a shell that starts something in the background has it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_and_a_second_one_stops_at_once(folder, capfd, heeds_ctrl_c):
    """Of a run that keeps no checkpoints on its own."""

    def interrupted(times):
        def reward(prompts, completions):
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            return oracle(prompts, completions)

        return reward

    with pytest.raises(SystemExit) as left:
        run(folder / "once", reward=interrupted(1), save_every=0)
    assert left.value.code == 130
    assert [path.name for path in (folder / "once" / "checkpoints").iterdir()] == ["step-00000001"]
    said = capfd.readouterr().err
    assert "once more stops at once" in said
    assert "stopped after step 1; --resume goes on from its checkpoint" in said
    for options in ({"reward": interrupted(2)}, {"reward": interrupted(1), "output_dir": ""}):
        with pytest.raises(KeyboardInterrupt):
            run(folder / "twice", save_every=0, **options)
    assert not (folder / "twice" / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = policy_bits(run(folder / "once", save_every=0, resume=True, accept_changes=["reward"]))
    assert torch.equal(resumed, policy_bits(run(folder / "whole-of-it", save_every=0)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stage_saves_where_it_is_told_to_end_and_a_second_signal_ends_a_hanging_reward(tmp_path, number):
    def told(prompts, completions):
        os.kill(os.getpid(), number)
        return oracle(prompts, completions)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left:
            run(tmp_path / "once", reward=told, save_every=0)
        assert left.value.code == 128 + number
        assert [path.name for path in (tmp_path / "once" / "checkpoints").iterdir()] == ["step-00000001"]
    finally:
        signal.signal(signal.SIGHUP, before)
    hanging = Forked(run_and_hang, tmp_path / "hanging", number, folder=tmp_path / "said")
    assert hanging.wait() == -number, hanging.stderr


def run_and_hang(folder, number):
    """A reward that swallows whatever is raised in it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def hangs(prompts, completions):
        for _ in range(2):
            try:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            except BaseException:
                print("swallowed")
        return oracle(prompts, completions)

    run(folder, reward=hangs)


def test_nohup_keeps_a_run_from_being_hung_up(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path, reward=lambda *texts: os.kill(os.getpid(), signal.SIGHUP) or oracle(*texts), updates=1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# In one process: the same run without the start-up time


def run(folder, reward=oracle, prompts=PROMPTS, updates=4, until=None, **options):
    """Train in `folder`; `until`: stop after that many updates, as a crash would."""

    def crash(done, _):
        if done == until:
            raise KeyboardInterrupt

    cfg = PPOConfig(
        updates=updates,
        **({"batch_size": 16, "max_new_tokens": 5, "lr": 1e-3, "save_every": 1, "device": "cpu"})
        | {"output_dir": str(folder)}
        | options,
    )
    model = make_model(TOKENIZER, 0)
    given = {"model": model, "tokenizer": TOKENIZER, "reward": reward, "prompts": prompts, "on_update": crash}
    return train_ppo(cfg, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, bits of the policy) of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("never") / "whole"
    return folder, policy_bits(run(folder))


@pytest.fixture
def crash(tmp_path_factory, tmp_path):
    """A copy of the folder that the same run left when it crashed in its fourth update."""
    kept = tmp_path_factory.getbasetemp() / "kept-crash"
    if not kept.exists():
        crashed(kept)
    return shutil.copytree(kept, tmp_path / "crashed")


def crashed(folder, **options):
    with pytest.raises(KeyboardInterrupt):
        run(folder, until=4, **options)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000002", "step-00000003"]
    return folder


def policy_bits(result):
    return torch.cat([parameter.detach().flatten() for parameter in result.policy.parameters()])


def test_resume_restores_adam_and_not_just_the_weights(whole, crash):
    assert torch.equal(policy_bits(run(crash, resume=True)), whole[1])
    same_result(whole[0], crash)


def test_the_generators_of_gpus_are_restored_too(tmp_path, monkeypatch):
    """Two generators in the place of two GPUs', from the second of which the reward draws."""
    gpus = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [gpu.get_state() for gpu in gpus])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: gpus[device].set_state(state))

    def reward(prompts, completions):
        return torch.rand(len(prompts), generator=gpus[1]).tolist()

    def begin():  # as a new process finds them
        for seed, gpu in enumerate(gpus):
            gpu.manual_seed(seed)

    begin()
    whole = policy_bits(run(tmp_path / "whole", reward=reward))
    begin()
    crashed(tmp_path / "crashed", reward=reward)
    begin()
    assert torch.equal(policy_bits(run(tmp_path / "crashed", reward=reward, resume=True)), whole)


@pytest.mark.parametrize("lost", ["all of it", "a line", "a figure", "its encoding"])
def test_metrics_that_were_lost_come_back_from_the_checkpoint(whole, crash, lost, capsys):
    file = crash / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    if lost == "all of it":
        file.unlink()
    elif lost == "its encoding":
        file.write_bytes(b"\xff\xfe" + file.read_bytes())
    else:
        changed = lines[1].replace('"lr": ', '"lr": 1')
        file.write_text("".join([lines[0], *([changed] if lost == "a figure" else []), *lines[2:]]))
    assert torch.equal(policy_bits(run(crash, resume=True)), whole[1])
    said = "metrics.jsonl: deleted, cut or changed since the checkpoint; its 3 steps are restored from there"
    assert said in capsys.readouterr().err
    assert metrics(whole[0]) == metrics(crash)


def test_a_folder_that_is_deleted_ends_the_run_with_a_sentence(tmp_path):
    def deletes(prompts, completions):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return oracle(prompts, completions)

    with pytest.raises(UserError, match=r"metrics.jsonl was deleted while the run wrote to it; stopped after step 1"):
        run(tmp_path / "out", reward=deletes, report_to=["none"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sums", [{}, {"sha256": {}}, {"sha256": []}, [], {"sha256": {"../policy": "0"}}])
def test_a_checkpoint_without_its_sums_is_passed_over(whole, crash, sums, capsys):
    (crash / "checkpoints" / "step-00000003" / "meta.json").write_text(json.dumps(sums))
    assert torch.equal(policy_bits(run(crash, resume=True)), whole[1])
    assert "step-00000003: skipped, incomplete" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["optimizer.safetensors", "policy.safetensors", "state.json", "meta.json"])
def test_a_damaged_checkpoint_is_passed_over(whole, crash, file, capsys):
    newest = crash / "checkpoints" / "step-00000003" / file
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(bytes(content[: len(content) - 3] if file == "meta.json" else content))
    assert torch.equal(policy_bits(run(crash, resume=True)), whole[1])
    said = capsys.readouterr().err
    assert "step-00000003: skipped" in said
    assert "step-00000002 after step 2" in said


def test_a_file_missing_or_a_link_in_its_place_is_passed_over(whole, crash, tmp_path, capsys):
    folder = crash / "checkpoints"
    (folder / "step-00000003" / "rng.safetensors").unlink()
    shutil.copytree(folder / "step-00000002", tmp_path / "elsewhere")
    (folder / "step-00000009").symlink_to(tmp_path / "elsewhere")
    assert torch.equal(policy_bits(run(crash, resume=True)), whole[1])
    assert "step-00000009" not in capsys.readouterr().err


def test_a_metrics_line_cut_by_the_kill_does_not_matter(whole, crash):
    with (crash / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "objective/k')
    run(crash, resume=True)
    assert metrics(whole[0]) == metrics(crash)


def test_a_changed_run_is_refused_with_every_change_by_name_and_goes_on_where_all_are_accepted(crash, capsys):
    changed = {"kl_coef": 0.9, "prompts": PROMPTS[::-1], "reward": lambda p, c: [-score for score in oracle(p, c)]}
    told = r"made with kl_coef=0.05, not 0.9; the reward changed \(source, values\); the prompts changed \(texts\)"
    with pytest.raises(UserError, match=rf"{told}. --accept_changes kl_coef reward prompts goes on"):
        run(crash, resume=True, **changed)
    with pytest.raises(UserError, match=r"cannot resume: the reward changed \(source, values\)\. --accept"):
        run(crash, resume=True, accept_changes=["kl_coef", "prompts"], **changed)
    with pytest.raises(UserError, match="--accept_changes promts: nothing is called so; it takes model,"):
        run(crash, resume=True, accept_changes=["promts"])
    run(crash, resume=True, accept_changes=["kl_coef", "prompts", "reward"], **changed)
    assert "accepted: it was made with kl_coef" in capsys.readouterr().err
    assert [row["objective/kl_coef"] for row in metrics(crash)][:3] == [0.05] * 3
    run(crash, resume=True, **changed)  # what was accepted once belongs to the run from then on


def test_more_updates_go_on_with_the_longer_schedule(crash, capsys):
    run(crash, resume=True, updates=6)
    assert "updates=6, not 4 as before: the learning rate follows the longer schedule" in capsys.readouterr().err
    rates = [row["lr"] for row in metrics(crash)]
    assert rates == pytest.approx([1e-3 * part for part in (1, 3 / 4, 2 / 4, 3 / 6, 2 / 6, 1 / 6)])
    with pytest.raises(UserError, match="made with updates=6, not 5"):
        run(crash, resume=True, updates=5)


def test_a_learning_rate_that_is_accepted_is_the_one_that_is_used(crash):
    run(crash, resume=True, lr=4e-3, accept_changes=["lr"])
    assert [row["lr"] for row in metrics(crash)] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 1e-3])


def test_other_micro_batches_are_equal_up_to_rounding_and_said(whole, crash, capsys):
    result = policy_bits(run(crash, resume=True, micro_batch_size=5))
    assert "micro_batch_size=5, not None as before: the result is equal up to rounding" in capsys.readouterr().err
    torch.testing.assert_close(result, whole[1], rtol=1e-4, atol=1e-6)


def test_other_trained_weights_do_not_fit_a_checkpoint(crash):
    with pytest.raises(UserError, match=r"policy.safetensors: does not fit the model, whose trained weights are other"):
        run(crash, resume=True, lora_r=2, accept_changes=["lora_r", "model"])


def test_an_earlier_run_is_not_overwritten_unasked(crash):
    with pytest.raises(UserError, match="--resume goes on from them, --overwrite discards them"):
        run(crash)
    run(crash, overwrite=True)
    assert [row["step"] for row in metrics(crash)] == [1, 2, 3, 4]


def test_a_run_without_checkpoints_is_replaced_with_a_word(tmp_path, capsys):
    for words in (0, 1):
        run(tmp_path, updates=1, save_every=0)
        assert capsys.readouterr().err.count("what an earlier run left there, metrics and model, is replaced") == words


def test_a_finished_run_resumes_to_itself(tmp_path):
    first = policy_bits(run(tmp_path))
    assert torch.equal(policy_bits(run(tmp_path, resume=True)), first)
    assert len(metrics(tmp_path)) == 4


def test_safetensors_and_json_alone(tmp_path):
    run(tmp_path, updates=1)
    files = {path.suffix for path in (tmp_path / "checkpoints" / "step-00000001").iterdir()}
    assert files == {".safetensors", ".json"}


def run_on_a_disk_that_fills(folder):
    """Files of more than 20 kB cannot be written from the third update on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    calls = []

    def fill(prompts, completions):
        calls.append(1)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return oracle(prompts, completions)

    try:
        run(folder, reward=fill)
    except UserError as error:
        print(error)
        return 2


def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path):
    done = Forked(run_on_a_disk_that_fills, tmp_path, folder=tmp_path / "said")
    assert done.wait() == 2, done.stderr
    assert "step-00000003: cannot write the checkpoint" in done.stdout
    assert "earlier ones are kept" in done.stdout
    left = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in left] == ["step-00000001", "step-00000002"]
    assert [why_invalid(path) for path in left] == [None, None]
