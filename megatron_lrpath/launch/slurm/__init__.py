"""A plan as Slurm jobs: the graph, its scripts and their submission, and the program that runs in each job."""
