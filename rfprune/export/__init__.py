"""A pruned model in other formats."""
