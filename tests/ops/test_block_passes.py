"""The passes over a block that torch.compile fuses, against the plain operations; and what happens where it cannot.

Most of it goes through torch's tracer alone, as the C++ that inductor makes of it takes seconds to compile.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch

from megalign.engines.head import describe_head
from megalign.ops import block_passes
from megalign.ops.block_passes import CompiledPasses, choose_passes, compiler_problem
from megalign.ops.head_blocks import HeadBlocks, HeadConfig
from megalign.schema import UserError
from tests.support.head_calls import FORMS, assert_same, call, error, own_part, whole
from tests.support.slow_logp import Answer, make_problem, solve

HEADS = {"plain": {}, "all": {"temperature": 0.7, "scale": 1.3, "softcap": 3.0}}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@dataclass
class Tracer:
    """A backend that runs what was traced, and counts how often it was asked for another kernel."""

    kernels: list[str] = field(default_factory=list)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.kernels.append(str(graph.code))
        return graph.forward


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def answer_of(form: str, *, passes: CompiledPasses | None, head: dict[str, Any], dtype: torch.dtype, **options: Any):
    """(answer, exact one) of 39 tokens in chunks of 16 and a last of 7; tiles of 64 rows and a last of 44."""
    problem = make_problem(39, 300, scale=2, bias=options.pop("bias", False), hidden=32, borders=(0, 299))
    problem = problem if dtype == torch.float64 else problem.rounded(dtype)
    entropy = options.pop("entropy", True) and form == "recompute"
    exact = solve(problem, entropy=entropy, **head)
    lse_N = exact.lse_N if dtype == torch.float64 else exact.lse_N.float()
    shard = whole(problem, padding=4, tile=64)
    cfg = HeadConfig(**head, chunk_tokens=16, compiled=passes, **options)
    done = call(problem, form, shard, cfg=cfg, dtype=dtype, lse_N=lse_N, entropy=entropy, accuracy=True)
    return done.answer(), own_part(exact, shard, None, form=form, target_N=problem.target_N)


def assert_equal_to(plain: Answer, mine: Answer, *, share: float = 1e-6) -> None:
    for name, value in vars(plain).items():
        if value is None or name == "correct_N":
            assert (value is None) == (getattr(mine, name) is None)
            assert value is None or torch.equal(value, getattr(mine, name))
        else:
            assert getattr(mine, name).dtype == value.dtype
            assert error(getattr(mine, name), value) <= share * float(value.double().norm()), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("bias", [False, True])
def test_equals_dense_logits(form, head, bias):
    tracer = Tracer()
    passes = CompiledPasses(tracer)
    mine, exact = answer_of(form, passes=passes, head=head, dtype=torch.float64, bias=bias)
    assert_same(mine, exact, tolerance=1e-12)
    plain, _ = answer_of(form, passes=None, head=head, dtype=torch.float64, bias=bias)
    assert (mine.entropy_N is None, mine.correct_N is None) == (plain.entropy_N is None, plain.correct_N is None)
    # One a pass: neither the sizes of chunks and tiles nor the head's numbers ask for another.
    assert not passes.failed and len(tracer.kernels) == (1 if form == "given lse" else 2)
    answer_of(form, passes=passes, head=dict.fromkeys(head, 2.0), dtype=torch.float64, bias=bias)
    assert len(tracer.kernels) == (1 if form == "given lse" else 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_plain_operations(form, dtype):
    for head in HEADS.values():
        both = [
            answer_of(form, passes=passes, head=head, dtype=dtype, bias=True)[0]
            for passes in (None, CompiledPasses(Tracer()))
        ]
        # bf16: dH and dW are rounded at the end, where a last bit of fp32 may turn one in some thousand.
        assert_equal_to(*both, share=1e-6 if dtype == torch.float32 else 2e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_narrow_gradient_loses_no_more_than_the_plain_operations(form):
    options = {"head": {}, "dtype": torch.bfloat16, "low_precision_grad": True, "entropy": False}
    plain, exact = answer_of(form, passes=None, **options)
    mine, _ = answer_of(form, passes=CompiledPasses(Tracer()), **options)
    for name in ("grad_NH", "grad_VH"):
        wanted = getattr(exact, name)
        assert error(getattr(mine, name), wanted) <= 1.02 * error(getattr(plain, name), wanted), name


def test_log_probs_are_the_same_to_the_bit_in_every_form():
    passes = CompiledPasses(Tracer())
    problem = make_problem(23, 30, scale=2, bias=True)
    options = {"cfg": HeadConfig(softcap=4.0, chunk_tokens=5, compiled=passes), "dtype": torch.bfloat16}
    scored = call(problem, "recompute", whole(problem, tile=8), **options).logp
    for form in ("weighted", "given lse"):
        found = call(problem, form, whole(problem, tile=8), lse_N=scored.lse_N, **options).logp
        assert torch.equal(found.logp_N, scored.logp_N), f"{form}: a two-pass step would see a gap"


def test_a_block_of_one_token_is_not_compiled():
    tracer = Tracer()
    problem = make_problem(17, 33)
    cfg = HeadConfig(chunk_tokens=16, compiled=CompiledPasses(tracer))
    mine = call(problem, "recompute", whole(problem, padding=0, tile=16), cfg=cfg).answer()
    assert_same(mine, solve(problem), tolerance=1e-12)
    assert len(tracer.kernels) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("good", [0, 1])
def test_where_the_compiler_fails_the_numbers_stay(form, good, capsys):
    """Also where the first pass worked and the second does not."""
    tracer = Tracer()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        if len(tracer.kernels) == good:
            raise RuntimeError("ptxas: no such file\nand more")
        return tracer(graph, inputs)

    passes = CompiledPasses(backend)
    mine, exact = answer_of(form, passes=passes, head=HEADS["all"], dtype=torch.float64, bias=True)
    assert_same(mine, exact, tolerance=1e-12)
    assert passes.failed == (good == 0 or form != "given lse")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == passes.failed
    assert all("ptxas: no such file" in line and "Set TORCH" not in line for line in told)
    if passes.failed:
        shard = whole(make_problem(1, 9))
        assert HeadBlocks(torch.float64, torch.empty(9, 1), None, shard, HeadConfig(compiled=passes)).compiled is None


def test_memory_that_is_not_there_is_no_fault_of_the_compiler():
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*arguments: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    passes = CompiledPasses(backend)
    with pytest.raises(torch.OutOfMemoryError):
        answer_of("weighted", passes=passes, head={}, dtype=torch.float32)
    assert not passes.failed


def test_who_gets_compiled_passes(monkeypatch):
    assert choose_passes("torch", GPU) is None and choose_passes("auto", CPU) is None
    assert choose_passes("compiled", CPU) is not None
    assert [describe_head(kernel, CPU) for kernel in ("auto", "torch", "compiled")] == ["", "", ", head compiled"]
    monkeypatch.setattr(block_passes, "compiler_problem", lambda device: None)
    assert choose_passes("auto", GPU) is not None and choose_passes("compiled", GPU) is not None
    torch.use_deterministic_algorithms(True)
    try:
        assert choose_passes("auto", GPU) is None and choose_passes("compiled", GPU) is not None
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_gpu_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    compiler_problem.cache_clear()
    try:
        assert choose_passes("auto", GPU) is None
        assert describe_head("auto", GPU).startswith(", head not compiled (ModuleNotFoundError: import of triton")
        with pytest.raises(UserError, match=r"engine.head_kernel is 'compiled': .* triton .* must be auto or torch"):
            choose_passes("compiled", GPU)
    finally:
        compiler_problem.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_inductor_equals_the_plain_operations(dtype, head):
    passes = CompiledPasses()
    for form, bias, entropy in product(FORMS, (False, True), (False, True)):
        options = {"head": head, "dtype": dtype, "bias": bias, "entropy": entropy}
        mine, _ = answer_of(form, passes=passes, **options)
        plain, _ = answer_of(form, passes=None, **options)
        assert_equal_to(plain, mine, share=1e-6 if dtype == torch.float32 else 2e-4)
    assert not passes.failed
