"""Storage layouts of INT4 weights, one file each: where every code, zero point and scale lies in memory.

Each module has a frozen dataclass of the tensors under the names that checkpoints and kernels use,
``pack(weight, ...) -> tensors`` and its exact inverse ``unpack(tensors, *, name="", input_scale=None) -> Int4Weight``. Both
run on the weight's device, copy what they keep, and raise PackingError for what the layout cannot hold. An AWQ input scale
is in no layout (checkpoints fold it into the previous operation), so ``unpack`` takes it beside the tensors.

| module | codes | zero points | group index |
|---|---|---|---|
| ``awq`` | int32 [K, N/8] | 0 to 15 | none: rows in order |
| ``gptq`` | int32 [K/8, N] | version 1: 1 to 16; version 2: 0 to 15 | any |
| ``exllama`` | gptq's, rows sorted by group, nibbles shuffled | as gptq | any, as a permutation |
| ``marlin`` | int32 [K/16, 2N] in tensor-core tiles | ``uint4``: 0 to 15; ``uint4b8``: 8 | any, as a permutation |
| ``compressed_tensors`` | int32 [N, K/8] | 0 to 15 | any |
| ``fragments`` | int32 [N/64, K/128, W], blocks with their scales and zero points | 0 to 16 | any, as a permutation |
| ``wgmma_rows`` | int32 [N/64, K/128, 64, 16], padded | 0 to 16 | any, as a permutation |

Machete's prepacking op starts from gptq's ``qweight``; what it makes of it is CUTLASS's own and has no module here.
"""
