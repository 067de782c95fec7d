"""A run on disk: training, the run's folder, resuming, and callbacks."""
