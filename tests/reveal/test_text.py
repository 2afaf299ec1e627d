"""Recipes and trees as text, and the form that reads as the kernel runs."""

from __future__ import annotations

import itertools

import pytest

from qlab.recipe import Fma, Join, Node, TensorCore, chain, join, rounded, unordered
from qlab.report.recipe import recipe_text, spined, tree_text
from qlab.reveal import settled
from tests.reveal.conftest import region

CORE = TensorCore(25, 16, -133)


@pytest.mark.parametrize(
    ("kernel", "m", "k", "n"),
    [
        ("vllm.marlin.gptq", 1, 4096, 256),
        ("vllm.marlin.gptq", 1, 4096, 4096),
        ("vllm.marlin.awq", 16, 4096, 6144),
        ("vllm.marlin.gptq", 300, 2048, 22016),
        ("vllm.marlin.gptq.atomic", 1, 4096, 1024),
        ("vllm.awq_gemm", 16, 4096, 4096),
        ("vllm.awq_triton", 16, 4096, 4096),
        ("vllm.gptq_gemm", 1, 4096, 4096),
        ("vllm.machete.awq", 16, 14336, 4096),
        ("triton.awq_dequantize", 16, 4096, 4096),
    ],
)
def test_every_recipe_is_short(kernel: str, m: int, k: int, n: int) -> None:
    recipe, _ = region(kernel, m, k, n)
    lines = recipe_text(recipe).split("\n")
    assert str(recipe) == "\n".join(lines)
    assert len(lines) < 30
    assert max(map(len, lines)) <= 125
    assert lines[0].startswith(f"M={m} K={k} N={n} fp16, w = ")
    assert recipe.hash[:16] in lines[0]


def test_marlin_reads_as_it_runs() -> None:
    recipe, _ = region("vllm.marlin.gptq", 1, 512, 256)
    assert recipe_text(recipe).split("\n")[1:] == [
        "every chain: mma F=25 L=16 e0=-133 fp32",
        "rows 0:1, columns 0:256: RN of",
        "  7 parts added in fp32, one after the other:",
        "    k 448:480 + k 480:512 + k 416:448 + k 384:416",
        "    3 x, k -128 each: (k 320:352 + k 352:384 + k 288:320 + k 256:288)",
    ]


def test_equal_trees_are_written_once() -> None:
    """And of many that differ in their cuts the first few."""
    recipe, _ = region("vllm.machete.awq", 16, 14336, 4096)
    lines = recipe_text(recipe).split("\n")
    assert lines[-1] == f"{len(recipe.regions) - 3} more trees, in {len(recipe.regions) - 3} regions"
    written = [line for line in lines if line.startswith("  ")]
    assert len(set(written)) == len(written) == 3


def test_chains_of_different_steps_are_named() -> None:
    tree = join([chain(CORE, range(16)), chain(Fma(), range(16, 20))])
    assert tree_text(tree) == "k 0:16 (mma F=25 L=16 e0=-133 fp32) + k 16:20 (fma fp32)"
    assert tree_text(rounded(tree, "fp16")).startswith("RN fp16(k 0:16")


def test_atomics_and_roundings() -> None:
    parts = [rounded(chain(CORE, range(s, s + 16)), "fp16") for s in (0, 16, 32)]
    assert tree_text(unordered(parts, "fp16", scaled=True)).split("\n")[1] == (
        "atomics fp16 scaled[RN fp16(k 0:16), RN fp16(k 16:32), RN fp16(k 32:48)]"
    )
    assert tree_text(join(parts, "fp16")).split("\n")[1] == "RN fp16(k 0:16) +fp16 RN fp16(k 16:32) +fp16 RN fp16(k 32:48)"


def test_the_order_of_two_operands_does_not_count() -> None:
    """However a tree is written down, settled it is the same; and another tree is another."""
    a, b, c, d = (chain(CORE, range(s, s + 16)) for s in (0, 16, 32, 48))

    def forms(x: Node, y: Node, z: Node, w: Node) -> set[Node]:
        pairs = [join(p) for p in itertools.permutations((x, y))], [join(p) for p in itertools.permutations((z, w))]
        return {settled(join(p), "fp16") for q in itertools.product(*pairs) for p in itertools.permutations(q)}

    assert len(forms(a, b, c, d)) == 1
    assert forms(a, b, c, d).isdisjoint(forms(a, c, b, d))
    turned = spined(join((d, join((c, join((b, a)))))))
    assert settled(Join((join((a, b)), c, d)), "fp16") == turned == settled(join([a, b, c, d]), "fp16")


def test_what_no_probe_sees_is_settled() -> None:
    half = [rounded(chain(CORE, range(s, s + 16)), "fp16") for s in (0, 16)]
    same = [join(half, "fp16"), join(half), unordered(half, "fp16"), join([*half, chain(CORE, [])])]
    same.append(rounded(join(half), "fp16"))
    assert len({settled(node, "fp16") for node in same}) == 1
    assert settled(chain(Fma(), [1, 0, 2]), "fp16") == settled(chain(Fma(), range(3)), "fp16")
    wide = [chain(CORE, range(16)), half[1]]
    assert settled(rounded(join(wide), "fp16"), "bf16") != settled(join(wide), "bf16")
