"""The mathematics on [B, T] tensors: options, objective, policy terms, advantages. Pure: no backend, no process group."""
