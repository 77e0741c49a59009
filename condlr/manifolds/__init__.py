"""Pure maps between tensors: the Stiefel manifold and the spectrum of a square matrix.

Every function takes batches: leading dimensions are batch dimensions.
"""
