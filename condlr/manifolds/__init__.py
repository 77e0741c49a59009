"""Pure maps between tensors: the Stiefel manifold, the spectrum of a square matrix, convolutions.

Leading dimensions are batch dimensions.
"""
