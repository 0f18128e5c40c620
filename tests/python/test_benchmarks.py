"""The benchmark suite on the CPU: byte counts, memory of inputs, what is refused and written."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import compare
import providers
import run
from cases import CASES, WORDS, Work, bytes_moved, default_plan, select, yardstick_bytes
from inputs import make_sets

KEYS = {"case", "variant", "direction", "provider", "metric", "median", "yardstick", "bytes"}


@pytest.mark.parametrize(
    "case,variant,direction,expected",
    [
        ("train", "", "forward", 2 * 4 * 4096 * 40 * 128 * 2),
        ("train", "", "backward", 2 * 4 * 4096 * 40 * 128 * 2),
        ("train", "", "both", 4 * 4 * 4096 * 40 * 128 * 2),
        ("train", "thd cu_seqlens", "in_place", 2 * 4 * 4096 * 40 * 128 * 2),
        ("train", "float32", "forward", 2 * 4 * 4096 * 40 * 128 * 4),
        ("train", "partial2", "forward", 2 * 4 * 4096 * 40 * 128 * 2),
        ("train", "partial2", "in_place", 2 * 4 * 4096 * 40 * 64 * 2),
        ("train", "partial4", "in_place", 2 * 4 * 4096 * 40 * 32 * 2),
        ("train", "per_token", "forward", 4 * 4096 * (2 * 40 * 128 * 2 + 2 * 64 * 4)),
        ("train", "per_head", "forward", 4 * 4096 * (2 * 64 * 128 * 2 + 2 * 32 * 64 * 4)),
        ("wide512", "", "forward", 2 * 2 * 4096 * 9 * 512 * 2),
        ("mla", "", "in_place", 2 * 2 * 4096 * 65 * 64 * 2),
        ("decode1", "", "forward", 2 * 40 * 128 * 2),
    ],
)
def test_bytes_moved(case, variant, direction, expected):
    assert bytes_moved(Work(CASES[case], variant), direction) == expected


def test_yardstick_of_forward_and_backward_is_forward_alone():
    work = Work(CASES["train"])
    assert yardstick_bytes(work, "both") == bytes_moved(work, "forward")


@pytest.mark.parametrize("variant", ["interleaved bhsd", "bhsd  packed sideways", "half"])
def test_words_are_known_and_in_order(variant):
    with pytest.raises(ValueError, match="words of a variant"):
        Work(CASES["train"], variant)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_names_each_work_once(device):
    works = list(default_plan(device))
    assert len(set(works)) == len(works)
    assert select(device, ["tiny"]) == [Work(CASES["tiny"])]


def test_inputs_lie_in_the_memory_that_is_named():
    def q_and_k(variant):
        inputs = make_sets(Work(CASES["tiny"], variant), 2, torch.device("cpu"))[1]
        return inputs.q, inputs.k

    B, S, Hq, Hk, D = 2, 8, 4, 2, 16
    q, k = q_and_k("")
    assert q.shape == (B, S, Hq, D) and k.shape == (B, S, Hk, D) and q.is_contiguous()
    q, _ = q_and_k("bhsd")
    assert q.shape == (B, Hq, S, D) and q.is_contiguous()
    q, _ = q_and_k("bhsd_view")
    assert q.shape == (B, Hq, S, D) and q.transpose(1, 2).is_contiguous()
    q, k = q_and_k("packed")
    assert q.stride() == (S * (Hq + 2 * Hk) * D, (Hq + 2 * Hk) * D, D, 1) == k.stride()
    assert k.data_ptr() - q.data_ptr() == Hq * D * q.element_size()
    q, k = q_and_k("thd cu_seqlens")
    assert q.shape == (B * S, Hq, D)
    q, k = q_and_k("per_head")
    assert q.shape == k.shape


@pytest.fixture
def tiny(tmp_path):
    """Runs the suite on the tiny case and returns the exit status and what was written."""

    def call(*arguments):
        out = tmp_path / "figures.json"
        status = run.main(["--device", "cpu", "--quick", "--out", str(out), *arguments])
        return status, json.loads(out.read_text()), out

    return call


def test_quick_run_writes_figures_and_pictures(tiny):
    pytest.importorskip("fused_rope")
    names = ["fused_rope", "reference"]
    variants = ["", "packed", "interleaved partial2", "thd cu_seqlens"]
    status, content, out = tiny(
        *("--cases", "tiny", "call", "--variants", *variants, "--plots", "--providers", *names)
    )
    assert status == 0
    assert {"device", "torch", "cuda", "commit", "date"} <= content["meta"].keys()
    assert content["meta"]["refused"] == []
    for row in content["rows"]:
        assert row.keys() >= KEYS
        assert row["median"] > 0 and row["yardstick"] > 0 and row["bytes"] > 0
        assert row["metric"] == ("host_us" if row["case"] == "call" else "cpu_us")
    ours = {r["variant"] for r in content["rows"] if r["provider"] == "fused_rope"}
    assert ours == set(variants)
    for picture in ("figures_bandwidth.png", "figures_call.png"):
        assert out.with_name(picture).stat().st_size > 0


def test_every_word_is_verified(tiny):
    pytest.importorskip("fused_rope")
    words = [w for w in WORDS if w != "cu_seqlens"]
    status, content, _ = tiny(
        *("--cases", "tiny", "--providers", "fused_rope", "--directions", "forward"),
        *("--variants", *words),
    )
    assert status == 0 and content["meta"]["refused"] == []
    assert [row["variant"] for row in content["rows"]] == words


class Unwritten(providers.Provider):
    """Returns memory that it does not write."""

    needs_cuda = False

    def bind(self, work, inputs, in_place):
        return lambda: (torch.empty_like(inputs.q), torch.empty_like(inputs.k))


class InPlace(providers.Provider):
    """Calls itself out of place, and writes over its inputs."""

    directions = ("forward",)
    needs_cuda = False

    def bind(self, work, inputs, in_place):
        import oracle

        def call():
            for x in (inputs.q, inputs.k):
                x.copy_(oracle.oracle(x, inputs.cos, inputs.sin))
            return inputs.q, inputs.k

        return call


@pytest.mark.parametrize("liar", [Unwritten, InPlace])
def test_what_is_wrong_is_not_timed(tiny, monkeypatch, liar):
    monkeypatch.setitem(providers.PROVIDERS, "quack", liar)
    status, content, _ = tiny("--cases", "tiny", "--providers", "quack")
    assert status == 1 and content["rows"] == []
    assert content["meta"]["refused"]


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    loaded, skipped = providers.load_providers(["eager_hf", "liger"], torch.device("cpu"))
    assert loaded == [] and skipped.keys() == {"eager_hf", "liger"}


def test_compare_shows_the_change():
    key = ("tiny", "", "forward", "fused_rope", "cpu_us")
    old, new = {key: {"median": 10.0, "yardstick": 5.0}}, {key: {"median": 9.0, "yardstick": 5.0}}
    assert "-10.0 %" in compare.compare(old, new)
    assert "only in B: tiny forward fused_rope cpu_us" in compare.compare({}, new)
