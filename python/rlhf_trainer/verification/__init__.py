"""The checks that `rlhf verify` runs."""
