"""Compares each kernel with the reference in fp64, over random shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attention import BLOCK, Step, make_step
from benchmarks.gpu.checkpoints import stored_weights
from benchmarks.gpu.measure import Setting, Table
from splitfuse.core.plan import Chunk, StateSlots
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    HeadNormSpec,
    LatentSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
    RecurrentSpec,
)
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.triton.capabilities import OLDEST_OF_KV
from splitfuse.kernels.triton.quantized import Quantized, choose_format
from splitfuse.kernels.weights import LayerWeights, WeightRole
from splitfuse.runtime.batch import BatchBuilder

CASES = 20
TOKENS_OF_EXPERTS = (1, 20, 200)
"""Numbers of tokens that experts compute: the most make tiles of many rows, as prompts do."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
"""Largest error by dtype, of the largest number: some roundings of a dtype one after the other."""
DELTAS = tuple(
    DeltaSpec(num_key_heads=2, num_value_heads=4, key_dim=key, value_dim=value, conv_size=4, norm=NormSpec(eps=1e-6))
    for key, value in ((16, 24), (128, 128))
)
MAMBAS = tuple(
    MambaSpec(
        num_heads=4, num_groups=2, state_dim=state, head_dim=dim, conv_size=4, norm=NormSpec(eps=1e-6), conv_bias=True
    )
    for state, dim in ((16, 24), (128, 64))
)
CONVOLUTIONS = tuple(ConvSpec(num_channels=200, conv_size=size) for size in (3, 4))
SLOTS = 9
"""Number of states that the requests of a step read and write."""
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "clamped_swiglu")


def parity(setting: Setting) -> bool:
    """Print the worst error of each kernel; return whether all are within the tolerance."""
    table = Table("kernel          ", "cases", "worst error", "allowed", "right")
    all_right = True
    checks: dict[str, Callable[[Setting, Random], tuple[Tensor, Tensor]]] = {
        "attention": attention,
        "heads": heads,
        "norm and sum": norm,
        "gated": gated,
        "experts": experts,
        "8-bit caches": scaled_caches,
        "few bits": few_bits,
        "checkpoints": checkpoints,
        "their experts": experts_of_checkpoints,
        "delta net": partial(recurrent, DELTAS),
        "Mamba": partial(recurrent, MAMBAS),
        "convolution": partial(recurrent, CONVOLUTIONS),
        "equal rows": equal_rows,
    }
    for name, check in checks.items():
        worst, count = 0.0, 2 if setting.is_rehearsal else CASES
        for seed in range(count):
            torch.manual_seed(seed)
            ours, wanted = check(setting, Random(seed))
            error = (ours.double().cpu() - wanted.double().cpu()).abs().max() / wanted.double().abs().max().cpu()
            worst = max(worst, float("inf") if error.isnan() else float(error))
        is_exact = check is equal_rows and not setting.is_rehearsal  # BLAS adds by the place of a row
        allowed = 0.0 if is_exact else TOLERANCE[setting.dtype]
        all_right &= worst <= allowed
        table.row(name, count, worst, allowed, worst <= allowed)
    return all_right


def random_attention(rng: Random, setting: Setting) -> AttentionSpec:
    """Return the attention of some layer."""
    if rng.random() < 0.2:
        ranks = {"q_rank": None, "kv_rank": 512, "rope_dim": 64, "nope_dim": 128, "v_dim": 128}
        latent = LatentSpec(norm=NormSpec(eps=1e-6), **ranks)
        return AttentionSpec(num_heads=16, num_kv_heads=1, head_dim=576, latent=latent)
    kv_heads = rng.choice((1, 2, 8))
    return AttentionSpec(
        num_heads=kv_heads * rng.choice((1, 4, 7)),
        num_kv_heads=kv_heads,
        head_dim=rng.choice(setting.few((32, 64, 80, 96, 128, 256), (32, 80))),
        window=rng.choice((None, None, 33)),
        softcap=rng.choice((None, 20.0)),
        alibi=rng.choice((None, None, 0.5)),
    )


def wide(step: Step, spec: AttentionSpec) -> Tensor:
    """Return attention in fp64 on the CPU."""
    batch = step.on_cpu()
    return ReferenceBackend().attend(step.q.double().cpu(), step.store.double().cpu(), spec, batch)


def attention(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    spec = random_attention(rng, setting)
    most = 60 if setting.is_rehearsal else 2000
    chunks = [(rng.choice((0, rng.randrange(most))), rng.choice((1, 1, rng.randint(1, 40)))) for _ in range(4)]
    step = make_step(setting, spec, chunks)
    return setting.backend().attend(step.q, step.store, spec, step.batch), wide(step, spec)


def heads(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    norms = HeadNormSpec(norm=NormSpec(eps=1e-6), after_rope=rng.random() < 0.3)
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=rng.choice((64, 80, 128)), qk_norm=norms)
    step = make_step(setting, spec, [(5, 9), (0, 1)])
    qkv = torch.randn(10, 8 * spec.head_dim, device=setting.device, dtype=setting.dtype)
    angles = torch.rand(20, spec.head_dim // 2) * 6
    found = []
    for backend, device, dtype in (
        (setting.backend(), setting.device, setting.dtype),
        (ReferenceBackend(), "cpu", None),
    ):
        weights = LayerWeights(
            q_norm=torch.ones(spec.head_dim, device=device), k_norm=torch.ones(spec.head_dim, device=device)
        )
        batch = step.batch if dtype is not None else step.on_cpu()
        store, given = step.store.to(device), qkv.to(device)
        if dtype is None:
            store, given = store.double(), given.double()
        rope = (angles.cos().to(device), angles.sin().to(device))
        q = backend.rope_store(given, store, spec, batch, rope, weights)
        found.append(torch.cat((q.flatten().cpu().double(), store.flatten().cpu().double())))
    return found[0], found[1]


def norm(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    width = rng.choice((5, 1000, 4096))
    x, branch = (torch.randn(7, width, device=setting.device, dtype=setting.dtype) for _ in range(2))
    weight, spec = torch.randn(width, device=setting.device), NormSpec(eps=1e-6, centered=rng.random() < 0.5)
    ours = setting.backend().add_norm(x, branch, 1.0, spec, weight)
    wanted = ReferenceBackend().add_norm(x.double(), branch.double(), 1.0, spec, weight.double())
    return torch.cat(ours), torch.cat(wanted)


def gated(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    x, kind = torch.randn(5, 64, device=setting.device, dtype=setting.dtype), rng.choice(KINDS)
    weight = torch.randn(96, 64, device=setting.device, dtype=setting.dtype)
    wanted = ReferenceBackend().gated(x.double(), weight.double(), None, kind)
    return setting.backend().gated(x, weight, None, kind), wanted


def experts(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    tokens, count, inner, hidden = rng.choice(TOKENS_OF_EXPERTS), 8, 48, 64
    options: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    x, weights = torch.randn(tokens, hidden, **options), torch.rand(tokens, 2, device=setting.device)
    w13 = [torch.randn(2 * inner, hidden, **options) / 8 for _ in range(count)]
    w2 = [torch.randn(hidden, inner, **options) / 8 for _ in range(count)]
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(tokens)]).to(setting.device)
    spec = MlpSpec(intermediate_size=inner, activation="silu")
    ours = setting.backend().experts(x, ids, weights, spec, LayerWeights(w13=w13, w2=w2))
    exact = LayerWeights(w13=[each.double() for each in w13], w2=[each.double() for each in w2])
    return ours, ReferenceBackend().experts(x.double(), ids, weights.double(), spec, exact)


def few_bits(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    kept = choose_format(WeightRole.O, *rng.choice((("int8", None), ("int8", 128), ("int4", 64), ("int4", 128))))
    assert kept is not None
    weight = torch.randn(70, 300, device=setting.device, dtype=setting.dtype)
    packed = Quantized.of(weight, kept)
    x = torch.randn(rng.choice((1, 20, 90)), 300, device=setting.device, dtype=setting.dtype)
    return setting.backend().linear(x, packed), x.double() @ numbers_of(packed).double().T


def numbers_of(weight: Quantized) -> Tensor:
    """Return the numbers in fp32 of a weight that we have rounded."""
    levels = weight.levels
    if weight.format.bits == 4:
        levels = torch.cat((levels & 15, levels >> 4), dim=1)
    numbers = levels.float().view(len(weight), weight.scales.shape[1], -1) * weight.scales.unsqueeze(-1)
    if weight.offsets is not None:
        numbers += weight.offsets.unsqueeze(-1)
    return numbers.flatten(1)[:, : weight.columns]


def scaled_caches(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    """Return attention to a cache of 8 bits, and to what the cache says that it holds."""
    newest = setting.is_rehearsal or torch.cuda.get_device_capability(setting.device) >= OLDEST_OF_KV["fp8"]
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=rng.choice((64, 128)))
    backend = setting.backend(kv_dtype=rng.choice(("int8", "fp8")) if newest else "int8")
    step = make_step(setting, spec, [(0, 40), (0, rng.choice((1, 70)))], backend)
    qkv = torch.randn(step.batch.num_tokens, 12 * spec.head_dim, device=setting.device, dtype=setting.dtype)
    q = backend.rope_store(qkv, step.store, spec, step.batch, None, LayerWeights())
    kept = step.store.values.double().cpu() * step.store.scales.double().cpu().unsqueeze(-1)
    wanted = ReferenceBackend().attend(q.double().cpu(), kept.nan_to_num(), spec, step.on_cpu())
    return backend.attend(q, step.store, spec, step.batch), wanted


def checkpoints(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    weight = rng.choice(list(stored_weights().values()))(96, 256)
    packed = setting.backend().pack_quantized([weight], role=WeightRole.O, dtype=setting.dtype)
    x = torch.randn(rng.choice((1, 20, 90)), 256, device=setting.device, dtype=setting.dtype)
    return setting.backend().linear(x, packed), x.double().cpu() @ weight.dequantize(torch.float32).double().T


def experts_of_checkpoints(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    tokens, make = rng.choice(TOKENS_OF_EXPERTS), rng.choice(list(stored_weights().values()))
    backend, packed, exact = setting.backend(), {}, {}
    for name, role, shape in (("w13", WeightRole.W13, (128, 96)), ("w2", WeightRole.W2, (96, 64))):
        stored = [make(*shape) for _ in range(8)]
        packed[name] = [backend.pack_quantized([each], role=role, dtype=setting.dtype) for each in stored]
        exact[name] = [each.dequantize(torch.float32).double() for each in stored]
    x = torch.randn(tokens, 96, device=setting.device, dtype=setting.dtype) / 10
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(tokens)]).to(setting.device)
    weights, spec = torch.rand(tokens, 2, device=setting.device), MlpSpec(intermediate_size=64, activation="silu")
    ours = backend.experts(x, ids, weights, spec, LayerWeights(**packed))
    on_cpu = (x.double().cpu(), ids.cpu(), weights.double().cpu())
    return ours, ReferenceBackend().experts(*on_cpu, spec, LayerWeights(**exact))


def recurrent(specs: Sequence[RecurrentSpec], setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    """Return what a layer with states gives, and the states after it, which are in fp32."""
    spec, chunks = rng.choice(specs), []
    for number in range(3):
        count, read = rng.choice((1, 5, 40) if setting.is_rehearsal else (1, 1, 7, 200)), rng.choice((-1, number))
        kept = ((count // 2, 3 + number),) if count > 1 and rng.random() < 0.5 else ()
        write = read if read >= 0 and rng.random() < 0.5 else 6 + number
        chunks.append(Chunk(str(number), 0, (1,) * count, tuple(range(8)), 1, True, StateSlots(read, write, kept)))
    on_cpu = BatchBuilder(BLOCK, torch.device("cpu")).build(chunks)
    states = torch.randn(SLOTS, ReferenceBackend().state_bytes(spec) // 4) / 10
    weights = layer_weights(spec)
    gates = (
        0
        if isinstance(spec, ConvSpec)
        else 2 * len(weights["decay"])
        if isinstance(spec, DeltaSpec)
        else len(weights["decay"])
    )
    width = 3 * spec.num_channels if isinstance(spec, ConvSpec) else spec.num_channels + values_of(spec)
    x, y = (torch.randn(on_cpu.num_tokens, each).to(setting.dtype) for each in (width, gates))
    found = []
    for backend, device, dtype in (
        (setting.backend(), setting.device, setting.dtype),
        (ReferenceBackend(), "cpu", torch.float64),
    ):
        batch = on_cpu if device == "cpu" else on_cpu.on_device(torch.device(device))
        own, kept_states = {name: each.to(device) for name, each in weights.items()}, states.clone().to(device)
        given = x.to(device, dtype), y.to(device, dtype)
        if isinstance(spec, DeltaSpec):
            out = backend.delta(*given, kept_states, spec, batch, LayerWeights(**own))
        elif isinstance(spec, MambaSpec):
            out = backend.mamba(*given, kept_states, spec, batch, LayerWeights(**own))
        else:
            out = backend.conv(given[0], kept_states, spec, batch, LayerWeights(**own))
        found.append(torch.cat((out.flatten().double().cpu(), kept_states.flatten().double().cpu())))
    return found[0], found[1]


def values_of(spec: DeltaSpec | MambaSpec) -> int:
    """Return the size of the values of all heads."""
    if isinstance(spec, DeltaSpec):
        return spec.num_value_heads * spec.value_dim
    return spec.num_heads * spec.head_dim


def layer_weights(spec: RecurrentSpec) -> dict[str, Tensor]:
    """Return random weights of a layer with states."""
    found = {"conv": torch.randn(spec.conv_size, spec.num_channels)}
    if isinstance(spec, ConvSpec):
        return found
    heads = spec.num_value_heads if isinstance(spec, DeltaSpec) else spec.num_heads
    found |= {"decay": torch.rand(heads) / 2, "decay_bias": torch.randn(heads), "skip": torch.randn(heads)}
    if isinstance(spec, DeltaSpec):
        return found | {"out_norm": torch.ones(spec.value_dim)}
    return found | {"out_norm": torch.ones(values_of(spec)), "conv_bias": torch.randn(spec.num_channels)}


def equal_rows(setting: Setting, rng: Random) -> tuple[Tensor, Tensor]:
    """Return a product of a row alone and in company: of equal bits on a GPU, where the error must be 0."""
    weight = torch.randn(200, 500, device=setting.device, dtype=setting.dtype)
    x, row = torch.randn(130, 500, device=setting.device, dtype=setting.dtype), rng.randrange(130)
    backend = setting.backend(invariant=True)
    return backend.linear(x[row : row + 1], weight), backend.linear(x, weight)[row : row + 1]
