"""A GGUF file and the parts that it may be split into, as llama.cpp's gguf-split names them."""

import re
from pathlib import Path

import errors
from checkpoints import gguf_header
from checkpoints.gguf_header import Header

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)
PART_KEYS = ("split.", "GGUF.", "general.architecture", "general.alignment")  # of one part, or written by gguf


def stem(name: str) -> str:
    """Returns a file's name without `.gguf` and without the number of a part."""
    match = PART.fullmatch(name)
    return match["stem"] if match else name[: -len(".gguf")] if name.lower().endswith(".gguf") else name


def parts(path: Path) -> list[Path]:
    """Returns the file, or all parts if it is one of several, in order. Raises ModelLoadError if parts are missing."""
    paths = _all_parts(path)
    missing = [part.name for part in paths if not part.exists()] if len(paths) > 1 else []
    if missing:
        raise errors.ModelLoadError(
            f"{path.name} is one of {len(paths)} parts of a model: put the missing ones ({len(missing)}) into its "
            f"directory: {', '.join(missing[:3])}."
        )
    return paths


def present_parts(path: Path) -> list[Path]:
    """Returns the file, or those of its parts that are there."""
    return [part for part in _all_parts(path) if part.exists()]


def _all_parts(path: Path) -> list[Path]:
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [
        path.parent / f"{match['stem']}-{number:05}-of-{match['count']}{match['suffix']}"
        for number in range(1, count + 1)
    ]


def read(paths: list[Path], keep: frozenset[str] = frozenset()) -> Header:
    """Returns one header for all parts; keep: as in gguf_header. Raises ValueError with a sentence."""
    headers = [gguf_header.read(path, keep) for path in paths]
    first = headers[0]
    count = first.values.get("split.count", 0)
    if isinstance(count, int) and count > 1 and count != len(paths):
        raise ValueError(
            f"it is one of {count} parts of a model, so its name must end in the part's number, as in "
            f"-00001-of-{count:05}.gguf"
        )
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    total = first.values.get("split.tensors.count", len(tensors))
    if len(paths) > 1 and total != len(tensors):
        raise ValueError(f"its parts hold {len(tensors)} tensors instead of {total}")
    return Header(first.is_big_endian, first.values, tensors)


def merge(paths: list[Path], target: Path) -> None:
    """Writes the parts as one file, with the tensors' bytes as they are."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = [GGUFReader(path) for path in paths]
    architecture = readers[0].fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in readers[0].fields.items():
        if not name.startswith(PART_KEYS):
            is_array = field.types[0] == GGUFValueType.ARRAY
            value = field.contents()
            if is_array and not value:
                continue  # gguf's writer cannot write an empty list, such as one of tags
            writer.add_key_value(name, value, field.types[0], sub_type=field.types[-1] if is_array else None)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for tensor in tensors:
        data = tensor.data
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()
