"""A plan as Slurm jobs: the graph and its scripts, their submission, and the program that runs in each job."""
