"""Records made up for the tests."""

import pytest


@pytest.fixture
def make_record():
    from normexp.runs.records import Record

    def make(**changes) -> "Record":
        plain = {
            "task": "iwslt14",
            "kind": "translation",
            "norm": "power",
            "label": "PN",
            "seed": 1,
            "sites": {"encoder_attention": {"name": "power", "alpha_fwd": 0.9}},
            "status": "complete",
            "metrics": {"valid": {"loss_per_token_nats": 2.125}, "test": {"bleu_tokenised": 35.5}},
            "sees_future_tokens": None,
            "num_parameters": 36_741_120,
            "num_updates": 60_000,
            "num_epochs": 55.0,
            "tokens_per_second": 12_345.6,
            "peak_memory_bytes": 3 * 2**30,
            "wall_time_seconds": 7_380.0,
            "hardware": {"processor": "Some CPU", "num_cores": 2, "gpus": []},
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "code_commit": "0123456789abcdef0123456789abcdef01234567",
            "code_dirty": False,
            "command": "python scripts/train.py task=iwslt14 norm=power seed=1",
            "config": {"task": "iwslt14", "seed": 1, "dropout": 0.3},
            "config_hash": "aaaaaaaaaaaa",
            "corpus": {"name": "iwslt14", "hashes": {"test.en": "00" * 32}, "counts": {"test": 9}},
            "budget": None,
            "finished_at": "2026-01-02T03:04:05+00:00",
        }
        return Record(**(plain | changes))

    return make
