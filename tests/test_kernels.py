import itertools
import platform

import pytest
import torch
from amx_emulator import BUILDERS, FEATURES, SAPPHIRE_RAPIDS

from engine.cpu import activations, jit, kernels, products, sampling_kernels
from engine.cpu.amx import AMXBuilder
from engine.cpu.gguf_blocks import IQ4_NL, IQ4_XS
from engine.cpu.packed_weight import (
    E4M3,
    E4M3_SCALE,
    GROUP,
    INT4,
    INT8,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    SUPER_BLOCK,
    Codes,
    Format,
    can_pack,
    narrowest,
    pack,
    pack_floats,
    quantize_weight,
)

FORMATS = (
    *(INT4, INT8, Format(4, 8), Format(5, 16), Format(5, has_minimum=True), Format(6, 32, group=16)),
    *(Format(1, has_minimum=True), Format(3, 4, group=16), Format(7, 64), Q4_K, Q5_K, Q6_K),
    *(Q2_K, Q3_K, IQ4_NL, IQ4_XS, Format(3, has_minimum=True, group=16)),
    Format.of_table((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)),  # twice what FP4's codes stand for
    *(Format(8, 128, has_minimum=True), Format(2, 2), E4M3),
)
INTEGERS = [fmt for fmt in FORMATS if not fmt.is_float]
COLUMNS = 512  # whole super-blocks
pytestmark = [
    pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP"),
    pytest.mark.usefixtures("threads"),
]


def random_codes(fmt: Format, rows: int, columns: int) -> Codes:
    codes = torch.randint(0, 2**fmt.bits, (rows, columns), dtype=torch.uint8)
    scales = (torch.rand(rows, columns // fmt.group) * 0.1).half()
    minimums = -torch.rand(rows, columns // fmt.group).half() if fmt.has_minimum else None
    if not fmt.has_super_blocks:
        return Codes(fmt, codes, scales, minimums)
    wholes = [torch.randint(-32, 64, (rows, columns // fmt.group), dtype=torch.int8) for _ in range(2)]
    supers = (torch.rand(rows, columns // SUPER_BLOCK, 1 + fmt.has_minimum) * 0.01 - 0.003).half()
    return Codes(fmt, codes, wholes[0], wholes[1] if fmt.has_minimum else None, supers)


def as_floats(x: activations.Activations) -> torch.Tensor:
    return (x.values.double() * x.scales.double()[..., None]).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", activations.DTYPES)
def test_activations_lose_at_most_half_a_step(dtype: torch.dtype) -> None:
    x = torch.randn(7, 96, dtype=dtype)
    x[3] = 0
    quantized = activations.quantize(x)
    step = x.double().view(7, -1, 32).abs().amax(-1, keepdim=True) / 127
    error = (as_floats(quantized) - x.double()).abs().view(7, -1, 32)
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(quantized.sums, quantized.values.int().view(3, 7, 2, 16).sum(-1).int())
    torch.testing.assert_close(quantized.totals, quantized.values.sum(-1) * quantized.scales)


@pytest.mark.parametrize(("fmt", "rows"), list(itertools.product(FORMATS, (1, 3, 64, 128, 129, 300))))
def test_a_product_is_that_of_the_dequantized_weight(fmt: Format, rows: int) -> None:
    torch.manual_seed(rows)
    weight = random_codes(fmt, 50, COLUMNS)
    x = activations.quantize(torch.randn(rows, COLUMNS))
    bias = torch.cat([torch.randn(50), torch.zeros(14)])
    product = products.matmul(x, pack(weight), bias, torch.float32)
    expected = as_floats(x) @ weight.dequantize().double().T + bias[:50].double()
    assert product.shape == (rows, 50)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86's instructions")
@pytest.mark.parametrize("removed", [("+avx512vnni",), ("+avx512", "+avxvnni"), ("+avx512", "+avxvnni", "+avx2")])
@pytest.mark.parametrize("fmt", [Format(5, 16), Q2_K, Q3_K, IQ4_NL, IQ4_XS])
def test_a_product_is_the_same_on_processors_with_fewer_instructions(removed: tuple[str, ...], fmt: Format) -> None:
    _, features = jit.host()
    features = ",".join(f for f in features.split(",") if not f.startswith(removed))
    weight = random_codes(fmt, 32, 256)
    x = activations.quantize(torch.randn(3, 256))
    expected = as_floats(x) @ weight.dequantize().double().T
    program = products.matmul_program(weight.format, torch.float32, "x86-64-v3", features)
    product = products.matmul(x, pack(weight), torch.zeros(32), torch.float32, program)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86's instructions")
def test_a_product_with_floats_is_the_same_on_processors_without_bfloat16() -> None:
    _, features = jit.host()
    features = ",".join(f for f in features.split(",") if not f.startswith("+avx512"))
    weight = random_codes(E4M3, 32, 64)
    x = activations.quantize(torch.randn(3, 64))
    expected = as_floats(x) @ weight.dequantize().double().T
    program = products.matmul_program(E4M3, torch.float32, "x86-64-v3", features)
    values = products.values_for(E4M3, x, features)
    product = products.matmul(x, pack(weight), torch.zeros(32), torch.float32, program, values)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


def test_codes_of_e4m3_stand_for_torchs_numbers() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    expected = codes.view(torch.float8_e4m3fn).float()
    weight = Codes(E4M3, codes, torch.full((8, 1), float(E4M3_SCALE)).half(), None)
    is_number = ~expected.isnan()
    assert is_number.sum() == 254
    for actual in (weight.dequantize(), pack(weight).dequantize()):
        assert torch.equal(actual[is_number], expected[is_number])


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(("fmt", "rows"), list(itertools.product(INTEGERS, (1, 16, 31, 128, 300))))
def test_a_product_with_amx_is_that_without(fmt: Format, rows: int, builder: type[AMXBuilder]) -> None:
    torch.manual_seed(rows)
    weight = pack(random_codes(fmt, 50, COLUMNS))
    x, bias = activations.quantize(torch.randn(rows, COLUMNS)), torch.randn(64)
    program = products.amx_matmul_program(fmt, torch.float32, *jit.host(), builder)
    expected = products.matmul(x, weight, bias, torch.float32, products.matmul_program(fmt, torch.float32, *jit.host()))
    product = products.matmul(x, weight, bias, torch.float32, program)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_the_product(bad: float) -> None:
    x = torch.randn(2, 64)
    x[1, 40] = bad
    product = products.matmul(activations.quantize(x), pack(random_codes(INT8, 16, 64)), torch.zeros(16), torch.float32)
    assert product[0].isfinite().all()
    assert not product[1].isfinite().any()


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(("rows", "outputs"), [(1, 50), (33, 16), (70, 96)])
def test_a_product_of_bfloat16_with_amx_is_that_of_torch(rows: int, outputs: int, builder: type[AMXBuilder]) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(outputs, 96).bfloat16()
    program = products.amx_matmul_bfloat16_program(torch.float32, *jit.host(), builder)
    bias = torch.nn.functional.pad(torch.randn(outputs), (0, -outputs % 16))
    product = products.matmul_bfloat16(activations.group(x), pack_floats(weight), bias, torch.float32, program)
    torch.testing.assert_close(product, x.float() @ weight.float().T + bias[:outputs], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86's instructions")
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_product_is_compiled_for_a_processor_with_amx(fmt: Format) -> None:
    assert products.amx_matmul_program(fmt, torch.bfloat16, SAPPHIRE_RAPIDS, FEATURES)
    assert products.amx_matmul_bfloat16_program(torch.bfloat16, SAPPHIRE_RAPIDS, FEATURES)


@pytest.mark.skipif(not kernels.has_bfloat16(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("rows", [1, 16, 70])
def test_a_product_of_bfloat16_is_that_of_torch(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(50, 96).bfloat16()
    packed = pack_floats(weight)
    assert torch.equal(packed.dequantize(), weight.float())
    product = products.matmul_bfloat16(activations.group(x), packed, torch.ones(64), torch.float32)
    torch.testing.assert_close(product, x.float() @ weight.float().T + 1, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16, 150])
def test_a_product_of_floats_is_that_of_torch(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96), torch.randn(50, 96).to(dtype)
    packed = pack_floats(weight)
    assert torch.equal(packed.dequantize(), weight.float())
    expected = x.double() @ weight.double().T + 1
    _, features = jit.host()
    few = ",".join(f for f in features.split(",") if not f.startswith("+avx512"))
    for program in (None, products.matmul_floats_program(packed.format, torch.float32, "x86-64-v3", few)):
        product = products.matmul_floats(activations.group(x), packed, torch.ones(64), torch.float32, program)
        torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_are_kept_in_the_narrowest_type_that_has_all_of_them(dtype: torch.dtype) -> None:
    few_bits = torch.finfo(dtype).eps
    values = torch.tensor([[1.0 + few_bits, -2.0]])
    assert narrowest(values).dtype == dtype
    assert torch.equal(narrowest(values).float(), values)


@pytest.mark.parametrize("fmt", FORMATS)
def test_packing_keeps_every_code_scale_and_minimum(fmt: Format) -> None:
    weight = random_codes(fmt, 37, COLUMNS)
    packed = pack(weight)
    assert torch.equal(packed.dequantize(), weight.dequantize())
    some = torch.tensor([36, 0, 17])
    assert torch.equal(packed.rows(some), weight.dequantize()[some])


@pytest.mark.parametrize("fmt", INTEGERS)
@pytest.mark.parametrize("dtype", activations.DTYPES)
def test_an_embedding_is_a_row_of_the_weight(fmt: Format, dtype: torch.dtype) -> None:
    weight = pack(random_codes(fmt, 37, COLUMNS))
    token_ids = torch.tensor([36, 0, 17, 16, 15, 0])
    expected = weight.rows(token_ids).to(dtype)
    torch.testing.assert_close(kernels.embed(token_ids, weight, dtype), expected, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("fmt", "limit"), [(INT8, 1 / 254), (INT4, 0.07)])
def test_quantizing_loses_about_half_a_step(fmt: Format, limit: float) -> None:
    weight = torch.randn(48, 128)
    error = (quantize_weight(weight, fmt).dequantize() - weight).view(48, -1, GROUP)
    largest = weight.view(48, -1, GROUP).abs().amax(-1)
    assert (error.square().mean(-1).sqrt() <= limit * largest).all()


def test_zeros_and_constants_can_be_quantized() -> None:
    for weight, fmt in itertools.product((torch.zeros(16, 32), torch.full((16, 32), -0.5)), (INT4, INT8)):
        torch.testing.assert_close(quantize_weight(weight, fmt).dequantize(), weight, rtol=1e-3, atol=0)


def test_columns_must_fill_the_groups() -> None:
    assert can_pack(64) and not can_pack(40)


@pytest.mark.parametrize("dtype", activations.DTYPES)
def test_rms_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 9, 80, dtype=dtype), torch.randn(80)
    expected = torch.nn.functional.rms_norm(x.float(), (80,), weight, 1e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-6).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("name", "function"),
    [("silu", torch.nn.functional.silu), ("gelu_tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"))],
)
def test_a_gate_is_its_activation_times_the_other_half(name: str, function: object, rows: int) -> None:
    x = torch.randn(rows, 128) * 5
    x[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -20.0])
    expected = function(x[:, :64].double()) * x[:, 64:].double()
    error = (as_floats(kernels.gate(x, name)) - expected).abs().view(rows, 2, 32)
    step = expected.view(rows, 2, 32).abs().amax(-1, keepdim=True) / 127
    assert (error <= step * 0.501).all()


@pytest.mark.parametrize("columns", [16, 17, 31, 32, 97, 5003])
@pytest.mark.parametrize("rows", [1, 7])
def test_argmax_is_the_first_of_the_largest(rows: int, columns: int) -> None:
    for scale in (1.0, 50.0):  # many of one size, or hardly two
        logits = (torch.randn(rows, columns) * scale).round() - 100
        best, index = sampling_kernels.argmax(logits)
        assert torch.equal(best, logits.amax(-1))
        assert index.tolist() == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("place", [0, 3, 20, 39])
def test_argmax_shows_what_is_no_number(place: int) -> None:
    logits = torch.randn(3, 40)
    logits[1, place], logits[2, place] = torch.nan, torch.inf
    best, index = sampling_kernels.argmax(logits)
    assert best[0] == logits[0].amax() and best[1].isnan() and best[2].isinf() and index[2] == place
    assert sampling_kernels.argmax(torch.full((1, 40), -torch.inf))[0].isinf()


@pytest.mark.parametrize("columns", [16, 17, 97, 512, 513, 4099])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_what_is_drawn_is_where_the_cumulated_weight_passes_the_number(columns: int, temperature: float) -> None:
    torch.manual_seed(columns)
    logits = torch.randn(7, columns) * 3
    logits[:, torch.randperm(columns)[: columns // 3]] = -torch.inf
    rows = torch.tensor([6, 0, 3, 3, 1])
    numbers = torch.tensor([0.0, 0.999999, 0.5, 0.25, 0.75], dtype=torch.float64)
    min_p = torch.tensor([0.0, 0.0, 0.1, 0.0, 0.01])
    temperatures = torch.full((5,), temperature)
    best = logits.amax(-1)[rows]
    drawn = sampling_kernels.draw(logits, rows, best, temperatures, min_p, numbers)
    weights = ((logits[rows] - best[:, None]) / temperature).exp()
    weights[weights < min_p[:, None]] = 0
    cumulated = weights.double().cumsum(-1)
    targets = numbers * cumulated[:, -1]
    for row, index in enumerate(drawn.tolist()):
        assert weights[row, index] > 0
        before = float(cumulated[row, index - 1]) if index else 0.0
        slack = 1e-5 * float(cumulated[row, -1])
        assert before - slack <= float(targets[row]) <= float(cumulated[row, index]) + slack


def test_a_single_candidate_and_no_number_at_all_can_be_drawn() -> None:
    logits = torch.full((3, 700), -torch.inf)
    logits[0, 699], logits[1, 0], logits[2, 5] = 3.0, -2.0, torch.nan
    numbers = torch.tensor([0.999, 0.0, 0.5], dtype=torch.float64)
    best, _ = sampling_kernels.argmax(logits)
    drawn = sampling_kernels.draw(logits, torch.arange(3), best, torch.ones(3), torch.zeros(3), numbers)
    assert drawn[:2].tolist() == [699, 0] and 0 <= drawn[2] < 700
