"""A program that tries the kernel in Triton for one layer; see engine/attention/older_gpus.py."""

import pickle
import sys

from engine.attention import flash, paged_triton

BLOCK_SIZE = 16  # tokens

if __name__ == "__main__":
    spec = pickle.loads(bytes.fromhex(sys.argv[1]))
    sys.exit(not flash.agrees(paged_triton.paged_attention, spec, BLOCK_SIZE))
