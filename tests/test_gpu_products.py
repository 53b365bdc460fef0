"""Products with packed weights on GPUs are those with the dequantised ones: on a GPU where there is one, else in
Triton's interpreter."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from devices import DEVICE
from gpu_codes import FORMATS, codes_of

from engine.cpu import packed_weight as cpu_weight
from engine.cpu.packed_weight import Format, round_and_pack
from engine.gpu import packed_weight
from engine.gpu.packed_weight import GPUWeight, groups_of, pack, place_of
from errors import ModelLoadError

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")
from engine.gpu import product_limits, products  # noqa: E402
from engine.gpu.packing import reordered  # noqa: E402
from engine.gpu.product_limits import ProductLimits  # noqa: E402

ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the result's norm
Product = tuple[torch.Tensor, GPUWeight, torch.Tensor | None, torch.Tensor]


def by_numbers(*product: *Product) -> None:
    products.multiply_numbers(*product, tiles=products.ONE_TOKEN)


def by_tiles(*product: *Product, num_parts: int = 1) -> None:
    tiles = products.tiles_for(product[1], len(product[0]))
    products.multiply_tiles(*product, num_parts=num_parts, tiles=tiles)


WAYS: dict[str, Callable[..., None]] = {
    "numbers": by_numbers,
    "tiles": by_tiles,
    "parts": partial(by_tiles, num_parts=3),
    "dequantised": products.multiply_dequantised,
}


def error(
    way: Callable[..., None], weight: cpu_weight.Codes, num_tokens: int, dtype: torch.dtype, has_bias: bool = True
) -> float:
    """How far a product is from its reference, of the result's norm. The output's rows are apart, and the inputs' too;
    what lies between them stays as it is."""
    packed, numbers = pack(weight), weight.dequantize()
    rows, columns = numbers.shape
    wide = torch.randn(num_tokens, columns + 3, device=DEVICE).to(dtype)
    x, bias = wide[:, 3:], torch.randn(rows, device=DEVICE).to(dtype) if has_bias else None
    around = torch.full((num_tokens, rows + 20), 7.0, device=DEVICE, dtype=dtype)
    way(x, packed, bias, around[:, 10:-10])
    assert (around[:, :10] == 7.0).all() and (around[:, -10:] == 7.0).all()
    expected = x.float() @ numbers.T + (0.0 if bias is None else bias.float())
    return float((around[:, 10:-10].float() - expected).norm() / expected.norm())


@pytest.mark.thinned(6)
@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_in_every_way(name: str, way: str, dtype: torch.dtype) -> None:
    assert error(WAYS[way], codes_of(FORMATS[name], 70, 512, DEVICE), 3, dtype) < ERRORS[dtype]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 96), (33, 160), (200, 1152)])
@pytest.mark.parametrize("name", ["int8", "int4", "q5_0", "gptq-2"])
def test_rows_and_columns_that_fill_no_tile(name: str, rows: int, columns: int, way: str) -> None:
    assert error(WAYS[way], codes_of(FORMATS[name], rows, columns, DEVICE), 2, torch.float32) < 1e-5


@pytest.mark.thinned(2)
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 33, 64, 130])
@pytest.mark.parametrize("way", ["tiles", "parts", "dequantised"])
def test_every_number_of_tokens(way: str, num_tokens: int) -> None:
    assert error(WAYS[way], codes_of(FORMATS["q4_k"], 48, 512, DEVICE), num_tokens, torch.float32, False) < 1e-5


@pytest.mark.parametrize("columns_per_scale", [32, 64, 128])
@pytest.mark.parametrize("name", ["q4_0", "int4", "gptq-8"])
def test_a_scale_of_many_columns_is_stored_once(name: str, columns_per_scale: int) -> None:
    weight = codes_of(FORMATS[name], 40, 512, DEVICE, columns_per_scale)
    assert pack(weight).scales.shape == (40, 512 // columns_per_scale)
    assert torch.allclose(products.dequantised(pack(weight), torch.float32), weight.dequantize(), atol=1e-5)
    for way in WAYS.values():
        assert error(way, weight, 2, torch.float32) < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_takes_the_memory_that_its_format_says(name: str) -> None:
    fmt = FORMATS[name]
    assert pack(codes_of(fmt, 64, 512, DEVICE)).num_bytes == 64 * 512 * fmt.bytes_per_weight


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_looked_up(name: str) -> None:
    weight = codes_of(FORMATS[name], 50, 512, DEVICE)
    ids = torch.tensor([49, 0, 7, 7, 31], device=DEVICE)
    rows = products.dequantised(pack(weight), torch.float32, ids)
    assert torch.allclose(rows, weight.dequantize()[ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_the_order_of_the_cpus_kernels_becomes_that_of_gpus(name: str) -> None:
    """Also in several parts, and where the rows fill no tile."""
    weight = codes_of(FORMATS[name], 50, 512, torch.device("cpu"))
    moved, expected = reordered(cpu_weight.pack(weight), DEVICE, part=16 * 512), pack(weight)
    assert moved.num_columns == expected.num_columns and moved.format == expected.format
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved.parts, expected.parts, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_that_of_the_cpu(bits: int) -> None:
    numbers, fmt = torch.randn(48, 128), cpu_weight.format_of(bits)
    packed = packed_weight.round_and_pack(numbers.to(DEVICE), fmt, part=16 * 128)
    expected = round_and_pack(numbers, fmt).dequantize()
    difference = (products.dequantised(packed, torch.float32).cpu() - expected).abs()
    assert float((difference > 1e-6).float().mean()) < 1e-3, "but for ties, and sums that differ in their last bits"


def test_rows_of_several_weights_are_joined() -> None:
    weights = [codes_of(FORMATS["q4_0"], rows, 256, DEVICE, size) for rows, size in ((20, 128), (30, 64))]
    joined = packed_weight.joined([pack(weight) for weight in weights])
    expected = torch.cat([weight.dequantize() for weight in weights])
    assert torch.equal(products.dequantised(joined, torch.float32), expected)
    views = packed_weight.split(joined, [20, 30])
    parts = [products.dequantised(view, torch.float32) for view in views]
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("counts", [[3, 0, 1, 20], [0, 0, 0, 1], [17, 16, 15, 0], [1, 1, 1, 1], [0, 40, 0, 70]])
@pytest.mark.parametrize("name", ["q4_k", "q6_k", "int8"])
def test_tokens_of_each_expert_meet_its_rows_alone(name: str, counts: list[int]) -> None:
    weight = codes_of(FORMATS[name], 4 * 40, 256, DEVICE)
    x = torch.randn(sum(counts), 256, device=DEVICE)
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0, dtype=torch.int32)
    for num_parts in (1, 2):
        output = torch.empty(len(x), 40, device=DEVICE)
        products.multiply_tiles(x, pack(weight), None, output, starts, num_parts)
        own = [part @ rows.T for part, rows in zip(x.split(counts), weight.dequantize().split(40), strict=True)]
        assert torch.allclose(output, torch.cat(own), rtol=1e-4, atol=1e-3)


def test_the_fastest_way_is_taken_for_each_number_of_tokens() -> None:
    weight = pack(codes_of(FORMATS["q4_0"], 16, 64, DEVICE))

    def limits(*seconds: float, wrong: object = None) -> ProductLimits:
        """Of two ways after the other, for one number of tokens after the other."""
        times = iter(seconds)
        return product_limits.limits_of(
            [weight], torch.float32, lambda run: next(times), lambda way, *others: way is not wrong
        )

    assert limits(1, 2, 1, 2, 3, 2, *[1, 2] * 3, 2, 2, 9, 2) == ProductLimits(2, 64)
    assert limits(9, 2, *[1, 2] * 2, 3, 2) == ProductLimits(0, 16), "few tokens need not be dequantised for"
    assert limits(*[1.0] * 22) == ProductLimits(8, 512)
    assert limits(*[2.0, 1.0] * 2) == ProductLimits(0, 0)
    assert limits(*[1.0] * 14, wrong=products.multiply_numbers) == ProductLimits(0, 512)
    assert limits(*[9.0] * 4, wrong=products.multiply_tiles) == ProductLimits(8, 0)
    with pytest.raises(ModelLoadError, match="wrong products with weights of 4 bits: set QUANTIZATION=none"):
        limits(wrong=products.multiply_dequantised)


@pytest.mark.parametrize("name", FORMATS)
def test_a_way_that_computes_something_else_is_not_taken(name: str) -> None:
    weight = pack(codes_of(FORMATS[name], 70, 256, DEVICE))

    def doubled(*product: *Product) -> None:
        products.multiply_tiles(*product)
        product[3].mul_(1.1)

    def broken(*product: *Product) -> None:
        raise RuntimeError("PassManager::run failed")

    for dtype in (torch.float32, torch.float16):
        assert all(product_limits._agrees(way, weight, dtype) for way in product_limits.WAYS)
        assert not product_limits._agrees(doubled, weight, dtype)
        assert not product_limits._agrees(broken, weight, dtype)


@pytest.mark.parametrize(("rows", "columns"), [(3, 512), (5, 256)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_weight_is_unpacked_again(name: str, rows: int, columns: int) -> None:
    for columns_per_scale in (0,) if FORMATS[name].has_super_blocks else (0, 128):
        weight = codes_of(FORMATS[name], rows, columns, DEVICE, columns_per_scale)
        found = packed_weight.unpack(pack(weight))
        assert found.format == weight.format and torch.equal(found.codes, weight.codes)
        assert torch.equal(found.dequantize(), weight.dequantize())


def test_each_way_has_its_numbers_of_tokens() -> None:
    limits = ProductLimits(2, 64)
    ways = [limits.way_for(count) for count in (1, 2, 3, 64, 65, 8192)]
    assert ways == [products.multiply_numbers] * 2 + [products.multiply_tiles] * 2 + [products.multiply_dequantised] * 2


def test_parts_fill_the_device_and_are_not_too_short() -> None:
    assert products.parts_of(8, 64, 132) == 16
    assert products.parts_of(8, 8, 132) == 2
    assert products.parts_of(4096, 64, 132) == 1
    assert products.parts_of(8, 3, 132) == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_field_of_a_chunk_has_its_own_bits(bits: int) -> None:
    fmt, taken = Format(bits), set[tuple[int, int]]()
    for first, width in fmt.fields:
        for group in range(groups_of(fmt)):
            vector, shift = place_of(fmt, group, first, width)
            bits_of_it = {(vector, shift + bit) for bit in range(width)}
            assert not taken & bits_of_it and all(bit < 8 for _, bit in bits_of_it)
            taken |= bits_of_it
    assert len(taken) == bits * groups_of(fmt) and max(vector for vector, _ in taken) < bits * groups_of(fmt) // 8
