"""Run a plan as Slurm jobs: the graph, its scripts and their submission, and the program in each job."""
