"""The tiny Llama, for the command to run over."""

from tests.tiny_llama import awq, changed, gptq, parameters, tokenizer_files, unquantised, write_checkpoint

__all__ = ["awq", "changed", "gptq", "parameters", "tokenizer_files", "unquantised", "write_checkpoint"]
