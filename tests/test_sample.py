"""
tools/sample.py: the cache changes no token, draws follow top_k and temperature, and the text is whole.
"""
import pytest
import torch
from conftest import TINY, random_hf, set_all_fake

from model import GPT
from tools import sample

PROMPT = list(b"def read(self, ")


@torch.no_grad()
def likeliest(model, ids, n):
    """ids, and the n likeliest tokens that follow one by one, without a cache."""
    ids = list(ids)
    for _ in range(n):
        logits = model(torch.tensor([ids]))[0]
        ids.append(logits[0, -1].argmax().item())
    return ids


def greedy(model, ids, n):
    """The same by sample.py, with its cache."""
    return list(ids) + list(sample.generate(model, ids, n, 0, 0, None))


# --- the cache


@pytest.mark.parametrize("form", ["real", "fake", "folded"])
def test_the_cache_changes_no_token(form):
    model = GPT.from_pretrained(TINY).eval()
    if form != "real":
        model.measure_std(torch.tensor([PROMPT * 4]))
        set_all_fake(model)
    if form == "fake":
        model.set_treatment("bos", True)  # position 0 has its own constant with a cache, too
    if form == "folded":
        model = model.fold()
    assert greedy(model, PROMPT, 60) == likeliest(model, PROMPT, 60)


def test_transformers_writes_the_same():
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(TINY).eval()
    length = dict(max_new_tokens=60, min_new_tokens=60)
    theirs = hf.generate(torch.tensor([PROMPT]), **length, do_sample=False, pad_token_id=0)
    assert greedy(GPT.from_pretrained(TINY).eval(), PROMPT, 60) == theirs[0].tolist()


def test_after_the_last_position_it_goes_on_from_the_last_half(tmp_path):
    random_hf(n_positions=16).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    ids = list(range(30))
    found = list(sample.generate(model, ids, 40, 0, 0, None))
    assert len(found) == 40

    prompt = ids[-16:]  # the last 16 tokens of a long prompt
    assert found[0] == likeliest(model, prompt, 1)[-1]
    last_half = [*prompt, found[0]][-8:]
    assert found[1:9] == likeliest(model, last_half, 8)[-8:]


# --- the draw


def test_draws_are_of_the_top_k_at_the_temperature():
    model = GPT.from_pretrained(TINY).eval()
    prompt = list(b"import ")
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0][0, -1]
    values, likeliest_5 = logits.topk(5)
    expected = (values / 1.5).softmax(-1)

    generator = torch.Generator().manual_seed(0)
    draws = [token for _ in range(1500) for token in sample.generate(model, prompt, 1, 1.5, 5, generator)]
    frequencies = torch.stack([(torch.tensor(draws) == token).float().mean() for token in likeliest_5])
    assert frequencies.sum() == 1
    assert torch.allclose(frequencies, expected, atol=0.04)


def test_a_seed_repeats_its_draws():
    model = GPT.from_pretrained(TINY).eval()
    texts = []
    for seed in (7, 7, 8):
        generator = torch.Generator().manual_seed(seed)
        texts.append(list(sample.generate(model, list(b"import "), 30, 1.0, 0, generator)))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_the_text_is_whole_and_a_second_time_the_same(run, ln_free_run, gpt2_tokenizer):
    random_hf(vocab_size=50257).save_pretrained("random")
    for args in ([ln_free_run, "--prompt=déf main("], [ln_free_run, "--prompt=déf ", "--dtype=bfloat16"],
                 ["random", "--prompt=Hello, world"]):
        done = run("tools.sample", *args, "--max_new_tokens=60")
        assert done.code == 0, done.text
        prompt = args[1].removeprefix("--prompt=")
        assert done.text.startswith(prompt)
        assert len(done.text) > len(prompt) + 20
        assert run("tools.sample", *args, "--max_new_tokens=60").text == done.text


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

    for n in (1, 2):
        assert linear(x[:, :n]).shape == (1, n, 300)
        torch.testing.assert_close(linear(x[:, :n]).double(), exact[:, :n], atol=0.03, rtol=0.01)


def test_bfloat16_decodes_what_its_logits_say():
    """With a cache and one row at a time, each token's logit is within rounding of the largest one without them."""
    model = GPT.from_pretrained(TINY).eval().bfloat16()
    sample.use_addmv(model)
    tokens = greedy(model, PROMPT, 60)

    plain = GPT.from_pretrained(TINY).eval().bfloat16()
    with torch.no_grad():
        logits = plain(torch.tensor([tokens]))[0]
    logits = logits[0, len(PROMPT) - 1 : -1].float()  # (60, vocab)
    largest = logits.max(-1).values
    chosen = logits[torch.arange(60), tokens[len(PROMPT) :]]
    assert (largest - chosen).max() < 0.25
    assert (largest - logits.median(-1).values).min() > 2


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_bfloat16_weights_are_near_float32_with_and_without_layernorm(mode):
    idx = torch.tensor([list(b"class Reader(Base):")])
    model = GPT.from_pretrained(TINY).eval()
    model.measure_std(idx)
    if mode == "fake":
        set_all_fake(model)
    with torch.no_grad():
        expected = model(idx)[0].log_softmax(-1)
        found = model.bfloat16()(idx)[0].float().log_softmax(-1)
    assert (found - expected).abs().mean() < 0.15


# --- settings


@pytest.mark.parametrize("args, named", [
    ([], "usage: python -m tools.sample"),
    (["nowhere"], "nowhere"),
    (["other"], "end-of-text"),  # no tokenizer has 299
    (["beyond"], "50256"),  # transformers' GPT2Config gives it to any vocabulary
    ([TINY, "--max_new_tokens=0"], "max_new_tokens"),
    ([TINY, "--temperature=-1"], "temperature"),
    ([TINY, f"--seed={2**64}"], "seed"),
    ([TINY, "--dtype=float16"], "dtype"),
    ([TINY, "--device=gpu"], "gpu"),
])
def test_bad_input_ends_in_one_line(run, args, named):
    hf = random_hf()
    hf.save_pretrained("other")
    hf.config.eos_token_id = 50256
    hf.save_pretrained("beyond")
    assert named in run("tools.sample", *args).error
