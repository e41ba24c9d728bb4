"""Rollouts by vLLM (`--rollout_engine vllm`), on the trainer's own GPU: the policy's weights go to it before each one.

vLLM runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), so that its worker's `reload_weights` reads the trainer's
tensors where they are. Token ids go in and come out; nothing is tokenised twice.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.data.encoding import padding_id
from rlhf_trainer.data.rows import left_pad
from rlhf_trainer.models import adapters, precision
from rlhf_trainer.models.seq2seq import is_encoder_decoder
from rlhf_trainer.sampling import rollout
from rlhf_trainer.sampling.rollout import Rollout, decode, encode_prompts, stop_ids

ENGINES = ("hf", "vllm")


def validate_options(rollout_engine: str, *, vllm_memory: float, load_in_4bit: bool) -> None:
    """UserError where the rollout engine cannot work."""
    if rollout_engine not in ENGINES:
        raise UserError(f"--rollout_engine {rollout_engine}: it takes {', '.join(ENGINES)}")
    if not 0 < vllm_memory < 1:
        raise UserError(f"--vllm_memory {vllm_memory}: must be between 0 and 1")
    if rollout_engine == "hf":
        return
    if load_in_4bit:
        raise UserError("--rollout_engine vllm takes no base in 4 bits (--load_in_4bit)")
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--rollout_engine vllm needs vLLM and a GPU: pip install 'rlhf-kernels[vllm]'")


def load_engine(
    rollout_engine: str,
    policy: PreTrainedModel,
    *,
    group_size: int,
    gather: bool,
    vllm_memory: float,
    seed: int,
    trust_remote_code: bool,
) -> Callable[..., Rollout]:
    """What samples the rollouts: a function like `rollout.generate`.

    Raises:
        UserError: vLLM cannot load this policy: it is in no folder, an encoder-decoder model, or has new tokens.
    """
    if rollout_engine == "hf":
        return partial(rollout.generate, group_size=group_size, gather=gather)
    if is_encoder_decoder(policy):
        raise UserError("--rollout_engine vllm takes decoders only; an encoder-decoder model needs hf")
    path = adapters.base_name(policy)
    if not path:
        raise UserError("--rollout_engine vllm loads the policy from its folder, and this one was made in memory")
    saved = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config().vocab_size
    embedding: Any = policy.get_input_embeddings()
    now = embedding.weight.shape[0]
    if saved != now:
        raise UserError(f"{path} has {saved} tokens and the policy {now} (--pad_token?); save it with them first")
    device = next(policy.parameters()).device
    return VllmEngine(
        make_llm(path, device, vllm_memory=vllm_memory, seed=seed, trust_remote_code=trust_remote_code)
    ).generate


def make_llm(path: str, device: torch.device, *, vllm_memory: float, seed: int, trust_remote_code: bool) -> Any:
    """vLLM's engine for the base in this folder, within the share `vllm_memory` of the GPU's memory."""
    if device.type != "cuda":
        raise UserError(f"--rollout_engine vllm needs the policy on a GPU, and it is on {device}")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(
        model=path,
        skip_tokenizer_init=True,
        generation_config="vllm",  # none of the folder's sampling defaults
        dtype="bfloat16" if torch.cuda.is_bf16_supported() else "float16",
        gpu_memory_utilization=vllm_memory,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )


def sampling_params(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**options)


class VllmEngine:
    """Rollouts from an engine with vLLM's `generate`, `collective_rpc` and `reset_prefix_cache`."""

    def __init__(self, llm: Any, params: Callable[..., Any] = sampling_params) -> None:
        self.llm, self.params = llm, params

    @torch.no_grad()
    def load(self, policy: PreTrainedModel) -> None:
        """Give vLLM the policy's present weights, and drop its cache of earlier prompts, which the old ones made."""
        with precision.autocast_disabled(
            next(policy.parameters()).device
        ):  # autocast would round the adapter's product
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(policy)})
        self.llm.reset_prefix_cache()

    def generate(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        stop_token: str | None = None,
        **_: Any,  # what concerns the other engine alone: vLLM makes its own batches
    ) -> Rollout:
        """Like `rollout.generate`, each request with a seed drawn from `generator`."""
        self.load(policy)
        rows = encode_prompts(policy, tokenizer, prompts, max_new_tokens)
        stops = stop_ids(policy, tokenizer, stop_token)
        device = next(policy.parameters()).device
        seeds = torch.randint(2**31, (len(rows),), generator=generator, device=device).tolist()
        options = {"temperature": temperature, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "max_tokens": max_new_tokens}
        # vLLM gets no tokenizer, and so knows no EOS but these.
        params = [self.params(**options, seed=seed, stop_token_ids=stops, detokenize=False) for seed in seeds]
        requests = [{"prompt_token_ids": row} for row in rows]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return to_rollout(tokenizer, prompts, rows, answers, stops, device)


def merged_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in the folder, tensor) of every weight, the main adapter added; one merged weight at a time in memory."""
    layers = {name: module for name, module in policy.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, parameter in policy.named_parameters():
        layer, _, own = name.partition(".base_layer.")
        module: Any = layers.get(layer)
        if ".lora_" in name:
            continue
        if module is None or own != "weight" or adapters.MAIN not in module.scaling:  # another adapter's alone
            yield name.replace(".base_layer.", "."), parameter.detach()
            continue
        yield f"{layer}.weight", parameter.detach() + module.get_delta_weight(adapters.MAIN).to(parameter.dtype)


def to_rollout(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    rows: Sequence[list[int]],
    answers: Sequence[list[int]],
    stops: list[int],
    device: torch.device,
) -> Rollout:
    """Ids of prompts and answers -> the padded rollout; an answer ended if its last token is one of `stops`."""
    pad_id = padding_id(tokenizer)
    ids, mask = left_pad(rows, pad_id)
    backwards, real = left_pad([answer[::-1] for answer in answers], pad_id)
    if backwards.shape[1] == 0:  # every answer is empty: a column that does not count keeps the shapes
        backwards, real = pad(backwards, (0, 1), value=pad_id), pad(real, (0, 1))
    ended = torch.tensor([bool(answer) and answer[-1] in stops for answer in answers], device=device)
    length = ids.shape[1]
    ids, mask = torch.cat([ids, backwards.flip(1)], 1).to(device), torch.cat([mask, real.flip(1)], 1).to(device)
    return Rollout(ids, mask, length, ended, list(prompts), decode(tokenizer, ids, mask, length, stops))
