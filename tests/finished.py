"""What every row of a finished run has, for tests that write rows by hand."""

FINISHED = {
    "mode": "in-weight",
    "n_facts": 8,
    "recall": 0.5,
    "n_questions": 8,
    "steps": 20,
    "steps_budget": 20,
    "train_seconds": 1.0,
    "stopped": "budget",
    "finished_at": "2026-01-01T00:00:00+00:00",
    "device": "cpu",
    "config": "{}",
}
