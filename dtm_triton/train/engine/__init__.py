"""The loop and what keeps a run alive: processes, checkpoints, signals, logs."""
