"""The tiny model's fixtures."""

from tests.tiny_llama import awq, gptq, parameters, tokenizer_files, unquantised, write_checkpoint

__all__ = ["awq", "gptq", "parameters", "tokenizer_files", "unquantised", "write_checkpoint"]
