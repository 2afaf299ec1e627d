"""Language models whose INT4 linear layers run through chosen kernels, behind one interface (:mod:`qlab.engine.run`).

``builtin`` is qlab's own: transformers' Llama in float64 around one kernel per linear, native or replayed; ``vllm`` drives
vLLM's ``LLM``.
"""
