"""Our metrics as `evaluate.Metric` modules: `evaluate.load(metric_module("glue"), "mrpc")`.

Importing one imports `evaluate`, which takes seconds; nothing else in the package does.
"""
