"""What each method collects and how it chooses units; one file per method.

problem.py       model, blocks, calibration batches and choices, made once for a run
statistics.py    the interface of a method; picks the method of the settings
kwon.py          Kwon et al. 2022: Fisher importance, rearrangement, mask tuning
curvature.py     the default: error curves and their exact allocation
criteria.py      classical importance criteria as baselines
allocation.py    how a budget is divided among blocks
budget.py        the cost model of a constraint, and whether the constraint can be met
"""
