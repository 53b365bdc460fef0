"""Records: each row of a weight as bytes, codes and scales together, which transformers loads as it loads numbers.

transformers renames, stacks and joins the tensors of a checkpoint on their way into a model: those of experts become
one parameter. All that it does to rows it does to records, too, and knows nothing of what they hold.
"""

import torch

from engine.cpu.packed_weight import BFLOAT16, E4M3, GROUP, INT8, Codes, Format
from errors import ModelLoadError

HEADER = 16  # bytes, of which the first is the number of a format
FORMATS = (
    BFLOAT16,
    INT8,
    *(Format(bits, offset=2 ** (bits - 1)) for bits in (2, 4, 5)),
    *(Format(bits, has_minimum=True) for bits in (2, 4)),
    Format(8, offset=128, has_minimum=True),
    E4M3,
)


def of_codes(weight: Codes) -> torch.Tensor:
    """Returns (rows, bytes) uint8: a header, the codes, the scales, and the minimums if there are any."""
    factors = [part for part in (weight.scales, weight.minimums) if part is not None]
    return _joined(weight.format, weight.codes, *(part.half().contiguous().view(torch.uint8) for part in factors))


def of_numbers(weight: torch.Tensor) -> torch.Tensor:
    """Returns (rows, bytes) uint8: a header and the row. weight: (rows, columns) bfloat16."""
    return _joined(BFLOAT16, weight.contiguous().view(torch.uint8))


def _joined(fmt: Format, *parts: torch.Tensor) -> torch.Tensor:
    header = torch.zeros(len(parts[0]), HEADER, dtype=torch.uint8)
    header[:, 0] = FORMATS.index(fmt)
    return torch.cat([header, *parts], dim=1)


def read(rows: torch.Tensor) -> Codes | torch.Tensor:
    """Returns what rows hold: codes, or numbers in bfloat16. rows: (rows, bytes) uint8."""
    if not bool((rows[:, :HEADER] == rows[0, :HEADER]).all()):
        raise ModelLoadError("Its layers are quantized differently, and the model joins them: take another checkpoint.")
    fmt, content = FORMATS[int(rows[0, 0])], rows[:, HEADER:]
    if not fmt.is_quantized:
        return content.contiguous().view(torch.bfloat16)
    num_factors = 1 + fmt.has_minimum
    columns = content.shape[1] * GROUP // (GROUP + 2 * num_factors)
    factors = content[:, columns:].contiguous().view(torch.float16)
    scales, *minimums = factors.split(columns // GROUP, dim=1)
    return Codes(fmt, content[:, :columns], scales, *(minimums or [None]))


def num_columns(stored: Codes | torch.Tensor) -> int:
    """Returns the number of columns of what `read` has returned."""
    return (stored.codes if isinstance(stored, Codes) else stored).shape[-1]


def numbers(stored: Codes | torch.Tensor) -> torch.Tensor:
    """Returns the weights of what `read` has returned."""
    return stored.dequantize() if isinstance(stored, Codes) else stored
