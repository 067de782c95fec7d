"""Run a spec as a Flax module, and convert weights exactly between convolutional, local and full nets."""
