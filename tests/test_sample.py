"""
tools/sample.py: the cache changes no token, draws follow top_k and temperature, and the text is whole.
"""
import pytest
import torch
from conftest import TINY, random_hf
from transformers import AutoModelForCausalLM

from model import GPT, GPTConfig
from tools import sample

PROMPT = list(b"def read(self, ")


@torch.no_grad()
def likeliest(model, ids, n):
    """ids, and the n likeliest tokens that follow one by one, without a cache."""
    ids = list(ids)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return ids


def greedy(model, ids, n):
    """The same by sample.py."""
    return list(ids) + list(sample.generate(model, ids, n, 0, 0, None))


@pytest.mark.parametrize("form", ["fake", "folded"])
def test_the_cache_changes_no_token(removed, form):
    removed.set_treatment("bos", form == "fake")  # position 0 has its own constant with a cache, too
    model = removed if form == "fake" else removed.fold()
    assert greedy(model, PROMPT, 60) == likeliest(model, PROMPT, 60)


def test_transformers_writes_the_same():
    hf = AutoModelForCausalLM.from_pretrained(TINY).eval()
    length = dict(max_new_tokens=60, min_new_tokens=60)
    theirs = hf.generate(torch.tensor([PROMPT]), **length, do_sample=False, pad_token_id=0)
    assert greedy(GPT.from_pretrained(TINY).eval(), PROMPT, 60) == theirs[0].tolist()


def test_after_the_last_position_it_goes_on_from_the_last_half(tmp_path):
    random_hf(n_positions=16).save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    ids = list(range(30))
    found = greedy(model, ids, 40)
    assert len(found) == 70
    assert found[14:31] == likeliest(model, ids[-16:], 1)  # a long prompt is cut to its last 16 tokens
    assert found[23:39] == likeliest(model, found[23:31], 8)


def test_draws_are_of_the_top_k_at_the_temperature():
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=16)).eval()
    with torch.no_grad():
        values, tokens = model(torch.tensor([[1, 2]]))[0][0, -1].topk(5)
    generator = torch.Generator().manual_seed(0)
    scale = 0.1  # the logits of untrained weights lie near each other
    draws = [token for _ in range(1500) for token in sample.generate(model, [1, 2], 1, scale, 5, generator)]
    shares = torch.bincount(torch.tensor(draws), minlength=50)[tokens] / 1500
    torch.testing.assert_close(shares, (values / scale).softmax(-1), atol=0.04, rtol=0)
    assert shares.sum() == 1
    assert list(sample.generate(model, [1, 2], 1, 1e-39, 5, generator)) == [tokens[0]]


def test_a_seed_repeats_its_draws_and_the_text_is_whole(run, gpt2_tokenizer):
    random_hf(vocab_size=50257).save_pretrained("random")
    for source, prompt, *args in (
        (TINY, "déf main("),
        (TINY, "déf ", "--dtype=bfloat16"),
        ("random", "Hello, world"),
    ):
        args = ["tools.sample", source, f"--prompt={prompt}", "--max_new_tokens=24", *args]
        first, again, other = (run(*args, f"--seed={seed}").text for seed in (7, 7, 8))
        assert first.startswith(prompt)
        assert len(first) > len(prompt) + 8
        assert first == again != other


@pytest.mark.parametrize("bias", [False, True])
def test_addmv_which_multiplies_in_bfloat16_is_the_same_linear_map(bias):
    linear = torch.nn.Linear(64, 300, bias=bias).bfloat16()
    x = torch.randn(1, 2, 64).bfloat16()
    exact = torch.nn.functional.linear(x.double(), *(p.double() for p in linear.parameters()))
    sample.use_addmv(linear)
    for n in (1, 2):
        torch.testing.assert_close(linear(x[:, :n]).double(), exact[:, :n], atol=0.01, rtol=0.01)


@pytest.mark.parametrize("args, named", [
    ([], "tools.sample"),
    (["nowhere"], "nowhere"),
    ([TINY, "--max_new_tokens=0"], "max_new_tokens"),
    ([TINY, "--temperature=-1"], "temperature"),
    ([TINY, f"--seed={2**63}"], "seed"),
    ([TINY, "--dtype=float16"], "dtype"),
])
def test_bad_input_ends_in_one_line(run, args, named):
    assert named in run("tools.sample", *args).error
