"""The cost of training anew beside that of forgetting, by hand and on the paper's own model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

from editunlearn.comparing.meter import Meter
from editunlearn.comparing.retraining import SEVEN, Token, per_token, times_cheaper
from editunlearn.resources import shipped_names

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import retraining


def test_by_hand() -> None:
    token = Token(read=2.0, trained=6.0)
    assert times_cheaper(token, 1000, 10, (1, 0)) == 100
    assert times_cheaper(token, 1000, 10, (2, 0)) == 50
    assert times_cheaper(token, 1000, 10, (2, 1)) == pytest.approx(6000 / 140)


def test_counted_on_fake_tensors_as_on_real_ones() -> None:
    lm = tiny.lm()
    lm.model.set_attn_implementation("eager")
    token, ids = per_token(lm.model.config, 16), torch.zeros(1, 16, dtype=torch.long)
    with torch.no_grad():
        meter = Meter(lm)
        with meter.running():
            lm.model(input_ids=ids, use_cache=False)
    assert token.read * 16 == meter.flops and 2.5 < token.trained / token.read <= 3
    both = Meter(lm)
    with both.running():
        lm.model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert token.trained * 16 == both.flops


def test_there_is_a_method_for_each_of_the_seven() -> None:
    assert {Path(name).stem for name in shipped_names("hparams") if name.startswith("seven/")} == set(SEVEN)


def test_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["retraining", "--out", str(tmp_path / "found.json")])
    retraining.main()
    found = json.loads((tmp_path / "found.json").read_text())
    token = found["flops_of_a_token"]
    assert 2 * 5.5e9 < token["read"] < 2 * 7.5e9  # two for each of six billion parameters, and attention
    times = found["times_cheaper"]
    assert times["gradient_ascent"]["arXiv"] == pytest.approx(3e12 / (500 * 4096))
    assert min(value for by in times.values() for value in by.values()) > 1e5
    assert "| ascent_kl_general |" in capsys.readouterr().out
