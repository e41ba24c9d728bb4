"""The pipeline of RLHF on rlhf_kernels' ops: SFT, reward model, PPO, evaluation. `rlhf --help` is its command line."""
