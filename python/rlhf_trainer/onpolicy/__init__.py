"""The parts of `rlhf ppo`."""
