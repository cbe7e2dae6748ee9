"""
tools/sample.py: the cache changes no token, the draw is as asked, and the text is whole.
"""
import pytest
import torch
from conftest import TINY, random_hf, set_all_fake

from model import GPT
from tools import sample

PROMPT = list(b"def read(self, ")


@pytest.fixture
def tiny():
    return GPT.from_pretrained(TINY).eval()


@torch.no_grad()
def likeliest(model, ids, n):
    """The n likeliest tokens that follow ids one by one, without a cache."""
    ids = list(ids)
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0]
        ids.append(logits[0, -1].argmax().item())
    return ids[-n:]


# --- the cache


@pytest.mark.parametrize("form", ["real", "fake", "folded"])
def test_the_cache_changes_no_token(tiny, form):
    from transformers import AutoModelForCausalLM

    if form != "real":
        tiny.measure_std(torch.tensor([PROMPT * 4]))
        set_all_fake(tiny)
    tiny.set_treatment("bos", form == "fake")  # position 0 is its own with a cache, too
    model = tiny.fold() if form == "folded" else tiny
    found = list(sample.generate(model, PROMPT, 60, 0, 0, None))
    assert found == likeliest(model, PROMPT, 60)
    if form == "real":
        hf = AutoModelForCausalLM.from_pretrained(TINY).eval()
        length = dict(max_new_tokens=60, min_new_tokens=60)
        theirs = hf.generate(torch.tensor([PROMPT]), **length, do_sample=False, pad_token_id=0)
        assert PROMPT + found == theirs[0].tolist()


def test_after_the_last_position_it_goes_on_from_the_last_half(tmp_path):
    random_hf(n_positions=16).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    ids = list(range(30))
    found = list(sample.generate(model, ids, 40, 0, 0, None))
    assert len(found) == 40
    prompt = ids[-16:]  # the last 16 of a long one
    assert found[:1] == likeliest(model, prompt, 1)
    assert found[1:9] == likeliest(model, [*prompt, found[0]][-8:], 8)


# --- the draw


def test_draws_are_of_the_top_k_at_the_temperature_and_a_seed_repeats_them(tiny):
    prompt = list(b"import ")
    with torch.no_grad():
        values, likeliest_5 = tiny(torch.tensor([prompt]))[0][0, -1].topk(5)
    expected = (values / 1.5).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([next(sample.generate(tiny, prompt, 1, 1.5, 5, generator)) for _ in range(1500)])
    shares = torch.stack([(draws == token).float().mean() for token in likeliest_5])
    assert shares.sum() == 1
    assert torch.allclose(shares, expected, atol=0.04)

    generators = [torch.Generator().manual_seed(seed) for seed in (7, 7, 8)]
    once, again, other = (list(sample.generate(tiny, prompt, 30, 1.0, 0, g)) for g in generators)
    assert once == again != other


# --- the text


@pytest.mark.parametrize("vocab_size, prompt, dtype", [
    (257, "def main(", "float32"),
    (257, "déf ", "bfloat16"),
    (50257, "Hello, world", "float32"),
])
def test_text_is_whole_and_a_second_time_the_same(run, gpt2_tokenizer, vocab_size, prompt, dtype):
    hf = random_hf(vocab_size=vocab_size)
    with torch.no_grad():
        hf.transformer.wte.weight[-1] = 0  # it hardly ever says end-of-text
    hf.save_pretrained("random")
    args = ["tools.sample", "random", f"--prompt={prompt}", "--max_new_tokens=40", f"--dtype={dtype}"]
    done = run(*args)
    assert done.code == 0, done.text
    assert done.text.startswith(prompt)
    assert len(done.text) > len(prompt) + 20
    assert run(*args).text == done.text


# --- bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_addmv_is_the_same_linear_map(bias):
    linear = torch.nn.Linear(64, 300, bias=bias, dtype=torch.bfloat16)
    for p in linear.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 2, 64, dtype=torch.bfloat16)
    exact = x.double() @ linear.weight.double().T
    if bias:
        exact = exact + linear.bias.double()

    sample.use_addmv(linear)

    one, two = linear(x[:, :1]), linear(x)
    assert one.shape == (1, 1, 300)
    assert two.shape == (1, 2, 300)
    torch.testing.assert_close(one.double(), exact[:, :1], atol=0.03, rtol=0.01)
    torch.testing.assert_close(two.double(), exact, atol=0.03, rtol=0.01)


def test_bfloat16_decodes_what_its_logits_say(tiny):
    """With a cache and one row at a time, each token's logit is within rounding of the largest without them."""
    plain = GPT.from_pretrained(TINY).eval().bfloat16()
    sample.use_addmv(tiny.bfloat16())
    tokens = list(sample.generate(tiny, PROMPT, 60, 0, 0, None))
    with torch.no_grad():
        logits = plain(torch.tensor([PROMPT + tokens]))[0]
    logits = logits[0, len(PROMPT) - 1 : -1].float()  # (60, vocab)
    largest = logits.max(-1).values
    chosen = logits[torch.arange(60), tokens]
    assert (largest - chosen).max() < 0.25
    assert (largest - logits.median(-1).values).min() > 2


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_bfloat16_weights_are_near_float32_with_and_without_layernorm(tiny, mode):
    idx = torch.tensor([list(b"class Reader(Base):")])
    tiny.measure_std(idx)
    if mode == "fake":
        set_all_fake(tiny)
    with torch.no_grad():
        expected = tiny(idx)[0].log_softmax(-1)
        found = tiny.bfloat16()(idx)[0].float().log_softmax(-1)
    assert (found - expected).abs().mean() < 0.15


# --- settings


@pytest.mark.parametrize("args, named", [
    ([], "tools.sample"),
    (["nowhere"], "nowhere"),
    (["other"], "other"),
    ([TINY, "--max_new_tokens=0"], "max_new_tokens"),
    ([TINY, "--temperature=-1"], "temperature"),
    ([TINY, f"--seed={2**64}"], "seed"),
    ([TINY, "--dtype=float16"], "dtype"),
    ([TINY, "--device=gpu"], "'gpu'"),
])
def test_bad_input_ends_in_one_line(run, args, named):
    random_hf().save_pretrained("other")  # of 300 ids, and no tokenizer
    assert named in run("tools.sample", *args).error
