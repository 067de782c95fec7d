"""Train an experiment as jobs: divide it, start the jobs on this machine, Slurm or Ray, and merge their results.

A job is a plain command, `python -m experiments run NAME --part PART --out DIR/jobs/PART --resume`. It trains one arm,
or a block of its seeds, into a folder of its own. Started again, it goes on from its checkpoint.
"""
