"""Train an experiment as jobs: divide it, start the jobs on this machine, Slurm or Ray, and merge their results.

A job is a plain command, `cnnlib run NAME --part PART --out DIR/jobs/PART --resume`. It trains one arm, or a block of
the arm's seeds, into its own folder. If a job is started again, it continues from its checkpoint.
"""
