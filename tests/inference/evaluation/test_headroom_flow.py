"""Is there anything to gain? Told of a base alone, from a configuration and from a pool file."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from iama.cli.app import app
from inference.evaluation.summary import load_summary
from inference.report.sentences import gain_sentences
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed

NUM_PROMPTS, NUM_SAMPLES = 6, 64


def write(path: Path, scores: dict[str, np.ndarray]) -> Path:
    """A pool whose samples have these scores, `[P, S]` each."""
    lines = [{"iama_pool": 1, "policy": {"name": path.stem}}]
    for p, s in np.ndindex(next(iter(scores.values())).shape):
        row = {name: float(values[p, s]) for name, values in scores.items()}
        lines.append({"prompt": f"question {p}", "text": f"answer {s} to {p}", "scores": row})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def opposed(num_prompts: int = NUM_PROMPTS, num_samples: int = NUM_SAMPLES) -> dict[str, np.ndarray]:
    """Two criteria that exclude each other, each with a noisy proxy."""
    rng = np.random.default_rng(1)
    one, noise, more = rng.normal(size=(3, num_prompts, num_samples))
    return {"a": one + 0.3 * noise, "a/gold": one, "b": -one + 0.3 * more, "b/gold": -one}


def hacked() -> dict[str, np.ndarray]:
    """Of two kinds of answers the one that the proxy likes best, one in ten, is worth least."""
    rng = np.random.default_rng(4)
    proxy = rng.random((NUM_PROMPTS, NUM_SAMPLES))
    return {"a": proxy, "a/gold": np.where(proxy > 0.9, -1.0, proxy)}


def told(out: Path, *options: object) -> tuple[str, dict]:
    """What the command prints, and the headroom in the summary that it wrote."""
    command = ["evaluate", *map(str, options), "--out", str(out), "--set", "num_bootstrap=200"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.exception
    found = load_summary(out)["headroom"]
    assert found is not None
    return " ".join(done.stdout.split()), dict(found)


def best_of(selector: np.ndarray, score: np.ndarray, n: int) -> float:
    """Mean score of the best of n by the selector, over all subsets of a pool without ties."""
    return float(np.mean([score[max(chosen, key=selector.__getitem__)]
                          for chosen in combinations(range(len(score)), n)]))  # fmt: skip


def test_a_base_alone(tmp_path):
    pool = write(tmp_path / "base.jsonl", opposed())
    words, found = told(tmp_path / "out", "--pool", f"base={pool}")
    sentence = "Train (IAMA): Best-of-16 of the untrained base is well above Best-of-4 on a and b, which exclude"
    assert sentence in words
    assert "No savings were measured" not in words
    assert "Headroom of the untrained base" in words
    assert (found["policy"], found["samples"], found["far"]) == ("base", 4, 16)
    assert found["conflicting"] == ["a", "b"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<section id="headroom">' in page
    assert sentence in page


def test_figures_equal_enumeration(tmp_path):
    scores = opposed(num_prompts=4, num_samples=16)
    pool = write(tmp_path / "base.jsonl", scores)
    _, found = told(tmp_path / "out", "--pool", f"base={pool}")
    near, far = found["samples"], found["far"]
    assert (near, far) == (1, 4)
    for row in found["criteria"]:
        proxy, gold = (scores[row["criterion"] + end] for end in ("", "/gold"))
        values = {n: np.mean([best_of(*pair, n) for pair in zip(proxy, gold, strict=True)]) for n in (near, far)}
        assert (row["value"], row["far_value"]) == pytest.approx((values[near], values[far]))
        assert row["spread"] == pytest.approx(np.sqrt(gold.var(axis=1).mean()))
    for row in found["exclusions"]:
        proxy, gold = scores[row["kept_for"]], scores[row["criterion"] + "/gold"]
        kept = np.mean([best_of(*pair, far) for pair in zip(proxy, gold, strict=True)])
        assert (row["value"], row["single"]) == pytest.approx((kept, gold.mean()))
        other = scores[row["kept_for"] + "/gold"]
        ranks = np.mean([spearmanr(x, y)[0] for x, y in zip(other, gold, strict=True)])
        assert (row["correlation"], row["correlation"]) == pytest.approx((ranks, -1.0))
        own = next(r["far_value"] for r in found["criteria"] if r["criterion"] == row["criterion"])
        assert row["own"] == pytest.approx(own)


def test_beside_a_trained_policy_it_is_the_first_reference(tmp_path):
    files = {name: write(tmp_path / f"{name}.jsonl", opposed()) for name in ("base", "iama")}
    words, found = told(tmp_path / "out", *(part for n, path in files.items() for part in ("--pool", f"{n}={path}")))
    assert found["policy"] == "base"
    assert "Before training: Train (IAMA)" in words
    assert "Headroom of" not in words


def test_each_verdict_has_its_words(tmp_path):
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(NUM_PROMPTS, NUM_SAMPLES))
    many = rng.normal(size=(8, 5, NUM_SAMPLES * 2)) - 3.0
    kinds = rng.integers(0, 5, size=(8, NUM_SAMPLES * 2))
    cases = {
        "There is nothing to gain: Best-of-16": {"a": noise, "a/gold": (noise > -1.0) * 1.0},
        "The curves come down again (a from ": hacked(),
        "by the proxy alone, which says nothing": {"a": noise},
        "training on one reward, or their sum, may do": {"a": noise, "b": noise**3},
        "Draw more: Best-of-8": {"a": (rng.random(noise.shape) < 0.4) * 1.0},
        "too many for one base to have each within reach of Best-of-4": {
            f"k{k}": np.where(kinds == k, many[:, k] + 6.0, many[:, k]) for k in range(5)
        },
    }
    for i, (wanted, scores) in enumerate(cases.items()):
        words, _ = told(tmp_path / str(i), "--pool", f"base={write(tmp_path / f'{i}.jsonl', scores)}")
        assert wanted in words, words[-600:]


def test_what_cannot_be_told_says_why(tmp_path):
    three = write(tmp_path / "three.jsonl", opposed(num_prompts=3))
    words, found = told(tmp_path / "few", "--pool", f"base={three}")
    assert "No verdict, interval or advice: 3 prompts are too few, at least 4 are needed" in words
    assert "fewer than 4 prompts were evaluated" in gain_sentences(found)[0]
    small = write(tmp_path / "small.jsonl", opposed())
    words, _ = told(tmp_path / "small", "--pool", f"base={small}", "--set", "trained_budget=8")
    assert "the curves end at 16 samples and must go beyond 16; draw at least 68 samples a prompt" in words
    flat = opposed()
    flat["a/gold"] = flat["b/gold"] = np.random.default_rng(5).normal(size=(NUM_PROMPTS, NUM_SAMPLES))
    words, _ = told(tmp_path / "wide", "--pool", f"base={write(tmp_path / 'flat.jsonl', flat)}")
    assert "the intervals on a and b are too wide; take more prompts" in words
    for name in ("a", "a/gold"):  # a proxy that chooses by chance, and gold that judges nothing
        same = {"a": flat["a"], "a/gold": flat["a/gold"], name: np.full_like(flat["a"], 0.3)}
        pool = write(tmp_path / f"{name[1:] or 'proxy'}".replace("/", ""), same)
        words, found = told(tmp_path / f"same{len(name)}", "--pool", f"base={pool}")
        assert "on a the proxy, or what judges, is the same for all answers, so no choice matters" in words
        assert "come down again" not in words
        assert [(row["level"], row["headroom"]) for row in found["criteria"]] == [("flat", 0.0)]


def test_of_a_configuration(config):
    """A base alone needs no policy of the trained one's name; figures agree with the curves."""
    policies = {"base": config.model_dump()["policies"]["base"]}
    summary = evaluate(changed(config, methods=["bon"], policies=policies, log_probabilities=False))
    found = summary["headroom"]
    assert found is not None
    assert found["policy"] == "base"
    gold = {(r["policy"], r["criterion"], r["samples"]): r["gold"] or r["proxy"] for r in summary["curves"]}
    for row in found["criteria"]:
        value = gold["base", row["criterion"], found["samples"]]
        assert row["value"] == pytest.approx(value)
