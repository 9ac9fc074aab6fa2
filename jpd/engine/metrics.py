"""Counters of a running engine."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineStats:
    """Counts since the start, and what is held now."""

    steps: int = 0
    step_tokens: int = 0
    """Tokens computed, prompt and decode."""
    generated_tokens: int = 0
    """Tokens delivered."""
    requests_finished: int = 0
    requests_aborted: int = 0
    requests_timed_out: int = 0
    """Requests that `timeout_s` ended."""
    requests_failed: int = 0
    """Requests that every executor failed on."""
    preemptions: int = 0
    """Sequences that gave their pages up to others and are computed again."""
    requeued: int = 0
    """Sequences that are computed again because an executor was lost in their prefill."""
    mode: str = "unified"
    """"unified" while one executor computes both phases, else "semi_pd" or "disaggregated"."""
    mode_changes: int = 0
    """Times that `mode` changed: by `topology="auto"`, or as nobody was left for a phase."""
    break_even_estimate: float | None = None
    """What `topology="auto"` decides by, see `jpd.semi_pd.mode`: cost on one executor over that on
    two, by jpd's controllers, or requests saved for each one that waits; None while unknown."""
    executors_lost: int = 0
    """Executors that failed or were killed while others went on, idle ones included."""
    pages_lost: int = 0
    """Times that all KV pages were lost, with the device's memory, and every sequence computed
    again."""
    prompt_tokens: int = 0
    """Prompt tokens of admitted sequences, computed or found in the prefix cache."""
    cached_tokens: int = 0
    """Those found in the prefix cache."""
    recompiles: int = 0
    """Step shapes that were compiled while requests waited."""
    softmax_recomputed_rows: int = 0
    """Rows of asynchronous softmax (one for each sequence, layer and key head) that left its range
    and were computed again; many of them call for `jpd calibrate`."""
    running: int = 0
    """Sequences with a row."""
    waiting: int = 0
    """Sequences in the queue."""
    free_pages: int = 0
