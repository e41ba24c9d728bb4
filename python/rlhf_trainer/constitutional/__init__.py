"""The parts of `rlhf cai`."""
