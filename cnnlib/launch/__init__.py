"""Train an experiment as jobs: divide the experiment, start the jobs, and merge the results of the jobs.

A job is a plain command, `cnnlib run NAME --part PART --out DIR/jobs/PART --resume`. A job trains one arm, or
a block of the arm's seeds, into its own folder. If a job is started again, it continues from its checkpoint. Jobs run
on this machine, on Slurm or on Ray.
"""
