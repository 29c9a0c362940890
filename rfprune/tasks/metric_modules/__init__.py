"""Our metrics as `evaluate.Metric` modules: `evaluate.load(str(metric_module("glue")), "mrpc")`.

Importing one imports `evaluate`, which takes seconds; `rfprune.tasks.metrics.load_metric` does so
when a score is computed.
"""
