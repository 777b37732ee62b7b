"""PyTorch's kernels for attention on GPUs: right wherever they are called, and chosen where they win at every size."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from support.embedded import load_fast

from fastdiff import attention_choice
from fastdiff.graphs.wiring import Wiring
from fastdiff.models.attention_backends import Backend, backends
from fastdiff.models.attention_kernel import apply_attention
from fastdiff.tuning import AttentionSize, Outcome, attention_question
from fastdiff.tuning.measure import measure

SELF, SMALL, CROSS = (
    AttentionSize("self", 10, 64, 4096, 4096, 0),
    AttentionSize("self", 20, 64, 1024, 1024, 0),
    AttentionSize("cross", 10, 64, 4096, 80, 3),
)


def tensors(masked: bool) -> tuple:
    query, key, value = (torch.randn(2, 4, 24, 16) for _ in range(3))
    return query, key, value, torch.zeros(1, 1, 1, 24).index_fill(3, torch.tensor([23]), -torch.inf) if masked else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", backends())
def test_equals_pytorch_also_where_the_kernel_is_not_to_be_had(name, masked, assert_close):
    query, key, value, mask = tensors(masked)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert_close(Backend(name)(query, key, value, mask), expected)
    compiled = torch.compile(lambda *given: Backend(name)(*given) + 1, backend="eager", fullgraph=True)
    assert_close(compiled(query, key, value, mask), expected + 1)


def test_alone_it_says_so(assert_close):
    query, key, value, _ = tensors(False)
    expected = F.scaled_dot_product_attention(query, key, value)
    assert_close(backends()["flash"](query, key, value, None), expected)
    with pytest.raises(RuntimeError, match="No (viable|available)"):
        backends()["cuDNN"](query, key, value, None)


def test_what_this_device_lacks_is_refused_by_measurement():
    small = AttentionSize("self", 2, 16, 32, 32, 0)
    outcomes = measure(attention_question(small, backends(), torch.device("cpu")), 0.1)
    assert outcomes["cuDNN"].refused.startswith("RuntimeError: No ") and outcomes["flash"].refused is None


def outcome(ratio: float | None) -> Outcome:
    return Outcome(refused="no such kernel") if ratio is None else Outcome(1.0, (ratio, ratio, ratio))


def answers(*ratios: dict) -> dict:
    return {
        size.key: {"PyTorch": Outcome(), **{name: outcome(measured.get(name)) for name in backends()}}
        for size, measured in zip((SELF, SMALL, CROSS), ratios, strict=True)
    }


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        # The one whose least gain is largest, and for cross-attention PyTorch's.
        (({"cuDNN": 1.4, "flash": 1.2}, {"cuDNN": 1.1, "flash": 1.15}, {"memory-efficient": 1.01}),
         {"self": Backend("flash")}),
        # One that is slower somewhere is not taken.
        (({"cuDNN": 1.5}, {"cuDNN": 0.9}, {"cuDNN": 1.2}), {"cross": Backend("cuDNN")}),
        (({"cuDNN": 1.5}, {}, {}), {}),
    ],
)  # fmt: skip
def test_a_kernel_is_taken_that_wins_at_every_size(ratios, expected):
    kernels = {name: Backend(name) for name in backends()}
    choice = attention_choice._fastest([SELF, SMALL, CROSS], answers(*ratios), kernels)
    assert choice.kernels == expected
    for kind, backend in expected.items():
        assert f"{kind}-attention by {backend.name}, measured here" in choice.reason
    assert expected or choice.reason.startswith("left to PyTorch: measured here")


def test_graphs_and_copies_know_it():
    unet = load_fast("exact").unet
    wiring = Wiring(unet)
    before = wiring.settings()
    layers = apply_attention(unet, {"self": Backend("flash")})
    assert layers > 0 and before is not None
    assert wiring.settings() is not None and wiring.settings() != before
    processor = next(iter(unet.attn_processors.values()))
    assert pickle.loads(pickle.dumps(processor)).kernels == {"self": Backend("flash")}
    assert apply_attention(unet, {}) == 0 and next(iter(unet.attn_processors.values())).kernels == {}
    # As before, and not as processors with a state of their own, for which there are no graphs.
    assert hash(wiring.settings()) == hash(before) and wiring.settings() == before
