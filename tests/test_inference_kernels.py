"""The CPU kernels of packed weights against a product in float64, for every format, layout and batch."""

import itertools
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from castlm.core.errors import InputError
from castlm.dtypes import FLOATS
from castlm.packed import native
from castlm.packed.layers import DIRECT_ROWS, PackedEmbedding, PackedLinear, packed_linear, prepare_layers_
from castlm.packed.tensor import PackedTensor, pack_integers, unpack
from castlm_runtime.formats import PACKABLE
from tests.fused import threads
from tests.packed_weights import DENSE_ONLY, PATTERNS, buffer_of, check_product, kernels_of, random_packed

pytestmark = pytest.mark.skipif(native.kernels() is None, reason=native.NOT_BUILT)


@pytest.fixture(params=native.levels())
def level(request):
    """The kernels for one instruction set after another."""
    with kernels_of(request.param):
        yield request.param


def has_pattern(values: str, m: int) -> bool:
    """Whether a format holds weights of this group size; 0 is dense."""
    return not m or values not in DENSE_ONLY


def layouts(m: int, level: str) -> list[str]:
    """A dense weight has one layout; by rows, only the levels below AVX-512 multiply."""
    return ["best", "rows"] if m and level not in ("avx512", "amx") else ["best"]


@pytest.mark.parametrize("values", PACKABLE)
def test_products_and_rows_of_every_format(values, level):
    patterns = [(n, m) for n, m in PATTERNS if has_pattern(values, m) and 24 % (m or 1) == 0]
    for (n, m), (rows, columns) in itertools.product(patterns, ((8, 192), (5, 24), (13, 96))):
        packed = random_packed(values, n, m, rows, columns)
        for layout in layouts(m, level):
            check_rows(packed, buffer_of(packed, layout))
            for batch, dtype in itertools.product((1, 2, 3, 8, 16, 17), (torch.float32, torch.bfloat16)):
                check_product(packed, buffer_of(packed, layout), torch.randn(batch, columns).to(dtype))


def check_rows(packed: PackedTensor, buffer: Tensor) -> None:
    """All rows, some in the middle, and some by their numbers."""
    rows, columns = packed.spec.rows, packed.spec.columns
    out, middle = torch.empty(rows, columns), torch.empty(rows - 3, columns)
    native.unpack(buffer, 0, rows, out)
    assert torch.equal(out, unpack(packed).float()), packed.spec
    native.unpack(buffer, 2, rows - 1, middle)
    assert torch.equal(middle, out[2:-1]), packed.spec
    numbers = torch.tensor([[rows - 1, 0], [3, 3]])
    assert torch.equal(native.gather(buffer, numbers, columns), out[numbers]), packed.spec


@pytest.mark.parametrize(
    ("values", "m"),
    [each for each in itertools.product(PACKABLE, [0, 2, 4, 8, 16, 32, 64]) if has_pattern(*each)],
)
def test_every_pattern_is_multiplied_exactly(values, m, level):
    """Products of integers are those of whole numbers: x has integers up to 127, 127 in each block."""
    for n, layout in itertools.product({1, m // 2, m - 1} if m else {0}, ("best", "lanes")):
        for rows, columns, batch in ((19, 2 * m + 64, 3), (33, 3 * (m or 7), 1), (80, 128, 29), (35, 2 * m + 64, 77)):
            packed = random_packed(values, n, m, rows, columns)
            buffer, out = buffer_of(packed, layout), torch.empty(rows, columns)
            native.unpack(buffer, 0, rows, out)
            weight = unpack(packed).float()
            assert torch.equal(out, weight), packed.spec
            x = torch.randint(-127, 128, (batch, columns)).float()
            x[:, ::64] = 127.0
            bound = 1e-6 * x.double().abs() @ weight.double().abs().T + 1e-30
            product = packed_linear(x, buffer, rows)
            assert ((product.double() - x.double() @ weight.double().T).abs() <= bound).all(), packed.spec


@settings(max_examples=40, deadline=None)
@given(
    values=st.sampled_from(list(PACKABLE)),
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(1, 40),
    groups=st.integers(1, 60),
    batch=st.integers(1, DIRECT_ROWS + 40),
    num_threads=st.sampled_from([1, 3]),
    level=st.sampled_from([name for name in native.levels() if name != "plain"] or ["plain"]),
    seed=st.integers(0, 2**31),
)
def test_products_of_any_shape(values, pattern, rows, groups, batch, num_threads, level, seed):
    n, m = (0, 0) if values in DENSE_ONLY else pattern
    packed = random_packed(values, n, m, rows, groups * (m or 5), seed)
    x = torch.randn(batch, packed.spec.columns, generator=torch.Generator().manual_seed(seed))
    with kernels_of(level), threads(num_threads):
        check_product(packed, buffer_of(packed), x)


@pytest.mark.parametrize("values", list(FLOATS))
def test_one_wide_row_of_activations(values, level):
    """Several parts of such a matrix are read side by side, and what is left of it tile by tile."""
    for (n, m), rows in itertools.product([(2, 4), (1, 4), (8, 16), (0, 0)], (4, 23, 131)):
        packed = random_packed(values, n, m, rows, 2240)
        check_product(packed, buffer_of(packed), torch.randn(1, 2240))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (0, 0)])
def test_a_result_does_not_depend_on_threads(n, m, level):
    for batch, rows, columns in ((5, 512, 1024), (1, 1100, 2240), (40, 500, 2240)):
        packed = random_packed("bf16", n, m, rows, columns)
        buffer, x = buffer_of(packed), torch.randn(batch, columns)
        one = packed_linear(x, buffer, rows)
        with threads(4):
            assert all(torch.equal(packed_linear(x, buffer, rows), one) for _ in range(20)), (batch, rows, columns)


@pytest.mark.parametrize("values", PACKABLE)
def test_activations_that_are_not_finite_are_not_hidden(values, level):
    patterns = [(0, 0)] if values in DENSE_ONLY else [(2, 4), (0, 0)]
    for (n, m), batch, bad in itertools.product(patterns, (1, 16), (float("nan"), float("inf"))):
        packed = random_packed(values, n, m, 8, 128)
        x = torch.randn(batch, 128)
        x[0, 70] = bad
        out = packed_linear(x, buffer_of(packed), 8)
        uses = unpack(packed)[:, 70] != 0
        assert not torch.isfinite(out[0, uses]).any(), (packed.spec, batch, bad)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (8, 16), (0, 0)])
def test_integers_at_the_ends_of_their_range_do_not_overflow(n, m, level):
    for values, low, high in (("int8", -128, 127), ("int4", -8, 7), *([] if m else [("int6", -32, 31)])):
        for code in (low, high):
            mask = torch.arange(256).expand(8, -1) % m < n if m else None
            codes = torch.full((8, 256), code, dtype=torch.int8)
            codes = codes if mask is None else codes * mask
            scales = torch.ones(8, 1) if values == "int8" else torch.ones(8, 4, dtype=torch.bfloat16)
            packed = pack_integers(codes, scales, values, n, m, mask)
            for x in (torch.ones(16, 256), -torch.ones(8, 256), torch.ones(70, 256)):  # 127 as int8
                product = packed_linear(x, buffer_of(packed), 8)
                torch.testing.assert_close(product, x @ codes.float().T, rtol=1e-6, atol=0)


def test_the_level_is_chosen_by_name_or_in_the_environment(level, monkeypatch):
    fastest = native.levels()[-1]
    assert native.level() == level
    native.use_level(fastest)
    monkeypatch.setenv("CASTLM_CPU_LEVEL", level)
    native.load_kernels(native.kernels()._name)
    assert native.level() == level
    for other in ("sse2", "avx2" if platform.machine() == "aarch64" else "neon"):
        with pytest.raises(InputError, match=f"{other}.*choose one of plain"):
            native.use_level(other)


def test_a_weight_keeps_its_kernels_when_the_level_changes(level):
    """The entry of the table is chosen when a weight is repacked."""
    for values in PACKABLE:
        packed = random_packed(values, *((0, 0) if values in DENSE_ONLY else (8, 16)), 24, 128)
        buffer, x = buffer_of(packed), torch.randn(50, 128)
        expected = packed_linear(x, buffer, 24)
        for other in native.levels():
            with kernels_of(other):
                assert torch.equal(packed_linear(x, buffer, 24), expected)


@pytest.mark.parametrize(
    ("values", "n", "m"),
    [
        *itertools.product(("int8", "bf16", "fp16"), (2, 1), (4,)),
        *itertools.product(("int8", "bf16", "int4"), (8,), (16,)),
        ("int4", 2, 4),
        ("int3", 0, 0),
        ("int6", 0, 0),
        ("int8", 0, 0),
        ("bf16", 0, 0),
    ],
)
def test_many_rows_are_as_few_rows_where_the_kernels_take_them(values, n, m, level):
    packed = random_packed(values, n, m, 24, 128)
    buffer, x = buffer_of(packed), torch.randn(1029, 128)
    most = native.rows_at_a_time(buffer)
    by_avx2 = 512 if values.startswith("int") or not m else 0
    assert most == {"avx2": by_avx2, "avx512": 512, "amx": 512}.get(level, 0)
    in_parts = torch.cat([packed_linear(part, buffer, 24) for part in x.split(most or DIRECT_ROWS)])
    whole = packed_linear(x, buffer, 24)
    assert torch.equal(whole, in_parts) if most else torch.allclose(whole, in_parts, atol=1e-6 * whole.abs().max())
    assert torch.equal(packed_linear(x.half(), buffer, 24), packed_linear(x.half().float(), buffer, 24).half())


@pytest.mark.parametrize(
    ("values", "n", "m"),
    [*itertools.product(("int8", "int4"), (2, 1, 0), (4,)), ("int6", 0, 0), ("int8", 4, 8), ("int8", 8, 16)],
)
def test_any_number_of_rows_of_integers_has_the_bits_of_four(values, n, m, level):
    """AVX-512 has kernels for groups of 1 to 12 rows. Prompts have kernels of their own: with AVX2 for up to 64 rows,
    with AVX-512 where at most half is kept.

    1,104 columns are decoded in two parts with AVX2.
    """
    for rows, columns in ((24, 128), (21, 1104), (8, 64)):
        buffer = buffer_of(random_packed(values, n, m if n else 0, rows, columns))
        x = torch.randn(103, columns)
        in_fours = torch.cat([packed_linear(part, buffer, rows) for part in x.split(4)])
        for many in (*range(1, 13), 17, 25, 36, 37, 64, 65, 96, 103):
            assert torch.equal(packed_linear(x[:many], buffer, rows), in_fours[:many]), (rows, columns, many)


def test_what_does_not_fit_is_refused():
    packed = random_packed("bf16", 2, 4, 12, 64)
    buffer, x, no_columns = buffer_of(packed), torch.randn(1, 64), torch.empty(DIRECT_ROWS + 1, 0)
    for wrong, rows in ((torch.randn(1, 60), 12), (x, 13), (no_columns[:1], 12), (no_columns, 12)):
        with pytest.raises(InputError, match="does not fit"):
            packed_linear(wrong, buffer, rows)
    for wrong in (buffer[:-8], torch.zeros_like(buffer)):
        with pytest.raises(InputError, match="does not fit"):
            packed_linear(x, wrong, 12)
    for n, m, columns in ((2, 4, 66), (1, 2, 65)):  # 1:2 is kept as 2:4, whose last group may have two columns
        with pytest.raises(AssertionError, match="no kernel"):
            native.packed_bytes("bf16", n, m, 12, columns)
    with pytest.raises(InputError, match="keep exactly 2 of every 4"):
        native.repack_(buffer, packed.values, packed.mask_bits ^ 1, None, "bf16", 2, 4, 64)


def test_a_weight_is_prepared_under_any_default_dtype_and_device():
    packed = random_packed("bf16", 0, 0, 12, 64)
    expected = buffer_of(packed)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(buffer_of(packed), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.slow
def test_an_exception_on_a_helper_thread_arrives_in_the_caller(tmp_path):
    source, program = Path(__file__).parent / "team_errors.cpp", tmp_path / "team_errors"
    subprocess.run(["g++", "-std=c++17", "-pthread", str(source), "-o", str(program)], check=True)
    assert subprocess.run([program], timeout=60).returncode == 0


# ---- the op of packed weights and the layers made of them: shapes, dtypes, compilation, tracers


def test_products_keep_leading_dimensions_and_take_no_rows():
    packed = random_packed("bf16", 2, 4, 12, 64)
    buffer = buffer_of(packed)
    assert packed_linear(torch.randn(2, 3, 64), buffer, 12).shape == (2, 3, 12)
    assert packed_linear(torch.randn(0, 64), buffer, 12).shape == (0, 12)
    assert packed_linear(torch.randn(2, 64, dtype=torch.float16), buffer, 12).dtype == torch.float16
    assert packed_linear(torch.randn(64, 2).T, buffer, 12).shape == (2, 12)
    assert packed_linear(torch.randn(DIRECT_ROWS + 1, 64).bfloat16(), buffer, 12).dtype == torch.bfloat16


@pytest.mark.parametrize("values", ["bf16", "fp16", "fp32", "int8"])
def test_an_embedding_looks_up_what_the_head_multiplies_by(values):
    packed = random_packed(values, 0, 0, 37, 50)
    table, head = PackedEmbedding(packed.spec, torch.float32), PackedLinear(packed.spec)
    table.hold_(packed)
    prepare_layers_({"table": table})
    head.share_(table.packed)
    ids = torch.tensor([[0, 36, 5], [17, 17, 31]])
    assert torch.equal(table(ids), unpack(packed)[ids].float())
    assert head(torch.randn(1, 50)).shape == (1, 37)


def test_compilers_and_transforms_see_the_op():
    packed = random_packed("bf16", 2, 4, 12, 64)
    buffer, x = buffer_of(packed), torch.randn(3, 64)

    def twice(x):
        return packed_linear(x, buffer, 12) * 2

    torch.testing.assert_close(torch.compile(twice, backend="aot_eager", fullgraph=True)(x), twice(x))
    graph = make_fx(twice)(x)
    assert torch.equal(graph(x + 1), twice(x + 1))  # the product was not taken for a constant
    with torch.inference_mode():
        assert torch.equal(torch.func.vmap(twice)(x[None])[0], twice(x))
