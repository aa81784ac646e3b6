"""A study: arms x worlds x sweeps x seeds, each an ordinary run, and what comes of them together.

plan.py      the study file, checked, and its list of runs; imports no torch
runner.py    worker processes, one run at a time each
controls.py  what needs no training of its own: temperatures, rejection sampling, exact targets
results.py   study.json from the run directories
tables.py    the same as Markdown
"""
