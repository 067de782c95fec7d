"""Convolutions, locally connected layers, pooling and batch normalisation as functions of arrays."""

from cnnlib.ops.functional import avg_pool as avg_pool
from cnnlib.ops.functional import batch_norm as batch_norm
from cnnlib.ops.functional import conv1d as conv1d
from cnnlib.ops.functional import conv2d as conv2d
from cnnlib.ops.functional import conv_transpose1d as conv_transpose1d
from cnnlib.ops.functional import conv_transpose2d as conv_transpose2d
from cnnlib.ops.functional import local1d as local1d
from cnnlib.ops.functional import local2d as local2d
from cnnlib.ops.functional import max_pool as max_pool
