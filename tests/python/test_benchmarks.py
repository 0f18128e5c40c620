"""The benchmark suite on the CPU: byte counts, memory of inputs, refused and written rows."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cliffs
import compare
import measure
import oracle
import plots
import providers
import run
import sweep
import table
from cases import (
    CASES,
    MID,
    ODD,
    ODD_VARIANTS,
    TRAIN_VARIANTS,
    WORDS,
    Work,
    baseline_bytes,
    bytes_moved,
    default_plan,
    is_target,
    select,
)
from inputs import make_sets
from torch.utils._python_dispatch import TorchDispatchMode
from trial import Bench, Trial

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"case", "variant", "direction", "provider", "metric", "median", "baseline", "bytes"}


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
        ("vit72", "", "forward", 2 * 4 * 4096 * 32 * 72 * 2),
        ("d100", "", "in_place", 2 * 4 * 4096 * 40 * 100 * 2),
        ("neox20b", "", "forward", 2 * 4 * 4096 * 128 * 96 * 2),
        ("neox20b", "", "in_place", 2 * 4 * 4096 * 128 * 24 * 2),
        ("pythia", "", "in_place", 2 * 4 * 4096 * 64 * 20 * 2),
        ("train", "thd cu_seqlens sequences64", "forward", 2 * 4 * 4096 * 40 * 128 * 2),
        ("train", "norm", "forward", 2 * 4 * 4096 * 40 * 128 * 2),
        ("train", "norm", "backward", 3 * 4 * 4096 * 40 * 128 * 2),
        ("train", "norm", "both", 5 * 4 * 4096 * 40 * 128 * 2),
        ("neox20b", "norm", "in_place", 2 * 4 * 4096 * 128 * 96 * 2),
        ("decode64", "cache", "forward", 64 * 2 * (32 + 8 + 8) * 128 * 2),
        ("decode64", "cache_fp8", "forward", 64 * ((2 * 32 + 8 + 8) * 2 + 8 + 8) * 128),
    ],
)
def test_bytes_moved(case, variant, direction, expected):
    assert bytes_moved(Work(CASES[case], variant), direction) == expected


def test_baseline_of_forward_and_backward_is_forward_alone():
    work = Work(CASES["train"])
    assert baseline_bytes(work, "both") == bytes_moved(work, "forward")


@pytest.mark.parametrize(
    "variant",
    ["interleaved bhsd", "bhsd  packed sideways", "half", "sequences64 thd", "partial3", "mrope2"],
)
def test_words_are_known_and_in_order(variant):
    with pytest.raises(ValueError, match="words of a variant"):
        Work(CASES["train"], variant)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plan_names_each_work_once(device):
    works = list(default_plan(device))
    assert len(set(works)) == len(works)
    assert select(device, ["tiny"]) == [Work(CASES["tiny"])]


LARGE = ("train", "prefill", "mha1", "mha2", "d64", "wide256", "wide80", "wide96", "wide512")


def target_figures():
    """The figures that the targets need: case, variant, direction, provider."""
    for name in (*LARGE, *MID):
        yield from ((name, "", way, "fused_rope") for way in ("forward", "backward", "in_place"))
    for variant in TRAIN_VARIANTS:
        yield from (
            ("train", variant, way, "fused_rope") for way in ("forward", "backward", "in_place")
        )
    for name in ("decode256", "decode64", "decode1"):
        yield from ((name, "", way, "fused_rope") for way in ("forward", "in_place"))
    for name in ("decode256", "decode64"):
        for words in ("positions32", "positions64"):
            yield from ((name, words, way, "fused_rope") for way in ("forward", "in_place"))
        yield (name, "positions32", "in_place", "unsloth")
    yield ("train", "", "in_place", "unsloth")
    for name in ODD:
        yield from ((name, "", way, "fused_rope") for way in ("forward", "backward", "in_place"))
        yield from ((name, "", way, "flash_attn") for way in ("forward", "in_place"))
    for variant in ODD_VARIANTS:
        others = () if variant == "mrope_mixed" else ("flash_attn",)
        for name in ("fused_rope", *others):
            yield from (("train", variant, way, name) for way in ("forward", "in_place"))
    yield ("call", "positions32", "forward", "fused_rope_unsloth")
    yield from ((name, "", "in_place", "fused_rope") for name in ("mla", "dsv4"))
    yield from (("call", "", way, "fused_rope") for way in ("forward", "forward_grad"))
    yield from (("call", "", "in_place", name) for name in ("fused_rope", "fused_rope_vllm"))
    for name in ("module", "liger", "flash_attn"):
        yield from (("call", "", way, f"fused_rope_{name}") for way in ("forward", "forward_grad"))
    for words in ("positions32", "positions64"):
        yield from (
            ("call", words, "forward", name) for name in ("fused_rope", "fused_rope_module")
        )
    yield from (("call", "", "forward", f"fused_rope_{way}") for way in ("hf", "unsloth"))
    yield from ((name, "", "in_place", "liger") for name in ("call", "train", "mid512"))
    yield from (("train", "", "forward", p) for p in ("flash_attn", "inductor", "eager_hf"))
    for name in ("fused_rope", "fused_rope_hf", "fused_rope_unsloth"):
        yield ("train", "", "both", name)
    yield from (("call", "norm", way, "fused_rope") for way in ("forward", "forward_grad"))
    peers = ("unsloth", "inductor", "eager_hf", "rms_norm_fused_rope", "liger_rms_norm_fused_rope")
    for name in ("train", "prefill", "mid2048", "mid512", "decode256", "decode64", "decode1"):
        yield from ((name, "norm", "forward", provider) for provider in ("fused_rope", *peers))
    for name in ("train", "prefill", "mid2048"):
        yield from ((name, "norm", "backward", provider) for provider in ("fused_rope", *peers))
    for words in ("cache", "cache_fp8"):
        for name in ("call", "decode256", "decode64", "prefill"):
            yield name, words, "forward", "fused_rope"


def test_a_run_for_the_targets_measures_all_that_they_need():
    everyone = [kind.__new__(kind) for kind in providers.PROVIDERS.values()]
    planned = [
        (step.work.case.name, step.work.variant, direction, provider.name)
        for step in run.plan(select("cuda"), None, everyone, is_target)
        for direction, able in step.pairs
        for provider in able
    ]
    assert len(set(planned)) == len(planned) < 400
    assert set(target_figures()) <= set(planned)


def test_inputs_have_the_memory_layout_of_the_variant():
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
    q, k = q_and_k("unaligned")
    assert {x.data_ptr() % 16 for x in (q, k)} == {2} and q.is_contiguous() and k.is_contiguous()


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("layout", ["", "bhsd ", "thd "])
def test_inputs_have_the_storage_offset_of_the_variant(layout, offset):
    inputs = make_sets(Work(CASES["tiny"], f"{layout}unaligned{offset}"), 3, torch.device("cpu"))
    assert {x.data_ptr() % 16 for one in inputs for x in (one.q, one.k)} == {2 * offset}


@pytest.mark.parametrize(
    "case,words,expected",
    [
        ("tiny", "", [0, 4, 16]),
        ("mid512", " sequences4", [0, 64, 192, 320, 512]),
        ("mid512", " sequences1", [0, 512]),
        ("tiny", " sequences16", [*range(16), 16]),
    ],
)
def test_packed_sequences_have_these_ends(case, words, expected):
    work = Work(CASES[case], f"thd cu_seqlens{words}")
    (inputs,) = make_sets(work, 1, torch.device("cpu"))
    assert inputs.options["cu_seqlens"].tolist() == expected


@pytest.mark.parametrize(
    "word,sections,interleaved",
    [
        ("mrope", (16, 24, 24), False),
        ("mrope_uneven", (12, 26, 26), False),
        ("mrope_interleaved", (22, 21, 21), True),
        ("mrope_mixed", (24, 20, 20), True),
    ],
)
def test_axes_are_those_of_mrope_sections(word, sections, interleaved):
    fused_rope = pytest.importorskip("fused_rope")
    (inputs,) = make_sets(Work(CASES["decode1"], word), 1, torch.device("cpu"))
    axes = inputs.options["axes"]
    assert axes == fused_rope.mrope_axes(sections, interleaved=interleaved)


@pytest.fixture
def tiny(tmp_path):
    """Runs the suite and returns the exit status, the content of the file, and its path."""

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
        assert row["median"] > 0 and row["baseline"] > 0 and row["bytes"] > 0
        assert row["metric"] == ("host_us" if row["case"] == "call" else "cpu_us")
    ours = {r["variant"] for r in content["rows"] if r["provider"] == "fused_rope"}
    assert ours == set(variants)
    for picture in ("figures_bandwidth.png", "figures_call.png"):
        assert out.with_name(picture).stat().st_size > 0


OURS = {
    "fused_rope": ("forward", "forward_grad", "in_place"),
    "fused_rope_module": ("forward", "forward_grad"),
    "fused_rope_hf": ("forward", "forward_grad"),
    "fused_rope_unsloth": ("forward", "forward_grad"),
    "fused_rope_liger": ("forward", "forward_grad"),
    "fused_rope_flash_attn": ("forward", "forward_grad", "in_place"),
    "fused_rope_vllm": ("in_place",),
}


@pytest.mark.parametrize(
    "variant,without",
    [
        ("", ()),
        ("positions32", ("fused_rope_liger", "fused_rope_flash_attn")),
        ("positions64", ("fused_rope_liger", "fused_rope_flash_attn", "fused_rope_unsloth")),
    ],
)
@pytest.mark.parametrize("case,metric", [("call", "host_us"), ("tiny", "cpu_us")])
def test_the_module_and_the_drop_ins_have_rows(tiny, case, metric, variant, without):
    pytest.importorskip("fused_rope")
    pytest.importorskip("transformers")
    arguments = ["--cases", case, "--variants", variant, "--providers", *OURS]
    _, content, _ = tiny(*arguments, "--directions", "forward", "forward_grad", "in_place")
    assert content["meta"]["refused"] == []
    found = {(row["provider"], row["direction"], row["metric"]) for row in content["rows"]}
    assert found == {
        (name, way, metric) for name, ways in OURS.items() if name not in without for way in ways
    }


def test_every_word_is_verified(tiny):
    pytest.importorskip("fused_rope")
    words = [w for w in WORDS if w not in ("cu_seqlens", "sequences")]
    words += ["thd cu_seqlens", "thd cu_seqlens sequences5", "thd cu_seqlens sequences64"]
    words += ["interleaved mrope_mixed", "unaligned3"]
    status, content, _ = tiny(
        *("--cases", "tiny", "--providers", "fused_rope", "--directions", "forward"),
        *("--variants", *words),
    )
    assert status == 0 and content["meta"]["refused"] == []
    assert [row["variant"] for row in content["rows"]] == words


class Unwritten(providers.Provider):
    """Returns uninitialized memory."""

    needs_cuda = False

    def bind(self, work, inputs, in_place):
        return lambda: (torch.empty_like(inputs.q), torch.empty_like(inputs.k))


class InPlace(providers.Provider):
    """Claims to be out of place, but writes to its inputs."""

    directions = ("forward",)
    needs_cuda = False

    def bind(self, work, inputs, in_place):
        def call():
            for x in (inputs.q, inputs.k):
                x.copy_(oracle.oracle(x, inputs.cos, inputs.sin))
            return inputs.q, inputs.k

        return call


@pytest.mark.parametrize("wrong", [Unwritten, InPlace])
def test_a_wrong_provider_is_not_timed(tiny, monkeypatch, wrong):
    monkeypatch.setitem(providers.PROVIDERS, "quack", wrong)
    status, content, _ = tiny("--cases", "tiny", "--providers", "quack")
    assert status == 1 and content["rows"] == []
    assert content["meta"]["refused"]


CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):
    """Records the names of the operators below autograd that return or change tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and isinstance(result, (torch.Tensor, tuple)):
            self.names.append(str(function))
        return result


def operators_of(trial):
    """The operators of the timed calls."""
    with Recorder() as recorder, trial.grad_mode():
        for call in trial.calls:
            call()
    return recorder.names


@pytest.mark.parametrize("direction", ["forward", "backward", "both", "forward_grad"])
@pytest.mark.parametrize(
    "name,variant",
    [
        *((name, variant) for name in ("eager_hf", "fused_rope_hf") for variant in ("", "packed")),
        *(("fused_rope_unsloth", variant) for variant in ("", "bhsd")),
    ],
)
def test_verification_changes_nothing_about_what_is_timed(name, direction, variant):
    """A write to the base of a view makes as_strided's backward that of the view."""
    pytest.importorskip("fused_rope")
    pytest.importorskip("transformers")
    work, provider = Work(CASES["tiny"], variant), providers.PROVIDERS[name]()
    assert provider.supports(work, direction)
    untouched, verified = (Trial(Bench(work, 2, CPU), provider, direction) for _ in range(2))
    verified.verify()
    assert operators_of(verified) == operators_of(untouched)


@pytest.mark.parametrize("name", ["fused_rope", "fused_rope_hf", "fused_rope_unsloth"])
def test_forward_and_backward_are_two_operators_after_other_trials(name):
    """Trials share input sets, so none of them may write to a set."""
    pytest.importorskip("fused_rope")
    pytest.importorskip("transformers")
    bench = Bench(Work(CASES["tiny"]), 2, CPU)
    version = bench.sets[0].q._version
    ours = providers.PROVIDERS["fused_rope"]()
    trial = Trial(bench, providers.PROVIDERS[name](), "both")
    for direction in ("forward", "backward", "in_place", "both"):
        other = Trial(bench, ours, direction)
        other.verify()
        operators_of(other)
    trial.verify()
    assert operators_of(trial) == ["fused_rope.rotate_qk.default"] * 4  # two for each set
    assert bench.sets[0].q._version == version


class Eager:
    """A replacement of measure.Graph whose replays repeat the calls."""

    kernels = 2

    def __init__(self, calls):
        self.calls, self._inputs = len(calls), calls
        self.outputs = [call() for call in calls]

    def replay(self):
        for held, call in zip(self.outputs, self._inputs, strict=True):
            for x, y in zip(held, call(), strict=True):
                x.detach().copy_(y)

    def time(self, effort):
        self.replay()
        return measure.Figure(2.0, 1.0, 3.0)


class EagerClone(Eager):
    def __init__(self, bytes_of_a_call, cache, device, effort):
        super().__init__([])


def test_a_row_of_gpu_time_holds_the_number_of_kernels_per_call(monkeypatch):
    pytest.importorskip("fused_rope")
    monkeypatch.setattr(measure, "Graph", Eager)
    monkeypatch.setattr(measure, "CloneGraph", EagerClone)
    runner = run.Runner(CPU, measure.QUICK)
    runner.on_gpu = True
    ours = providers.PROVIDERS["fused_rope"]()
    (step,) = run.plan([Work(CASES["tiny"])], ["both", "in_place"], [ours])
    with run.tqdm(disable=True) as progress:
        runner.run(step, progress)
    assert runner.refused == []
    assert [(row["metric"], row["kernels"]) for row in runner.rows] == [("gpu_us", 2)] * 2


KERNEL, MEMCPY, MEMSET, EMPTY, EVENT_RECORD = 0, 1, 2, 5, 7


class Driver:
    """A replacement of libcuda that reports nodes of these types."""

    def __init__(self, types, status=0):
        self.types, self.status = types, status

    def cuGraphGetNodes(self, graph, nodes, count):
        count._obj.value = len(self.types)
        for i in range(len(self.types) if nodes is not None else 0):
            nodes[i] = i + 1
        return self.status

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = self.types[node.value - 1]
        return self.status


@pytest.mark.parametrize(
    "types,expected",
    [
        ([], 0),
        ([KERNEL, KERNEL], 2),
        ([KERNEL, MEMSET, MEMCPY, EMPTY, EVENT_RECORD], 3),
    ],
    ids=["empty", "kernels", "copies and fills"],
)
def test_kernels_copies_and_fills_of_a_graph_are_counted(monkeypatch, types, expected):
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: Driver(types))
    assert measure.device_nodes(1) == expected


def test_a_failing_driver_call_is_named(monkeypatch):
    monkeypatch.setattr(measure.ctypes, "CDLL", lambda name: Driver([KERNEL], status=1))
    with pytest.raises(RuntimeError, match="cuGraphGetNodes returned 1"):
        measure.device_nodes(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fused_rope", "fused_rope_hf", "fused_rope_unsloth"])
def test_the_timed_graph_of_forward_and_backward_holds_our_two_kernels(name):
    pytest.importorskip("fused_rope")
    pytest.importorskip("transformers")
    device = torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        bench = Bench(Work(CASES["mid512"]), 4, device)
        trial = Trial(bench, providers.PROVIDERS[name](), "both")
        trial.verify()
        graph = trial.capture()
        trial.verify_graph(graph)
        assert graph.kernels == 2
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            graph.replay()
            torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 2 * graph.calls
    assert all("fused_rope" in event.name for event in on_device)


class ScriptedPace:
    """A pace that gives these answers."""

    def __init__(self, answers):
        self.answers = iter(answers)

    def slowed(self):
        return next(self.answers, False)


@pytest.mark.parametrize(
    "answers,waits,named",
    [
        ([], 0, False),
        ([True, True, False, False], 2, False),
        ([False, True, False, False], 0, False),
        ([False, True] * 3, 0, True),
        ([True] * 9, 4, True),
    ],
    ids=["never", "before", "during the first try", "during every try", "always"],
)
def test_a_run_waits_for_a_throttled_gpu_and_names_its_figures(
    tiny, monkeypatch, answers, waits, named
):
    naps = []
    monkeypatch.setattr(measure, "pace_of", lambda device: ScriptedPace(answers))
    monkeypatch.setattr(run, "REST", 4)
    monkeypatch.setattr(run.time, "sleep", naps.append)
    arguments = ("--cases", "tiny", "--providers", "reference", "--directions", "forward")
    status, content, _ = tiny(*arguments, "--variants", "")
    (row,) = content["rows"]
    assert status == 0 and len(naps) == waits
    assert row.get("slowed", False) == named
    assert content["meta"]["slowed"] == ["tiny forward reference"] * named


def test_pace_is_compared_with_the_best():
    pace = object.__new__(measure.Pace)
    pace._best = float("inf")
    assert [pace.is_slow(t) for t in (10, 10.2, 9, 9.2, 9.3)] == [False, False, False, False, True]


@pytest.mark.parametrize("cause", ["interrupt", "time"])
def test_a_run_that_ends_early_writes_its_figures(tiny, monkeypatch, cause, capsys):
    """All of the first work; of the second one what was measured, or nothing."""
    original, calls = run.Runner.run, []

    def one_and_a_half(runner, step, progress):
        calls.append(step)
        original(runner, step, progress)
        if cause == "interrupt" and len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Runner, "run", one_and_a_half)
    if cause == "time":
        monkeypatch.setattr(run, "QUICK_SECONDS", -1)
    variants = ["", "bhsd", "float32"]
    work = ("--cases", "tiny", "--directions", "forward", "--providers", "fused_rope", "reference")
    status, content, _ = tiny(*work, "--variants", *variants)
    kept = variants[:2] if cause == "interrupt" else []
    assert {row["variant"] for row in content["rows"]} == set(kept)
    assert status == (not kept)
    left_out = variants if cause == "time" else variants[1:]
    expected = ["left out:", *(f"  tiny {variant}".rstrip() for variant in left_out)]
    assert capsys.readouterr().out.splitlines()[-len(expected) :] == expected


def test_libraries_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    loaded, skipped = providers.load_providers(["eager_hf", "liger"], torch.device("cpu"))
    assert loaded == [] and skipped.keys() == {"eager_hf", "liger"}


def test_peers_are_imported_from_a_folder(tiny, monkeypatch, tmp_path):
    pytest.importorskip("fused_rope")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(providers.Unsloth, "needs_cuda", False)
    monkeypatch.setattr(providers.Unsloth, "module_name", "a_peer.kernels")
    package = tmp_path / "peers" / "a_peer"
    package.mkdir(parents=True)
    (package / "kernels.py").write_text(
        "from fused_rope.compat.unsloth import fast_rope_embedding\n"
    )
    arguments = ["--cases", "tiny", "--variants", "bhsd", "--directions", "forward"]
    arguments += ["--providers", "fused_rope", "unsloth"]
    _, content, _ = tiny(*arguments)
    assert content["meta"]["skipped"].keys() == {"unsloth"}
    _, content, _ = tiny(*arguments, "--peers", str(package.parent))
    assert content["meta"]["skipped"] == {} and content["meta"]["refused"] == []
    assert [row["provider"] for row in content["rows"]] == ["fused_rope", "unsloth"]


def test_a_missing_folder_of_peers_is_an_error(tiny):
    with pytest.raises(SystemExit, match="--peers: expected a folder"):
        tiny("--cases", "tiny", "--peers", "no such folder")


def sglang_apply_rope_inplace(q, k, cos_sin_cache, positions, *, is_neox):
    cos, sin = cos_sin_cache[positions].chunk(2, -1)
    for x in (q, k):
        x.copy_(oracle.bits(x[None], cos[None], sin[None], interleaved=not is_neox)[0])


def megatron_fused_apply_mrope(t, freqs, mrope_section):
    axes = torch.arange(3).repeat_interleave(torch.tensor(mrope_section))
    angles = freqs[axes, ..., torch.arange(len(axes))].permute(1, 2, 0)  # [B, S, P]
    return oracle.bits(t, angles.cos(), angles.sin(), layout="sbhd")


@pytest.mark.parametrize(
    "adapter,module,names,variants,direction",
    [
        (
            providers.SGLang,
            "sglang.kernels.ops.attention.rope",
            {"apply_rope_inplace": sglang_apply_rope_inplace},
            ("", "packed", "interleaved", "positions32", "positions64", "float16"),
            "in_place",
        ),
        (
            providers.Megatron,
            "megatron.core.fusions.fused_mrope",
            {
                "fused_apply_mrope": megatron_fused_apply_mrope,
                "is_fused_mrope_available": lambda: True,
            },
            ("mrope", "mrope float16", "mrope float32"),
            "forward",
        ),
    ],
)
def test_adapters_follow_the_conventions_of_their_libraries(
    adapter, module, names, variants, direction, monkeypatch
):
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    for name, function in names.items():
        monkeypatch.setattr(sys.modules[module], name, function, raising=False)
    provider = adapter()
    for variant in variants:
        work = Work(CASES["tiny"], variant)
        assert provider.supports(work, direction)
        with torch.no_grad():
            Trial(Bench(work, 2, torch.device("cpu")), provider, direction).verify()


@pytest.mark.parametrize("direction", ["forward", "backward", "in_place"])
@pytest.mark.parametrize(
    "variant", ["unaligned", "partial4", "thd cu_seqlens", "thd cu_seqlens sequences5", "offsets"]
)
def test_the_adapter_of_flash_attn_rotates_what_it_supports(variant, direction):
    """The drop-in has the same call and the same adapter."""
    pytest.importorskip("fused_rope")
    work, provider = Work(CASES["tiny"], variant), providers.FusedRopeFlashAttn()
    assert provider.supports(work, direction)
    trial = Trial(Bench(work, 2, CPU), provider, direction)
    with trial.grad_mode():
        trial.verify()


@pytest.mark.parametrize(
    "case,variant",
    [
        *(("cpu", words) for words in ("", "float32", "mrope", "mrope_mixed")),
        *((name, words) for name in ("cpu_vit72", "cpu_neox20b") for words in ("", "float32")),
    ],
)
def test_a_run_on_the_cpu_measures_all_that_its_targets_need(case, variant):
    assert Work(CASES[case], variant) in select("cpu")


class LigerRMSNorm(torch.nn.RMSNorm):
    """The constructor and the call of Liger's."""


@pytest.fixture
def norm_peers(monkeypatch):
    """Makes the peers that need CUDA run on the CPU, by our drop-ins and without a compiler."""
    pytest.importorskip("fused_rope")
    pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    module = ModuleType("liger_kernel.transformers.rms_norm")
    module.LigerRMSNorm = LigerRMSNorm
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("module_name", "norm_module_name"):
        monkeypatch.setattr(providers.Unsloth, name, "fused_rope.compat.unsloth")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("direction", ["forward", "backward", "both", "forward_grad"])
@pytest.mark.parametrize(
    "name,gradients",
    [
        ("fused_rope", 4),
        ("fused_rope_unsloth", 4),
        ("unsloth", 2),
        ("rms_norm_fused_rope", 4),
        ("liger_rms_norm_fused_rope", 4),
        ("eager_hf", 4),
        ("inductor", 4),
    ],
)
def test_norms_and_their_gradients_are_verified(norm_peers, name, gradients, direction):
    provider, work = providers.PROVIDERS[name](), Work(CASES["tiny"], "norm")
    assert provider.supports(work, direction)
    trial = Trial(Bench(work, 2, CPU), provider, direction)
    trial.verify()
    results = {"backward": gradients, "both": 2 + gradients}.get(direction, 2)
    with trial.grad_mode():
        assert [len(call()) for call in trial.calls] == [results] * 2


def test_a_norm_is_one_operator_in_each_direction():
    pytest.importorskip("fused_rope")
    bench, ours = Bench(Work(CASES["tiny"], "norm"), 2, CPU), providers.PROVIDERS["fused_rope"]()
    names = {d: operators_of(Trial(bench, ours, d)) for d in ("forward", "backward", "in_place")}
    assert names["forward"] == ["fused_rope.norm_rotate_qk.default"] * 2
    assert names["backward"] == ["fused_rope.norm_rotate_qk_backward.default"] * 2
    Trial(bench, ours, "in_place").verify()


@pytest.mark.parametrize("variant", ["norm", "float16 norm", "float32 norm"])
def test_gradients_of_a_norm_are_those_of_autograd_in_float64(variant):
    bench = Bench(Work(CASES["tiny"], variant), 1, CPU)
    (x,), (given,) = bench.sets, bench.gradients
    leaves = [t.double().requires_grad_() for t in (x.q, x.k, *x.weights)]
    tables = x.cos.double()[:, None], x.sin.double()[:, None]
    out = []
    for t, weight in zip(leaves[:2], leaves[2:], strict=True):
        normed = torch.nn.functional.rms_norm(t, t.shape[-1:], weight, 1e-6)
        a, b = normed.chunk(2, -1)
        cos, sin = tables
        out.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
    for got, want in zip(bench.expected("forward"), out, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(out, leaves, (given.q.double(), given.k.double()))
    for got, one in zip(bench.expected("backward"), want, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-11, atol=1e-11)


class Unweighted(providers.FusedRope):
    """Leaves the weight of k out."""

    def bind_norm(self, inputs, in_place):
        weights = inputs.weights[0], torch.ones_like(inputs.weights[1])
        return super().bind_norm(replace(inputs, weights=weights), in_place)


def test_a_norm_with_another_weight_is_not_timed(tiny, monkeypatch):
    pytest.importorskip("fused_rope")
    monkeypatch.setitem(providers.PROVIDERS, "quack", Unweighted)
    status, content, _ = tiny("--cases", "tiny", "--variants", "norm", "--providers", "quack")
    assert status == 1 and content["rows"] == [] and content["meta"]["refused"]


def test_unsloth_gets_tables_that_its_fused_norm_accepts(norm_peers):
    """It squeezes tables of one row and then takes its unfused path."""
    work = Work(CASES["decode1"], "norm")
    (inputs,) = make_sets(work, 1, CPU)
    tables = providers.PROVIDERS["unsloth"]().make_tables(work, inputs)
    assert [t.squeeze().shape for t in tables] == [(2, 128)] * 2


def test_quick_run_times_norms(tiny):
    pytest.importorskip("fused_rope")
    names = ["fused_rope", "rms_norm_fused_rope"]
    arguments = ["--cases", "tiny", "call", "--variants", "norm", "--providers", *names]
    status, content, _ = tiny(*arguments)
    assert status == 0 and content["meta"]["refused"] == []
    found = {(row["case"], row["direction"], row["provider"]) for row in content["rows"]}
    places = (("tiny", "forward"), ("call", "forward"), ("call", "forward_grad"))
    assert found >= {(*place, name) for place in places for name in names}


@pytest.mark.parametrize("name", ["fused_rope", "two_step"])
@pytest.mark.parametrize("variant", ["cache", "cache_fp8"])
def test_caches_are_verified(name, variant):
    pytest.importorskip("fused_rope")
    provider, work = providers.PROVIDERS[name](), Work(CASES["tiny"], variant)
    assert provider.supports(work, "forward") and not provider.supports(work, "backward")
    trial = Trial(Bench(work, 2, CPU), provider, "forward")
    trial.verify()
    assert [len(call()) for call in trial.calls] == [3] * 2
    if name == "fused_rope":
        assert operators_of(trial) == ["aten.empty_strided.default"] * 2  # q'


class Unstored(providers.FusedRope):
    """Stores k in place of v."""

    def bind_cache(self, inputs):
        return super().bind_cache(replace(inputs, cache=replace(inputs.cache, v=inputs.k)))


@pytest.mark.parametrize("variant", ["cache", "cache_fp8"])
def test_a_wrong_cache_is_not_timed(tiny, monkeypatch, variant):
    pytest.importorskip("fused_rope")
    monkeypatch.setitem(providers.PROVIDERS, "quack", Unstored)
    status, content, _ = tiny("--cases", "tiny", "--variants", variant, "--providers", "quack")
    assert status == 1 and content["rows"] == [] and content["meta"]["refused"]


def test_quick_run_times_caches(tiny):
    pytest.importorskip("fused_rope")
    names = ["fused_rope", "two_step"]
    words = ["cache", "cache_fp8"]
    arguments = ["--cases", "tiny", "call", "--variants", *words, "--providers", *names]
    status, content, _ = tiny(*arguments)
    assert status == 0 and content["meta"]["refused"] == []
    found = {(row["case"], row["variant"], row["provider"]) for row in content["rows"]}
    assert found == {(c, v, p) for c in ("tiny", "call") for v in words for p in names}


def test_sweep_compares_plans(tmp_path, capsys):
    pytest.importorskip("fused_rope")
    out = tmp_path / "sweep.json"
    status = run.main(
        [
            *("--device", "cpu", "--quick", "--out", str(out), "--sweep", "keep=0", "threads=64"),
            *("--cases", "tiny", "--variants", "", "bhsd", "--directions", "forward", "in_place"),
        ]
    )
    rows = json.loads(out.read_text())["rows"]
    assert status == 0
    assert [row["plan"] for row in rows] == [*[""] * 4, *["keep=0"] * 4, *["threads=64"] * 4]
    printed = capsys.readouterr().out
    assert "| work | none | keep=0 | threads=64 |" in printed
    assert "| tiny bhsd forward |" in printed and "| tiny bhsd in_place |" in printed


def figure(direction, metric, median, **more):
    row = {"case": "train", "variant": "", "direction": direction, "provider": "fused_rope"}
    return row | {"metric": metric, "median": median, "baseline": 80.0, "bytes": 1} | more


def test_tables_hold_times_of_in_place_calls_that_allocate_nothing():
    rows = [
        figure(direction, metric, median, plan=plan)
        for plan in ("", "keep=0")
        for direction, times in (("forward", (100.0, 335.0)), ("in_place", (160.0, 0.0)))
        for metric, median in zip(("gpu_us", "peak_bytes"), times, strict=True)
    ]
    assert sweep.table(rows, ["", "keep=0"]).split("\n")[2:] == [
        "| train forward | 100 (0.800) | 100 (0.800) |",
        "| train in_place | 160 (0.500) | 160 (0.500) |",
    ]
    assert "| train |  | in_place |  | 0.0 | 0.0 (0.000) |" in table.markdown(rows)


CLIFFS = ("--device", "cpu", "--quick", "--case", "tiny")


def test_cliffs_are_written_and_drawn(tmp_path):
    pytest.importorskip("fused_rope")
    out = tmp_path / "cliffs_cpu.json"
    assert cliffs.main([*CLIFFS, "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["meta"]["refused"] == []
    rows = content["rows"]
    assert {row["sweep"] for row in rows} == set(cliffs.SWEEPS)
    for row in rows:
        assert row.keys() >= KEYS | {"x"} and row["metric"] == "cpu_us"
        assert row["median"] > 0 and row["baseline"] > 0
    assert {row["direction"] for row in rows} == {"forward", "in_place"}
    assert out.with_suffix(".png").stat().st_size > 0
    assert plots.draw(out) == [out.with_suffix(".png")]


@pytest.mark.parametrize(
    "sweep,expected",
    [
        ("head_dim", [*range(16, 257, 4)]),
        ("rotary_dim", [*range(4, 129, 4)]),
        ("storage_offset", [*range(9)]),
        ("sequences", [1, 4, 16, 64, 256, 1024, 4096, 8192]),
        ("axes", ["positions64", "mrope", "mrope_uneven", "mrope_interleaved", "mrope_mixed"]),
    ],
)
def test_points_of_a_sweep(sweep, expected):
    points = list(cliffs.SWEEPS[sweep](CASES["train"]))
    assert [point.x for point in points] == expected
    assert {point.sweep for point in points} == {sweep}
    assert len({point.work for point in points}) == len(points)


def test_a_sweep_of_a_peer_that_is_not_installed_has_no_picture(tmp_path):
    out = tmp_path / "cliffs_cpu.json"
    status = cliffs.main([*CLIFFS, "--sweeps", "axes", "--providers", "liger", "--out", str(out)])
    assert status == 1 and not out.with_suffix(".png").exists()
    assert json.loads(out.read_text())["meta"]["skipped"].keys() == {"liger"}


def test_an_interrupted_sweep_is_written_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("fused_rope")
    calls = []

    def measured(*given):
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*given)

    original = cliffs.measured
    monkeypatch.setattr(cliffs, "measured", measured)
    out = tmp_path / "cliffs_cpu.json"
    assert cliffs.main([*CLIFFS, "--sweeps", "storage_offset", "--out", str(out)]) == 0
    assert {row["x"] for row in json.loads(out.read_text())["rows"]} == {0}
    assert out.with_suffix(".png").exists()


def test_documents_show_the_figures():
    """`make figures` writes them."""
    for document, text in table.updated(ROOT).items():
        assert document.read_text() == text
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert 0 < (document.parent / picture).stat().st_size < 150_000


def test_the_page_shows_norms_once_they_are_measured():
    results = table.Results.read(ROOT / "benchmarks" / "results")
    rows = [row for row in results.gpu["rows"] if row["variant"] != "norm"]
    without = replace(results, gpu=results.gpu | {"rows": rows})
    assert "### Norm" not in table.page(without)
    ours = figure("backward", "gpu_us", 100.0, variant="norm")
    peer = figure("backward", "gpu_us", 150.0, variant="norm", provider="unsloth")
    shown = table.page(replace(results, gpu=results.gpu | {"rows": [*rows, ours, peer]}))
    line = "| 4, 4096, 32, 8, 128 | backward | 80.0 | 100.0 (0.80) | 150.0 (1.50x) |"
    assert shown.count("### Norm") == 1 and line in shown
    assert "| norm |" not in shown


def test_figures_are_replaced_between_their_marks():
    text = f"before\n{table.MARKS[0]}\nold\n{table.MARKS[1]}\nafter\n"
    new = table.replaced(text, "new \\1")
    assert new == text.replace("old", "new \\1")
    with pytest.raises(ValueError, match="once"):
        table.replaced("no marks", "new")


def test_compare_reads_two_files(tmp_path):
    rows = [dict.fromkeys(compare.FIELDS, "x") | {"median": m, "baseline": 2.0} for m in (4, 3)]
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, row in zip(files, rows, strict=True):
        run.write(file, {}, [row])
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *map(str, files)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| 4 | 3 | -25.0 % | -25.0 % |" in printed


@pytest.mark.parametrize(
    "before,after,shown", [(0.0, 0.0, "0.0 %"), (0.0, 4.0, "from 0"), (4.0, 0.0, "-100.0 %")]
)
def test_compare_shows_the_change_of_calls_that_allocated_nothing(before, after, shown):
    key = ("train", "", "in_place", "fused_rope", "peak_bytes")
    a, b = ({key: {"median": peak, "baseline": 8.0}} for peak in (before, after))
    assert f"| {shown} | {shown} |" in compare.compare(a, b)


def test_compare_shows_the_change():
    key = ("tiny", "", "forward", "fused_rope", "cpu_us")
    old, new = {key: {"median": 10.0, "baseline": 5.0}}, {key: {"median": 9.0, "baseline": 5.0}}
    assert "-10.0 %" in compare.compare(old, new)
    assert "only in B: tiny forward fused_rope cpu_us" in compare.compare({}, new)


@pytest.fixture
def model_suite(tmp_path):
    """Runs model.py on tiny models and returns the exit status and the file."""
    pytest.importorskip("transformers", minversion="5.0")
    import model

    def call(*arguments):
        out = tmp_path / "model.json"
        common = ("--tiny", "--quick", "--device", "cpu", "--backend", "aot_eager")
        status = model.main([*common, "--out", str(out), *arguments])
        return status, json.loads(out.read_text())

    return call


def test_original_and_patched_models_are_timed(model_suite):
    import model

    status, content = model_suite("--modes", "eager")
    assert status == 0 and content["meta"]["left_out"] == []
    assert {"device", "torch", "cuda", "commit", "date"} <= content["meta"].keys()
    found = set()
    for row in content["rows"]:
        assert row.keys() >= KEYS - {"bytes"} and row["median"] > 0 and row["baseline"] > 0
        limit = model.TOLERANCE if row["provider"] == "norms_fused" else 0  # bitwise identical
        assert row["distance"] <= limit
        found.add((row["case"], row["direction"], row["provider"], row["metric"]))
    for name in ("llama3_8b", "qwen3_8b"):
        norms = {"norms_fused"} if name == "qwen3_8b" else set()
        assert norms == {v for n, _, v, _ in found if n == name} - set(model.MODES["eager"][:3])
        for variant in ("original", "patched", "patched_rows", *norms):
            assert (name, "decode", variant, "host_us") in found
            assert all((name, p, variant, "wall_us") in found for p in ("prefill", "train"))


@pytest.mark.slow
def test_compiled_models_are_timed_with_both_choices(model_suite):
    status, content = model_suite(
        *("--models", "qwen3_8b", "--modes", "compiled", "--phases", "decode")
    )
    assert status == 0 and content["meta"]["left_out"] == []
    variants = {row["provider"] for row in content["rows"]}
    assert variants == {"original", "patched", "patched_fused", "norms_fused"}


def test_norms_that_are_not_fused_are_left_out(model_suite, monkeypatch):
    from fused_rope.compat._patching import norms

    monkeypatch.setattr(norms.Kind, "fits", lambda self, norm, x: False)
    status, content = model_suite(
        *("--models", "qwen3_8b", "--modes", "eager", "--phases", "prefill")
    )
    assert status == 0 and {row["provider"] for row in content["rows"]} >= {"patched"}
    assert ["0 calls with norms in 2 layers" in line for line in content["meta"]["left_out"]] == [1]


def test_a_failing_contest_does_not_stop_the_run(model_suite, monkeypatch):
    import model

    def wrong(self, call):
        return [torch.rand(3)]

    def broken(self, call):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.Prefill, "results", wrong)
    monkeypatch.setattr(model.Train, "results", broken)
    status, content = model_suite("--models", "llama3_8b", "--modes", "eager")
    assert status == 0
    left_out = content["meta"]["left_out"]
    assert [line.split(":")[0] for line in left_out] == [
        "llama3_8b eager prefill patched",
        "llama3_8b eager prefill patched_rows",
        "llama3_8b eager train",
    ]
    timed = {(row["direction"], row["provider"]) for row in content["rows"]}
    assert ("decode", "patched") in timed and ("prefill", "patched") not in timed


def test_no_contest_starts_after_the_deadline(model_suite):
    status, content = model_suite("--models", "llama3_8b", "--modes", "eager", "--seconds", "0")
    assert status == 1
    assert [line.split(": ")[1] for line in content["meta"]["left_out"]] == ["out of time"] * 3


def test_models_are_unpatched_after_a_contest(model_suite):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    before = llama.apply_rotary_pos_emb, llama.LlamaRotaryEmbedding.forward
    model_suite("--models", "llama3_8b", "--modes", "eager", "--phases", "prefill")
    assert (llama.apply_rotary_pos_emb, llama.LlamaRotaryEmbedding.forward) == before


@pytest.fixture
def chain(tmp_path):
    pytest.importorskip("transformers")
    import decode_chain

    def call(*arguments):
        out = tmp_path / "chain.json"
        common = ("--tiny", "--quick", "--device", "cpu", "--out", str(out))
        status = decode_chain.main([*common, *arguments])
        return status, json.loads(out.read_text())

    return call


def test_decode_chain(chain):
    status, content = chain("--batches", "1", "3", "--label", "plain")
    assert status == 0 and content["meta"]["left_out"] == []
    rows = content["rows"]
    assert all(row.keys() >= KEYS - {"bytes"} and row["variant"] == "plain" for row in rows)
    ways = ("eager_hf", "fused_copy", "fused_write", "fused_cache", "fused_cache_fp8")
    assert [(r["case"], r["provider"]) for r in rows] == [
        (case, way) for case in ("chain1", "chain3") for way in ways
    ]


def test_a_wrong_chain_is_not_timed(chain, monkeypatch):
    import decode_chain

    def elsewhere(layer):
        out = decode_chain.fused_write(layer)
        layer.k_cache[0] += 1
        return out

    def unrotated(layer):
        q, k = layer.normed()
        layer.k_cache.index_copy_(0, layer.slots, k)
        return layer.attend(q)

    monkeypatch.setitem(decode_chain.WAYS, "fused_copy", elsewhere)
    monkeypatch.setitem(decode_chain.WAYS, "eager_hf", unrotated)
    status, content = chain("--batches", "3", "--ways", "eager_hf", "fused_copy")
    assert status == 1 and content["rows"] == []
    assert "away from float64" in content["meta"]["left_out"][0]
    assert "other tokens" in content["meta"]["left_out"][1]
