"""The value function of PPO: a linear head on the policy's states, or on those of an adapter of its own on its base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import PreTrainedModel

from rlhf_trainer.base.errors import UserError
from rlhf_trainer.base.folders import read_tensors
from rlhf_trainer.models import precision
from rlhf_trainer.models.adapters import (
    MAIN,
    VALUE,
    Adapter,
    copy_adapter,
    has_adapter,
    load_adapter_weights,
    tensors_of,
    use_adapter,
)
from rlhf_trainer.models.forward import head_inputs

VALUE_HEAD = "value_head.safetensors"
VALUE_STEP = 0.3  # reward units that a value moves in a step of Adam, at most
ADAPTER = "adapter."  # of the names of the adapter's tensors in that file


class ValueHead(nn.Module):
    """One number per hidden state, 0 at the start: the value of the state before the token that comes next.

    The states are brought to a mean square of 1 first: models differ by more than tenfold in their size, and one
    learning rate must fit all. From random weights the first values would be noise as large as the returns.

    own_adapter: the states are those of the base with the adapter VALUE, which the policy carries.
    """

    def __init__(self, hidden_size: int, own_adapter: bool = False) -> None:
        super().__init__()
        self.own_adapter = own_adapter
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def learning_rate(self) -> float:
        """Adam moves every weight by at most about this in a step, and so a value by 0.3 reward units.

        0.3: var_explained in the second half of `rlhf demo` was 0.26 to 0.29 at 10 to 30 times the policy's rate, 0.3
        being 16 times it, and below 0 at the policy's own.
        """
        return VALUE_STEP / self.linear.in_features

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> values [...], float32, reward units."""
        with precision.autocast_disabled(hidden.device):
            states = hidden.to(self.linear.weight.dtype)
            return self.linear(rms_norm(states, states.shape[-1:])).squeeze(-1).float()

    def values(self, policy: PreTrainedModel, hidden: Tensor, ids: Tensor, mask: Tensor, start: int) -> Tensor:
        """[b, R] values of the states before the tokens ids[:, start:]; hidden [b, R, D] are the policy's own there.

        With an adapter of its own this is a second forward pass.
        """
        if self.own_adapter:
            with use_adapter(Adapter(policy, VALUE)) as model:
                hidden = head_inputs(model, ids, mask, start)["hidden"]
        return self(hidden)

    def tensors(self, policy: PreTrainedModel) -> dict[str, Tensor]:
        """What is kept in VALUE_HEAD."""
        own = tensors_of(policy, VALUE) if self.own_adapter else {}
        return self.state_dict() | {ADAPTER + name: tensor for name, tensor in own.items()}


def load_value_head(
    policy: PreTrainedModel, device: torch.device, *, folder: str, own_adapter: bool = False
) -> ValueHead:
    """The value head in the policy's folder, or a new one if it has none that reads the same kind of states.

    folder: "" is none. With `own_adapter` the policy gets the value's adapter: the folder's, or a copy of the policy's.

    Raises:
        UserError: an adapter is asked for, and the policy carries none; or the folder's does not fit.
    """
    if own_adapter and not has_adapter(policy):
        raise UserError("--value_adapter needs a policy that is an adapter itself: --lora_r, or an adapter's folder")
    head = ValueHead(policy.config.get_text_config().hidden_size, own_adapter)
    file = Path(folder) / VALUE_HEAD
    tensors = read_tensors(file) if folder and file.is_file() else {}
    own = {name.removeprefix(ADAPTER): tensor for name, tensor in tensors.items() if name.startswith(ADAPTER)}
    if own_adapter:
        copy_adapter(policy, MAIN, VALUE, trained=True)
    if tensors and bool(own) == own_adapter:
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(ADAPTER)}
        expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
        if expected != {name: tensor.shape for name, tensor in plain.items()}:
            raise UserError(f"{file}: no value head of this policy; expected {', '.join(expected)} of its hidden size")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise UserError(f"{file}: holds numbers that are not finite")
        head.load_state_dict(plain)
        if own:
            load_adapter_weights(policy, VALUE, own, str(file))
    return head.to(device)
