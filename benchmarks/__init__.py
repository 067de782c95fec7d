"""Compare the speed of cnnlib, stock Flax and PyTorch in the same run. No benchmark checks a time against a limit."""
