"""Compare the speed of cnnlib with stock Flax and PyTorch in the same run. No benchmark asserts a time."""
