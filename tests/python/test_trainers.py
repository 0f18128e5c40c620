"""`patch` in training programs: Trainer, PEFT and TRL, and with Liger in the same process."""

import types
import warnings

import pytest
import torch
from oracle import same

transformers = pytest.importorskip("transformers")

from fused_rope.compat._patching import replacements  # noqa: E402
from fused_rope.compat.transformers import is_patched, patch, unpatch  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402

KEY = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
ORIGINAL = llama.apply_rotary_pos_emb
SKIP = {"skip_prepare_dataset": True}
ADVICE = "apply Liger with rope=False to use the operator"


@pytest.fixture(autouse=True)
def untouched():
    """Every test begins with nothing patched and leaves the family as it was."""
    replacements.retired.clear()
    yield
    for entry in list(replacements.current.values()):
        entry.remove()
    llama.apply_rotary_pos_emb = ORIGINAL


def build():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=32)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def samples(count=4, length=9):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def options(folder, **more):
    """TrainingArguments of two steps on the CPU."""
    return dict(
        output_dir=str(folder),
        max_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )


def equal(got, want):
    """Whether two models have the same parameters, bitwise."""
    pairs = zip(got.parameters(), want.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def trained(make, is_to_patch):
    """The model after training; `make` returns a Trainer."""
    trainer = make()
    if is_to_patch:
        assert KEY in patch(trainer.model).patched
    trainer.train()
    assert is_patched(trainer.model) == is_to_patch
    if is_to_patch:
        assert KEY in unpatch(trainer.model).restored
    return trainer.model


# --- trainers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_trainer(precision, tmp_path):
    """Two steps lead to the same parameters, bitwise; under autocast, to bfloat16's roundings."""
    pytest.importorskip("accelerate")
    autocast = precision == "autocast"

    def make():
        how = {"bf16": True} if autocast else {"gradient_checkpointing": True}
        arguments = transformers.TrainingArguments(**options(tmp_path, optim="sgd", **how))
        model = build().bfloat16() if precision == "bfloat16" else build()
        return transformers.Trainer(model, arguments, train_dataset=samples())

    original, ours = (trained(make, is_to_patch) for is_to_patch in (False, True))
    assert not equal(original, build())
    if not autocast:
        assert equal(ours, original)
        return
    first, ours, original = (
        torch.nn.utils.parameters_to_vector(model.parameters())
        for model in (build(), ours, original)
    )
    assert (ours - original).norm() < 2**-7 * (original - first).norm()


def test_peft(tmp_path):
    """A wrapped model is patched as the model in it."""
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")

    def make():
        lora = peft.LoraConfig(target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(build(), lora)
        arguments = transformers.TrainingArguments(**options(tmp_path))
        return transformers.Trainer(model, arguments, train_dataset=samples())

    original, ours = (trained(make, is_to_patch) for is_to_patch in (False, True))
    assert equal(ours, original)
    assert any(p.abs().max() > 0 for name, p in ours.named_parameters() if "lora_B" in name)


def test_trl(tmp_path):
    """SFTTrainer, with a patched model."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"<{i}>": i for i in range(32)}
    model = tokenizers.models.WordLevel(words, unk_token="<0>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), eos_token="<1>", pad_token="<2>"
    )
    rows = {"input_ids": [sample["input_ids"].tolist() for sample in samples()]}

    def make():
        arguments = trl.SFTConfig(**options(tmp_path, bf16=False, dataset_kwargs=SKIP))
        dataset = datasets.Dataset.from_dict(rows)
        return trl.SFTTrainer(build(), arguments, train_dataset=dataset, processing_class=tokenizer)

    original, ours = (trained(make, is_to_patch) for is_to_patch in (False, True))
    assert equal(ours, original) and not equal(ours, build())


# --- Liger ----------------------------------------------------------------------------------------


def liger_of(function):
    """The function under Liger's name."""
    theirs = types.FunctionType(function.__code__, function.__globals__, "liger_rotary_pos_emb")
    theirs.__defaults__ = function.__defaults__
    theirs.__module__ = "liger_kernel.transformers.rope"
    return theirs


def test_liger_first():
    """Its function stays, and the report names it and the way to choose the operator."""
    llama.apply_rotary_pos_emb = theirs = liger_of(ORIGINAL)
    model = build()
    report = patch(model)
    reason = f"it was replaced by liger_kernel first: {ADVICE}"
    assert report.left_alone == {KEY: reason} and not report.patched and not report.tables
    assert llama.apply_rotary_pos_emb is theirs and not is_patched(model)


def test_liger_last():
    """The first forward warns, once; reports say so."""
    model, ids = build(), torch.arange(9)[None]
    want = model(ids).logits
    patch(model)
    llama.apply_rotary_pos_emb = theirs = liger_of(ORIGINAL)
    with pytest.warns(UserWarning, match=f"liger_kernel replaced {KEY} after.*{ADVICE}"):
        same(model(ids).logits, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
    assert not is_patched(model)
    since = "it was replaced by liger_kernel since"
    assert patch(build()).left_alone == {KEY: f"{since} another model was patched: {ADVICE}"}
    assert unpatch(model).left_alone[KEY] == f"{since}: {ADVICE}"
    assert llama.apply_rotary_pos_emb is theirs


def test_liger_without_its_rotation():
    """The warning is only for replaced functions; a family that is patched again is quiet."""
    model, ids = build(), torch.arange(9)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(model)
        model(ids)
        unpatch(model)
        model(ids)
        patch(model, precision="fp32")
        model(ids)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("first", ["liger", "ours"])
def test_real_liger(first, rope):
    liger = pytest.importorskip("liger_kernel.transformers", exc_type=ImportError)
    off = dict(rms_norm=False, swiglu=False, fused_linear_cross_entropy=False)
    steps = [lambda: liger.apply_liger_kernel_to_llama(rope=rope, **off), lambda: patch(model)]
    model = build()
    for step in steps if first == "liger" else steps[::-1]:
        step()
    assert is_patched(model) == (not rope)
    who = llama.apply_rotary_pos_emb.__module__
    assert who.startswith("liger_kernel") == rope
    if rope:
        assert ADVICE in unpatch(model).left_alone.get(KEY, ADVICE)
