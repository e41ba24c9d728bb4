"""What everything else stands on: errors, config, console, processes."""
