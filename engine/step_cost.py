"""choose_num_seqs: how many sequences a CPU computes at once, from the measured time of decode steps.

Each row of a step adds to its time, for every stream. More sequences give more tokens per second in total, until each
stream becomes slower than people read.
"""

import logging
import math
import time

from transformers import PreTrainedModel

from engine.batch import Batch, Span
from engine.kv_cache import CachePlan, KVCache
from engine.layer_spec import LayerSpecs
from engine.model_runner import ModelRunner
from engine.recurrent.state_cache import StateCache, StatePlan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

log = logging.getLogger(__name__)
SLOWEST = 0.2  # seconds between two tokens of a stream: about what people read
STRETCH = 3.0  # a step may take this many times a step of one sequence, where that alone is slow
FEWEST, MOST = 16, 256  # sequences
ROWS = 16  # of the step that is compared with one of a single row
TRIES = 3  # of each step, of which the fastest counts: the first one may compile kernels
TOKENS_EACH = 512  # that the KV cache should hold for each sequence
BLOCK_SIZE = 16  # tokens


def choose_num_seqs(model: PreTrainedModel, specs: LayerSpecs, cache_memory: int) -> int:
    """Returns a power of two from FEWEST to MOST. cache_memory: bytes. Raises what the model raises."""
    one, many = (decode_seconds(model, specs, count) for count in (1, ROWS))
    per_row = max(many - one, 1e-6) / (ROWS - 1)
    in_time = 1 + (max(SLOWEST, STRETCH * one) - one) / per_row
    in_memory = cache_memory / (TOKENS_EACH * specs.bytes_per_token + specs.bytes_per_sequence)
    count = min(max(in_time, FEWEST), max(in_memory, FEWEST), MOST)
    log.info("a step of 1 sequence takes %.1f ms, of %d %.1f ms", 1e3 * one, ROWS, 1e3 * many)
    return 1 << int(math.log2(count))


def decode_seconds(model: PreTrainedModel, specs: LayerSpecs, count: int) -> float:
    """Returns the seconds of a decode step of `count` sequences, in a cache of its own."""
    memory = (count + 1) * BLOCK_SIZE * specs.bytes_per_token
    plan = CachePlan.fit(specs.attention, memory, BLOCK_SIZE, count, count)
    states = StateCache(StatePlan(count, 0, 0), specs.recurrent, BLOCK_SIZE) if specs.recurrent else None
    cache = KVCache(plan, specs.attention, states, specs.shared)
    runner = ModelRunner(model, cache)
    greedy = SamplingParams(max_tokens=2, temperature=0.0)
    sequences = [Sequence([0], greedy, on_output=lambda output: None) for _ in range(count)]
    for sequence in sequences:
        sequence.token_ids.append(0)  # a token of an answer
        cache.allocate(sequence, sequence.num_tokens)
        cache.advance(sequence, 1)
    batch = Batch(tuple(Span(sequence, 1, 1) for sequence in sequences))
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        runner.run(batch)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
