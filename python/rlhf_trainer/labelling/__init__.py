"""The parts of `rlhf label` and of instructions for labellers."""
