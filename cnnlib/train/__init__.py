"""Training: one step, all lanes of an arm, their programs, devices and checkpoints."""
