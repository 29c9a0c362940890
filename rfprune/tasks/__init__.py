"""Text in, score out: tasks, their data, metrics and checkpoints. Knows nothing of pruning."""
