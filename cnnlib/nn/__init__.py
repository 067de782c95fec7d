"""The Flax module that runs a spec, and exact maps between the weights of convolutional, local and full nets."""
