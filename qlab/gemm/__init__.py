"""qlab's own CUDA GEMM: from a recipe's scheme to launches (``plan``), and from a plan to y (``launch``)."""
