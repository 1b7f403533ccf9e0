"""What the head does on a GPU, on a CPU that pretends to be one: products, sizes, what deterministic mode refuses."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalign.engines import head
from megalign.ops import head_blocks, products
from megalign.ops.head_blocks import HeadBlocks, HeadConfig
from megalign.ops.vocab import VocabShard, tile_rows
from megalign.schema import UserError
from tests.support.head_calls import FORMS, call, error, whole
from tests.support.slow_logp import make_problem, solve

aten = torch.ops.aten
# Operators that `torch.use_deterministic_algorithms` refuses on CUDA, those of its documentation that a head might use.
REFUSED = {"cumsum", "put_", "histc", "median", "nll_loss_forward", "kthvalue", "scatter_reduce"}


class Cuda(TorchDispatchMode):
    """Has CUDA's products of low precision into fp32, or refuses them as older versions do."""

    def __init__(self, *, add: str = "exact", mm: bool = True) -> None:
        super().__init__()
        self.add, self.mm, self.calls = add, mm, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        self.calls[name] += func in (aten.mm.dtype_out, aten.addmm.dtype_out)
        assert name not in REFUSED, f"{name} is refused in deterministic mode"
        if func is aten.mm.dtype_out:
            if not self.mm:
                raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")
            left, right, _ = args
            assert left.dtype == right.dtype == torch.bfloat16
            return kwargs["out"].copy_(left.float() @ right.float())
        if func is aten.addmm.dtype_out:
            total, left, right, _ = args
            assert left.dtype == right.dtype == torch.bfloat16
            if self.add == "refused":
                raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
            total = total.bfloat16().float() if self.add == "rounded" else total
            return kwargs["out"].copy_(total + left.float() @ right.float())
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.setattr(head_blocks, "device_type", lambda weight_VH: "cuda")
    products.adds_in_place.cache_clear(), products.check_products.cache_clear()
    yield
    products.adds_in_place.cache_clear(), products.check_products.cache_clear()


def answer_of(form, *, entropy=False, softcap=None, **refusing):
    problem = make_problem(40, 300, scale=2, bias=True, hidden=32).rounded(torch.bfloat16)
    exact = solve(problem, entropy=entropy, softcap=softcap)
    options = {"cfg": HeadConfig(chunk_tokens=16, softcap=softcap), "dtype": torch.bfloat16, "entropy": entropy}
    with Cuda(**refusing) as device:
        done = call(problem, form, whole(problem, padding=0, tile=64), lse_N=exact.lse_N.float(), **options)
        return done.answer(), exact, device.calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_torch_that_does_not_add_products_in_place_gives_the_same(form, softcap):
    options = {"entropy": form == "recompute", "softcap": softcap}
    newer, exact, calls = answer_of(form, **options)
    assert calls["addmm"] > 10
    for name in ("logp_N", "lse_N"):
        torch.testing.assert_close(getattr(newer, name), getattr(exact, name).float(), rtol=2e-6, atol=2e-6)
    for name in ("grad_NH", "grad_VH", "grad_V"):
        assert error(getattr(newer, name), getattr(exact, name)) <= 0.01 * float(getattr(exact, name).norm())
    for add in ("refused", "rounded"):  # the second would lose the small parts of the sum without a word
        products.adds_in_place.cache_clear()
        older, _, calls = answer_of(form, add=add, **options)
        assert calls["addmm"] == 1, "asked once, and used no more"
        for name, mine in vars(older).items():
            assert mine is None or torch.equal(mine, getattr(newer, name)), name


def test_a_cpu_is_not_asked(monkeypatch):
    monkeypatch.undo()
    problem = make_problem(9, 20)
    for choice in (False, True):
        cfg = HeadConfig(low_precision_grad=choice)
        call(problem, "recompute", whole(problem), cfg=cfg, dtype=torch.bfloat16).answer()
    assert products.adds_in_place.cache_info().misses == 0


def test_a_torch_without_these_products_is_refused_at_the_start(monkeypatch):
    cpu = torch.device("cpu")
    with Cuda():
        products.check_products(cpu, torch.bfloat16)
    products.check_products.cache_clear()
    line = r"torch \S+ does not multiply bfloat16 into float32 on cpu \(mm\(\) got an .*\); must be torch 2.8 or newer"
    with Cuda(mm=False), pytest.raises(UserError, match=line):
        products.check_products(cpu, torch.bfloat16)
    asked = []
    monkeypatch.setattr(head, "check_products", lambda *what: asked.append(what))
    cuda = torch.device("cuda", 0)
    for dtype, device in ((torch.bfloat16, cuda), (torch.float32, cuda), (torch.bfloat16, cpu)):
        assert head.head_config("torch", dtype, device, temperature=0.5).temperature == 0.5
    assert asked == [(cuda, torch.bfloat16)]


@pytest.mark.parametrize(
    ("padded", "tokens", "kept"), [(128256, 8192, 2092), (152064, 8192, 1765), (262144, 4800, 1024)]
)
def test_blocks_of_a_gpu(padded, tokens, kept):
    rows = tile_rows(padded, "cuda")
    assert rows == padded // 16
    for size in (1, 2, 8):
        shard = VocabShard(0, padded // size, padded, tile=rows)
        blocks = HeadBlocks(torch.bfloat16, torch.empty(1, 1, dtype=torch.bfloat16), None, shard, HeadConfig())
        assert len(blocks.tiles) == 16 // size
        assert (blocks.tokens_a_chunk(), blocks.tokens_a_chunk(keep_logits=True)) == (tokens, kept)
        assert 4 * rows * tokens <= 300 << 20
