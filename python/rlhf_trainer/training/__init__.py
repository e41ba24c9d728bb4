"""What the training stages share: the loop of supervised stages, checkpoints, logs, alerts."""
