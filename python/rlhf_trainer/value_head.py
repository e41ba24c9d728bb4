"""The value head of PPO and the file it is kept in."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

VALUE_HEAD = "value_head.safetensors"


class ValueHead(nn.Module):
    """One number per hidden state: the value of the state before the token that comes next."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.normal_(self.linear.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> values [...], float32, reward units."""
        return self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1).float()


def load_value_head(folder: str | Path, hidden_size: int) -> ValueHead:
    """The folder's value head, or a new one if it has none."""
    head = ValueHead(hidden_size)
    file = Path(folder) / VALUE_HEAD
    if str(folder) and file.is_file():
        head.load_state_dict(load_file(file))
    return head
