"""Pure functions on tensors: attention in its kinds, feature maps, the loss, small-batch matmul."""
