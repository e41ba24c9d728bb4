"""The linear family: ops on hidden states and the weight of a head, whose logits are never in memory."""
