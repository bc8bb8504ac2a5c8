"""`asft demo`: the whole road on one machine, from a Hugging Face checkpoint to a report with measured figures.

skills.py is the small world the models live in, plan.py says what is run, run.py runs it, measure.py measures, verdict.py draws
the conclusions by rule, plots.py and report.py show them.
"""
