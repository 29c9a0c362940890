"""The mathematics of pruning: one step of the method per file; README.md explains their order."""
