"""
tools/export.py: an LN-free model has the same logits in transformers, TransformerLens and nnsight as in our code. It
refuses what it can't export, and asks before it uploads.
"""
import os
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import REPO, SMALL, TINY, random_hf, run_alone, set_all_fake, without_layernorm
from tiny_hub import serve
from transformers import AutoTokenizer, GPT2LMHeadModel, pipeline

from model import GPT
from parts import checkpoint
from tools import export


def logits_of(model, idx):
    """The logits of our GPT, of transformers' model or of TransformerLens's."""
    with torch.no_grad():
        out = model(idx)
    return out if isinstance(out, torch.Tensor) else out.logits if hasattr(out, "logits") else out[0]


def plain(model, folder):
    """transformers' own class, from the plain form on disk."""
    export.plain_form(model).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval()


FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors"}


# --- the forms


def assert_every_form_has_the_logits_of(model, tmp_path, atol):
    idx = torch.randint(0, 256, (2, 60))
    idx[0, 9] = model.config.eot
    expected = logits_of(model, idx)
    hf = plain(model, tmp_path / "plain")
    again = GPT.from_pretrained(tmp_path / "plain").eval()
    assert again.ln_free()
    for form in (model.fold(), hf, again, export.to_bridge(model)):
        torch.testing.assert_close(logits_of(form, idx), expected, atol=atol, rtol=0)


def test_every_form_has_the_same_logits_also_of_a_published_ln_free_model(removed, tmp_path, gpt2_tokenizer):
    """Those are like apollo-research/gpt2_noLN: layer_norm_epsilon 1e12 and weights times 1e6."""
    assert_every_form_has_the_logits_of(removed, tmp_path, 2e-4)
    published = GPT.from_pretrained(tmp_path / "plain").eval()
    assert_every_form_has_the_logits_of(published, tmp_path / "published", 2e-4)


@pytest.mark.slow
def test_forms_of_gpt2_smalls_shape_have_the_same_logits_and_the_plain_one_holds_in_bfloat16(
    tmp_path, gpt2_tokenizer
):
    """What bfloat16 changes is no more than on an ordinary GPT-2 of the same weights."""
    random_hf(**SMALL).save_pretrained(tmp_path / "small")
    small = without_layernorm(tmp_path / "small")
    assert_every_form_has_the_logits_of(small, tmp_path, 1e-3)
    idx = torch.randint(0, 50000, (1, 60))

    def change(hf):
        in_bfloat16 = logits_of(hf.bfloat16(), idx).float()
        return (in_bfloat16 - logits_of(hf.float(), idx)).abs().max()

    assert change(plain(small, tmp_path / "plain")) < 3 * change(random_hf(**SMALL))


def test_direct_logit_attribution_is_exact_without_layernorm_and_only_then(removed):
    """Each component's output times the unembedding sums up to the logit of the LN-free model, and is far from it with
    LN. TransformerLens's own logit_attrs agrees."""
    from transformer_lens.model_bridge import TransformerBridge

    idx = torch.randint(0, 256, (1, 60))
    names = [f"blocks.{i}.hook_{sublayer}_out" for i in range(4) for sublayer in ("attn", "mlp")]
    names += ["hook_embed", "hook_pos_embed"]

    def apart(cache, head, logits):
        return (sum(cache[name] for name in names) @ head.weight.T + head.bias - logits).abs().max().item()

    with torch.no_grad():
        bridge = export.to_bridge(removed)
        logits, cache = bridge.run_with_cache(idx)
        with pytest.raises(AssertionError):
            bridge.to_tokens("text")  # it has no tokenizer
        assert apart(cache, removed.fold().lm_head, logits) < 1e-4
        likeliest = logits.argmax(-1)
        components, labels = cache.decompose_resid(return_labels=True)
        attributed = cache.logit_attrs(components, likeliest).sum(0) + bridge.b_U[likeliest]
        assert len(labels) == len(names)
        torch.testing.assert_close(attributed, logits.max(-1).values, atol=1e-4, rtol=0)

        # with LN the unembedding is folded as far as it goes: the weight, the centring and the mean std
        original = GPT.from_pretrained(TINY)
        original.measure_std(idx)
        logits, cache = TransformerBridge.boot_transformers(TINY).run_with_cache(idx)
        assert apart(cache, set_all_fake(original).fold().lm_head, logits) > 1


def test_hooks_of_the_bridge_and_of_nnsight_change_the_logits_as_our_own_do(removed):
    from nnsight import NNsight

    idx = torch.randint(0, 256, (1, 30))
    plain_logits = logits_of(removed, idx)
    traced = NNsight(removed.fold().eval())
    with traced.trace(idx):
        mlp = traced.transformer.h[1].mlp.output.clone().save()
        traced.transformer.h[1].mlp.output[:] = 0
        patched = traced.output[0].save()
    off = ("blocks.1.hook_mlp_out", lambda value, hook: value * 0)
    hooked = export.to_bridge(removed).run_with_hooks(idx, fwd_hooks=[off])

    seen = []
    removed.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: seen.append(out) or out * 0)
    expected = logits_of(removed, idx)
    for found, ours in ((mlp, seen[0]), (patched, expected), (hooked, expected)):
        torch.testing.assert_close(found, ours, atol=1e-4, rtol=0)
    assert not torch.allclose(expected, plain_logits, atol=0.1)


# --- the files


@pytest.fixture
def gpt2_run(run, gpt2_tokenizer):
    """out/mine, a run's folder with an LN-free random model of GPT-2's vocabulary."""
    random_hf(vocab_size=50257).save_pretrained("hf")
    model = without_layernorm("hf")
    model.save_pretrained("out/mine/model")
    return model


def test_the_export_opens_in_a_pipeline_and_with_the_bridge_has_gpt2s_tokenizer(run, gpt2_run):
    assert run("tools.export", "out/mine", "--to=hf").code == 0
    assert set(os.listdir("out/mine/hf")) == FILES | {"merges.txt", "tokenizer_config.json", "vocab.json"}

    text = "Hello, naïve world!  def f(x):\n\treturn x<|endoftext|>"
    expected = tiktoken.get_encoding("gpt2").encode(text, allowed_special="all")
    assert AutoTokenizer.from_pretrained("out/mine/hf")(text).input_ids == expected
    assert export.to_bridge(gpt2_run).to_tokens(text).tolist() == [expected]

    generator = pipeline("text-generation", "out/mine/hf")
    (written,) = generator("Once upon a time", max_new_tokens=8, do_sample=False)
    greedy = ["--prompt=Once upon a time", "--max_new_tokens=8", "--temperature=0"]
    assert run("tools.sample", "out/mine", *greedy).text == written["generated_text"] + "\n"


def test_an_export_in_bfloat16_is_read_back_with_the_weights_that_it_has(run, gpt2_run):
    """Against transformers in float32: dividing by 1e6 rounds nothing a second time."""
    idx = torch.randint(0, 50000, (1, 40))
    assert run("tools.export", "out/mine", "--dtype=bfloat16").code == 0
    hf = GPT2LMHeadModel.from_pretrained("out/mine/hf", dtype="auto").eval()
    assert hf.dtype == torch.bfloat16
    theirs = logits_of(hf.float(), idx)
    torch.testing.assert_close(logits_of(GPT.from_pretrained("out/mine/hf").eval(), idx), theirs, atol=1e-3, rtol=0)
    torch.testing.assert_close(theirs, logits_of(gpt2_run, idx), atol=0.5, rtol=0)


@pytest.mark.slow
def test_lm_evaluation_harness_scores_the_export(run, gpt2_run, tmp_path):
    """It finds the same endings likeliest as our own HellaSwag."""
    import lm_eval

    from parts import hellaswag

    assert run("tools.export", "out/mine").code == 0
    lines = Path(REPO, "tests/hellaswag_42.jsonl").read_text().splitlines()[:10]
    Path("task.jsonl").write_text("\n".join(lines))
    files = dict(data_files=dict(validation=str(tmp_path / "task.jsonl")), cache_dir=str(tmp_path / "cache"))
    task = dict(task="endings", dataset_path="json", dataset_kwargs=files, output_type="multiple_choice",
                validation_split="validation", doc_to_text="{{ctx}}", doc_to_target="{{label}}",
                doc_to_choice="{{endings}}", metric_list=[dict(metric="acc")])
    args = "pretrained=out/mine/hf,dtype=float32,device=cpu"
    result = lm_eval.simple_evaluate(model="hf", model_args=args, tasks=[task], bootstrap_iters=0)

    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    examples = hellaswag.read_examples("task.jsonl")
    sums, _ = hellaswag.score(gpt2_run, examples, encode, "cpu", torch.no_grad())
    right = sums.argmin(1) == [example.label for example in examples]
    assert result["results"]["endings"]["acc,none"] == pytest.approx(right.mean())


def test_what_can_not_be_exported_is_named_in_one_line_and_nothing_is_written(run, removed):
    removed.save_pretrained("mine")
    removed.fold().save_pretrained("folded")
    removed.set_ln_mode("ln_2", 3, "real")
    removed.save_pretrained("half")
    os.mkdir("unfinished")
    checkpoint.save("unfinished", 1, removed, [], dict(init_from="scratch", ln_schedule=[]))
    removed.set_ln_mode("ln_2", 3, "fake")
    removed.transformer.wpe.weight.data[3] = float("nan")
    removed.save_pretrained("nan")
    os.mkdir("there")
    Path("notes.txt").touch()
    before = sorted(os.listdir())
    for args, named in (
        ("half", "h.3.ln_2"),
        ("unfinished", "h.3.ln_2"),
        ("nan", "finite"),
        ("folded", "folded"),  # GPT-2 has no lm_head.bias
        ("nowhere", "nowhere"),
        ("--to=hf", "tools.export"),
        ("mine --to=onnx", "onnx"),
        ("mine --dtype=float16", "float16"),
        ("mine --out=there", "there"),
        ("mine --out=notes.txt", "notes.txt"),
        ("mine --out=notes.txt/x", "notes.txt/"),
    ):
        refused = run("tools.export", *args.split())
        assert named in refused.error
        assert refused.text == refused.error
        assert sorted(os.listdir()) == before


@pytest.mark.slow
def test_push_asks_and_uploads_what_was_written(removed, tmp_path):
    removed.save_pretrained(tmp_path / "mine")
    with serve({}) as hub:

        def push(answer, token, out):
            env = hub.env | {"HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": token}
            args = ["mine", f"--out={out}", "--push=org/mine"]
            return run_alone("tools.export", *args, env=env, cwd=tmp_path, input=answer)

        assert push("n\n", "secret", "no").code == 1
        assert not hub.uploaded
        assert push("y\n", "secret", "yes").code == 0
        uploaded = hub.uploaded["org/mine"]
        assert uploaded.keys() == FILES
        for name, content in uploaded.items():
            assert (tmp_path / "yes" / name).read_bytes() == content

        assert "org/mine" in push("y\n", "wrong", "wrong").error
        assert (tmp_path / "no/model.safetensors").read_bytes() == uploaded["model.safetensors"]
