"""What ``bench.prove_kernels`` compares: inputs, counts, and one module for each part."""
