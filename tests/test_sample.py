"""sample.py: the cache changes nothing, the draw is as asked, and the text is whole."""
import os

import pytest
import torch
from conftest import TINY, random_hf, set_all_fake

import sample
from model import GPT


@torch.no_grad()
def likeliest(model, ids, n):
    """The same without a cache."""
    ids = list(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return ids


@pytest.mark.parametrize("form", ["real", "fake", "folded"])
def test_the_cache_changes_no_token_and_transformers_writes_the_same(form, tmp_path):
    from transformers import AutoModelForCausalLM

    model = GPT.from_pretrained(TINY).eval()
    prompt = list(b"def read(self, ")
    if form != "real":
        model.measure_std(torch.tensor([prompt * 4]))
        set_all_fake(model)
        model.set_treatment("bos", form == "fake")  # position 0 is its own with a cache, too
    model = model.fold().eval() if form == "folded" else model
    ours = prompt + list(sample.generate(model, prompt, 60, 0, 0, None))
    assert ours == likeliest(model, prompt, 60)
    if form == "real":
        theirs = AutoModelForCausalLM.from_pretrained(TINY).eval().generate(torch.tensor([prompt]), max_new_tokens=60, min_new_tokens=60, do_sample=False, pad_token_id=0)
        assert ours == theirs[0].tolist()


def test_behind_the_last_position_it_goes_on_from_the_last_half(tmp_path):
    random_hf(n_positions=16).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    ids = list(range(30))
    out = list(sample.generate(model, ids, 40, 0, 0, None))
    assert out[0] == likeliest(model, ids[-16:], 1)[-1]  # of a long prompt, the last 16
    assert out[1:9] == likeliest(model, (ids[-16:] + out[:1])[-8:], 8)[-8:] and len(out) == 40


def test_draws_are_of_the_top_k_at_the_temperature_and_a_seed_repeats_them():
    model = GPT.from_pretrained(TINY).eval()
    prompt = list(b"import ")
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0][0, -1]
    values, which = logits.topk(5)
    expected = (values / 1.5).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([next(iter(sample.generate(model, prompt, 1, 1.5, 5, generator))) for _ in range(1500)])
    shares = torch.stack([(draws == token).float().mean() for token in which])
    assert shares.sum() == 1 and torch.allclose(shares, expected, atol=0.04)
    again = [list(sample.generate(model, prompt, 30, 1.0, 0, torch.Generator().manual_seed(7))) for _ in range(2)]
    assert again[0] == again[1] != list(sample.generate(model, prompt, 30, 1.0, 0, torch.Generator().manual_seed(8)))


def test_text_of_bytes_and_of_gpt2s_tokenizer_and_bfloat16(run, ln_free_run, gpt2_tokenizer):
    done = run("sample.py", ln_free_run, "--prompt=def main(", "--max_new_tokens=80")
    assert done.code == 0 and done.text.startswith("def main(") and len(done.text) > 60
    assert run("sample.py", ln_free_run, "--prompt=def main(", "--max_new_tokens=80").text == done.text
    assert run("sample.py", ln_free_run, "--prompt=déf ", "--max_new_tokens=20", "--dtype=bfloat16").text.startswith("déf ")
    random_hf(vocab_size=50257).save_pretrained("random")
    done = run("sample.py", "random", "--prompt=Hello, world", "--max_new_tokens=20")
    assert done.code == 0 and done.text.startswith("Hello, world") and len(done.text) > 30


def test_one_row_is_the_same_linear_map():
    for bias in (None, torch.randn(300).bfloat16()):
        W, x = torch.randn(300, 64).bfloat16(), torch.randn(1, 2, 64).bfloat16()
        with sample.OneRow():
            one, two = torch.nn.functional.linear(x[:, :1], W, bias), torch.nn.functional.linear(x, W, bias)
        exact = x.double() @ W.double().T + (0 if bias is None else bias.double())
        assert one.shape == (1, 1, 300) and two.shape == (1, 2, 300)
        for found, expected in ((one, exact[:, :1]), (two, exact)):
            torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.01)


def test_bfloat16_decodes_what_its_logits_say(tmp_path):
    """Of each token, with a cache and one row at a time, the logit is within rounding of the largest without them."""
    model = GPT.from_pretrained(TINY).eval().bfloat16()
    prompt = list(b"def read(self, ")
    ids = prompt + list(sample.generate(model, prompt, 60, 0, 0, None))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(ids[len(prompt) :]).unsqueeze(1))[:, 0]
    assert (logits.max(-1).values - chosen).max() < 0.25 and (logits.max(-1).values - logits.median(-1).values).min() > 2


def test_bfloat16_weights_are_near_float32_with_and_without_layernorm():
    idx = torch.tensor([list(b"class Reader(Base):")])
    for fake in (False, True):
        model = GPT.from_pretrained(TINY).eval()
        model.measure_std(idx)
        if fake:
            set_all_fake(model)
        with torch.no_grad():
            expected = model(idx)[0].log_softmax(-1)
            found = model.bfloat16()(idx)[0].float().log_softmax(-1)
        assert (found - expected).abs().mean() < 0.15


@pytest.mark.parametrize("args, message", [
    ([], "usage: python sample.py"), (["nowhere"], "nowhere is not a directory here"), ([TINY, "--temperature=-1"], "temperature, top_k and seed 0 or more"),
    ([TINY, "--dtype=float16"], "it must be float32 or bfloat16"), (["other"], "other has no tokenizer that is known here: its end-of-text is 299"),
    ([TINY, f"--seed={2**64}"], "seed below 2**63"), ([TINY, "--device=gpu"], "device 'gpu' is not on this machine"), ([TINY, "--max_new_tokens=0"], "max_new_tokens must be 1 or more"),
])
def test_bad_input_ends_in_one_line(run, args, message, tmp_path):
    random_hf().save_pretrained(tmp_path / "other")
    done = run("sample.py", *args)
    assert done.code == 1 and message in done.text and "Traceback" not in done.text
