"""Who judges completions: rewards, judges that compare two answers, win rates."""
