"""From a full-precision weight and the activations it meets to :class:`qlab.weights.Int4Weight`: RTN, GPTQ and AWQ.

Everything inside is float64. Scales are rounded to their stored dtype before a code is chosen, so that the codes are the best
ones for the weight that kernels will really compute with.
"""
