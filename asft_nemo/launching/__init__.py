"""`asft launch` without NeMo-Run: the stages of a run as plain data, their shell scripts, the record of a launch, Slurm's answers."""
