"""The kernels, behind one registry. Every module of this folder that defines kernels registers them on import."""
