"""head_of: backbone and head of any transformers model, so that the linear family takes the place of its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# What a model makes of these raw outputs of its head tells its scale and its softcap; both are exact in 16 bits.
_PROBES = (1.0, 4096.0)
_FINAL_BIAS = "final_logits_bias"  # BART's, Marian's and their kin's, added to the head's output
# Factors found by probes. Layers and parameters are looked up anew each time: adapters come, go and are merged.
_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], float]] = WeakKeyDictionary()
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_FACTORS = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")


def head_of(model: nn.Module, *, softcap: float | None = None, logit_scale: float | None = None) -> ModelHead:
    """The head of a causal or sequence-to-sequence language model, and its hidden states without any logits.

        head = head_of(model)
        hidden = head.hidden_states(input_ids=ids, attention_mask=mask)
        logprobs = linear_logprobs(hidden[:, :-1], labels=ids[:, 1:], mask=mask[:, 1:], **head.options())

    Knows tied heads, a bias of the layer or of the model (BART), a softcap (Gemma 2), a factor of the logits (Cohere,
    Granite), LoRA or a trained copy on the head (PEFT), DTensor and FSDP2 weights (gathered by `options`), and
    wrappers: PEFT, accelerate, DistributedDataParallel, torch.compile. Needs no transformers: it asks for
    `get_output_embeddings` and `config`.

    Args:
        model: what `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM` gives, wrapped or not.
        softcap, logit_scale: as in `linear_logprobs`; None: found in the config, and checked against what the model
            does with its head's output in the model's first `hidden_states`.

    Raises:
        TypeError, ValueError: no output layer, or one of an unknown kind; the message says which.
    """
    inner = _unwrapped(model)
    if not hasattr(inner, "get_output_embeddings"):
        raise TypeError(
            f"head_of: {type(inner).__name__} has no get_output_embeddings(); it takes a transformers model"
        )
    layer = inner.get_output_embeddings()
    if layer is None:
        raise ValueError(
            f"head_of: {type(inner).__name__} has no output embeddings; it takes a causal or sequence-to-sequence "
            f"language model, not a backbone or a classifier"
        )
    config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
    return ModelHead(model, layer, config, softcap, logit_scale)


class ModelHead:
    """See `head_of`. Holds the model's own modules: parameters are read anew in each call."""

    def __init__(
        self, model: nn.Module, layer: nn.Module, config: Any, softcap: float | None, logit_scale: float | None
    ) -> None:
        self.model, self.layer = model, layer
        self._bias_owner: Any = next((module for module in model.modules() if _FINAL_BIAS in module._buffers), None)
        caps = (getattr(config, name, None) for name in _SOFTCAPS)
        self.softcap = softcap or next(filter(None, caps), None)
        factors = [getattr(config, name, None) for name in _FACTORS]
        known = [float(x) for x in factors if isinstance(x, int | float) and x > 0]
        # Granite divides by what HyperCLOVA multiplies with, under one name: the probe decides.
        self._candidates = [1.0, *(y for x in known for y in (x, 1 / x))] if logit_scale is None else [logit_scale]
        self.logit_scale = self._candidates[0]
        # A model of this class and these settings has been asked before: no second host sync.
        self._key = (type(model), self.softcap, *self._candidates)
        key, factor = _FOUND.get(model, (None, self.logit_scale))
        self._probed = key == self._key
        self.logit_scale = factor if self._probed else self.logit_scale
        self._dtype: torch.dtype | None = None  # of the hidden states, once they are known

    def options(self, process_group: Any = None) -> dict[str, Any]:
        """weight, bias, lora, softcap and logit_scale for the linear family; after `hidden_states`.

        lora is a list of (A, B, scale) under LoRA on the head, else None. A weight that is a DTensor is gathered once a
        call. Its gradient flows back to the shards: under FSDP2 the mean over the ranks, as FSDP2 does, else as that
        of a replicated tensor (every rank has the same hidden states).

        Args:
            process_group: with a head that is sharded by rows over this group (a DTensor on its mesh), nothing is
                gathered: the shards are used as they are, and process_group is among the options.

        Raises:
            ValueError: before the first `hidden_states` where only the model itself can say the factor; an adapter
                with dropout or of another kind than plain LoRA.
            TypeError: process_group with a model's own bias (BART) and a weight that is no DTensor.
        """
        if not self._probed and len(self._candidates) > 1:
            raise ValueError("head_of: call hidden_states first; it finds the factor that the model puts on its logits")
        weight, bias, lora = _parameters(self.layer)
        if process_group is None and any(hasattr(x, "full_tensor") for x in (weight, bias, *sum(lora, ()))):
            averaged = any(type(module).__name__.startswith("FSDP") for module in self.model.modules())

            def gathered(x: Any) -> Any:
                return _full_tensor(x, self._dtype, averaged)

            weight, bias = gathered(weight), gathered(bias)
            lora = [(gathered(a), gathered(b), scale) for a, b, scale in lora]
        if self._bias_owner is not None:
            final = self._bias_owner._buffers[_FINAL_BIAS].reshape(-1).to(weight.dtype)
            final = final if process_group is None else _sharded_as(weight, final)
            bias = final if bias is None else bias + final
        found: dict[str, Any] = {"weight": weight, "bias": bias, "lora": lora or None}
        found |= {"softcap": self.softcap, "logit_scale": self.logit_scale}
        return found if process_group is None else {**found, "process_group": process_group}

    def hidden_states(self, *args: Any, **inputs: Any) -> Tensor:
        """[B, T, D]: what the head would have been given in `model(*args, **inputs)`; the head itself does not run.

        For a sequence-to-sequence model, of the decoder. A model's first call checks softcap and factor, on a GPU with
        one host sync.

        Raises:
            RuntimeError: the model calls its head not at all, or more than once.
            ValueError: the model does something to its logits that softcap and logit_scale do not describe.
        """
        seen: list[Tensor] = []

        def instead(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append(hidden)
            return _Probes.apply(hidden, *(p for p in self.layer.parameters() if p.requires_grad))

        with _Replaced(self.layer, instead), _no_final_bias(self._bias_owner):
            output = self.model(*args, **{"use_cache": False, **inputs})
        if len(seen) != 1:
            raise RuntimeError(
                f"head_of: {type(self.model).__name__} called its output layer {len(seen)} times in a forward, not 1"
            )
        if not self._probed and seen[0].numel():
            self._check(output.logits.detach().reshape(-1, len(_PROBES))[0].float().tolist())
            self._probed = True
            _FOUND[self.model] = self._key, self.logit_scale
        self._dtype = seen[0].dtype
        if seen[0].requires_grad and output.logits.requires_grad:
            return _PassGradient.apply(seen[0], output.logits)
        return seen[0]

    def _check(self, found: list[float]) -> None:
        for scale in self._candidates:
            expected = torch.tensor(_PROBES, dtype=torch.float64, device="cpu") * scale
            if self.softcap is not None:
                expected = self.softcap * torch.tanh(expected / self.softcap)
            if torch.allclose(expected, torch.tensor(found, dtype=torch.float64, device="cpu"), rtol=0.02):
                self.logit_scale = scale
                return
        raise ValueError(
            f"head_of: this model turns outputs {list(_PROBES)} of its head into logits {found}, which softcap "
            f"{self.softcap} and logit_scale in {self._candidates} do not explain; pass head_of(model, softcap=, "
            f"logit_scale=)"
        )


class _Probes(torch.autograd.Function):
    """In place of a head's output: constants that for autograd come of hidden and of the head's parameters.

    DistributedDataParallel looks in the graph of the output for what the backward will reach.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        return hidden.new_tensor(_PROBES).expand(*hidden.shape[:-1], len(_PROBES)).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _PassGradient(torch.autograd.Function):
    """hidden, whose backward begins at the model's output: wrappers have their hooks there (FSDP2)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)


class _Replaced:
    """A module whose forward is another function for a while; hooks that wrap its forward come back after."""

    def __init__(self, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        self._module, self._forward = module, forward

    def __enter__(self) -> None:
        self._own = self._module.__dict__.get("forward")
        self._module.__dict__["forward"] = self._forward

    def __exit__(self, *_: object) -> None:
        if self._own is None:
            del self._module.__dict__["forward"]
        else:
            self._module.__dict__["forward"] = self._own


@contextmanager
def _no_final_bias(owner: Any) -> Iterator[None]:
    """The model's own bias, which has a number for each token, out of the way of the probes."""
    if owner is None:
        yield
        return
    bias = owner._buffers[_FINAL_BIAS]
    owner._buffers[_FINAL_BIAS] = bias.new_zeros(1)
    try:
        yield
    finally:
        owner._buffers[_FINAL_BIAS] = bias


def _unwrapped(model: nn.Module) -> Any:
    while True:
        inside = getattr(model, "_orig_mod", None)
        if inside is None and not hasattr(model, "get_output_embeddings"):
            inside = getattr(model, "module", None)
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def _variant(layer: Any, name: str) -> str:
    """What makes PEFT's adapter more than a low-rank sum, or nothing."""
    if getattr(layer, "use_dora", {}).get(name):  # all that says so before PEFT 0.16
        return "DoRA"
    if name in getattr(layer, "lora_variant", {}):
        return type(layer.lora_variant[name]).__name__
    return "dropout" if layer.training and getattr(layer.lora_dropout[name], "p", 0) > 0 else ""


def _parameters(layer: Any) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor, float]]]:
    """Weight [V, D], bias and adapters (A, B, scale) of a linear layer, also under PEFT."""
    if hasattr(layer, "modules_to_save") and not getattr(layer, "disable_adapters", False):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    if hasattr(layer, "base_layer"):
        weight, bias, lora = _parameters(layer.base_layer)
        if layer.disable_adapters or layer.merged:
            return weight, bias, lora
        for name in layer.active_adapters:
            if name not in layer.lora_A:
                continue
            variant = _variant(layer, name)
            if variant:
                raise ValueError(f"head_of: adapter {name!r} on the head uses {variant}; only plain LoRA is known")
            a, b, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
            if getattr(b, "bias", None) is not None:
                shift = (scale * b.bias).to(weight.dtype)
                bias = shift if bias is None else bias + shift
            lora.append((a.weight, b.weight, scale))
        return weight, bias, lora
    found: Any = getattr(layer, "weight", None)
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise TypeError(f"head_of: the output layer is a {type(layer).__name__}; it takes one with a weight [V, D]")
    return found, getattr(layer, "bias", None), []


def _sharded_as(weight: Any, bias: Tensor) -> Any:
    """This rank's part of a bias [V] that every rank has, for a weight that is a DTensor sharded by rows."""
    if not hasattr(weight, "device_mesh"):
        raise TypeError(
            f"head_of: the model has {_FINAL_BIAS}, and with process_group the head's weight is a "
            f"{type(weight).__name__}; it takes a DTensor, whose placement says which of the biases are this rank's"
        )
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    return DTensor.from_local(bias, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=weight.placements
    )


def _full_tensor(x: Any, dtype: torch.dtype | None, averaged: bool) -> Any:
    """A DTensor's full tensor, in dtype; others as they are.

    averaged: ranks have different data, and the gradient of the shards is the mean over them.
    """
    if not hasattr(x, "full_tensor"):
        return x
    if not averaged:
        return x.to(dtype).full_tensor()
    if x.device_mesh.ndim != 1:
        raise ValueError(f"head_of: the head lies on {x.device_mesh}; under FSDP2 it takes a mesh of one dimension")
    from torch.distributed.tensor import Partial

    shards, ranks = x.view_as(x), x.device_mesh.size()
    if shards.requires_grad:
        shards.register_hook(lambda grad: grad / ranks)
    return shards.to(dtype).full_tensor(grad_placements=[Partial()])
