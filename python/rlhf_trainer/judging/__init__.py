"""Rewards that score a completion, judges that compare two, and win rates."""
