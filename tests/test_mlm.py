"""Masked language modelling: hidden tokens, loss and gradients against transformers, runs."""

from argparse import Namespace
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from conftest import BAD, GOOD, quick_run, read_log, write_data
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import edit_tensors, refused

import evaluation
import mlm
import multitask_classifier
from bert import BertModel
from datasets import TokenizedDataset
from engine.checkpoint import read_json
from masked_lm import MaskedLM, hide_tokens
from mlm import MaskedLMBackward, Masking

SPECIAL = np.arange(40) < 5
MASK = 4
TEXTS = ["the film is great", "a dull plot !", "the cat sees a dog", "the dog sees a great film"]


@settings(max_examples=200)
@given(
    st.lists(st.integers(0, 39), max_size=30),
    st.floats(0.01, 0.99),
    st.booleans(),
    st.integers(0, 99),
)
def test_hidden_tokens_are_as_many_as_asked_and_never_special(ids, probability, whole, seed):
    ids, continues = np.array(ids, dtype=np.int64), (np.arange(40) % 3 == 0) & ~SPECIAL
    options = (continues & whole, SPECIAL, MASK, probability)
    masked, hidden = hide_tokens(ids, *options, np.random.default_rng(seed))
    candidates = (~SPECIAL[ids]).sum()
    assert not hidden[SPECIAL[ids]].any() and (masked[~hidden] == ids[~hidden]).all()
    assert (~SPECIAL[masked[hidden]] | (masked[hidden] == MASK)).all()
    wanted = max(1, round(probability * candidates)) if candidates else 0
    assert hidden.sum() >= wanted if whole else hidden.sum() == wanted
    if whole:  # all pieces of a word or none
        positions = np.flatnonzero(~SPECIAL[ids])
        for before, after in pairwise(positions):
            assert not continues[ids[after]] or hidden[before] == hidden[after]


def test_of_the_hidden_tokens_80_in_100_are_masked_and_10_are_random():
    ids = np.full(50_000, 7)
    masked, hidden = hide_tokens(
        ids, SPECIAL & False, SPECIAL, MASK, 0.15, np.random.default_rng(0)
    )
    assert hidden.sum() == 7500
    shares = [(masked[hidden] == MASK).mean(), (masked[hidden] == 7).mean()]
    # A random token may be the token itself, one time in 35.
    assert shares == pytest.approx([0.8, 0.1 + 0.1 / 35], abs=0.015)
    assert len(set(masked[hidden]) - {MASK}) == 35


@pytest.fixture
def theirs(tiny, tmp_path):
    """transformers' model with a head of random weights, and its folder."""
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(tiny)
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
        model.cls.predictions.transform.LayerNorm.weight.normal_()
    model.save_pretrained(tmp_path / "theirs")
    transformers.BertTokenizerFast.from_pretrained(tiny).save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def masking_of(model, **options):
    settings = {"mlm_probability": 0.4, "whole_word": False, "seed": 1, **options}
    return Masking(model.tokenizer, Namespace(**settings))


def test_loss_and_gradients_are_those_of_transformers(theirs):
    """Over two batches of a step, as over all of their hidden tokens together."""
    theirs, folder = theirs
    model = MaskedLM.from_pretrained(folder)
    data = TokenizedDataset("mlm", folder, [TEXTS], model.tokenizer)
    batches, masking = [data.batch(np.array(rows)) for rows in ([0, 1], [2, 3])], masking_of(model)
    loss = MaskedLMBackward(model, masking)(batches, step=3)
    whole = data.batch(np.arange(4))
    ids, hidden = masking(whole, step=3)
    labels = torch.full_like(ids, -100).index_put(hidden, whole.input_ids[hidden])
    output = theirs(input_ids=ids, attention_mask=whole.attention_mask, labels=labels)
    output.loss.backward()
    assert loss == pytest.approx(output.loss.item(), abs=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    pairs = {"word_embedding.weight": "bert.embeddings.word_embeddings.weight"}
    pairs["bert_layers.1.out_dense.weight"] = "bert.encoder.layer.1.output.dense.weight"
    for ours, name in pairs.items():
        grad = dict(model.bert.named_parameters())[ours].grad.clone()
        if "word" in ours:  # transformers gives no gradient to the embedding of [PAD]
            grad[0] = grads[name][0]
        torch.testing.assert_close(grad, grads[name], atol=1e-5, rtol=1e-4)
    head = "cls.predictions"
    for p, name in zip(
        model.head.parameters(),
        (
            "bias",
            *(f"transform.{m}.{k}" for m in ("dense", "LayerNorm") for k in ("weight", "bias")),
        ),
        strict=True,
    ):
        torch.testing.assert_close(p.grad, grads[f"{head}.{name}"], atol=1e-5, rtol=1e-4)


def test_what_is_saved_loads_in_transformers_and_as_an_encoder(theirs, tmp_path):
    _, folder = theirs
    model = MaskedLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "saved").eval()
    batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    hidden = batch.attention_mask.bool()
    expected = again(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[hidden]
    logits = model(batch.input_ids, batch.attention_mask, hidden)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    encoder = BertModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(p, encoder[name]) for name, p in model.bert.state_dict().items())


def test_a_missing_head_is_drawn_at_random_with_a_note_and_a_wrong_one_refused(theirs, capsys):
    _, folder = theirs
    path = folder / "model.safetensors"
    MaskedLM.from_pretrained(folder)
    assert "masked" not in capsys.readouterr().err
    edit_tensors(path, **{"cls.predictions.bias": torch.zeros(3)})
    refused(lambda: MaskedLM.from_pretrained(folder), path, "cls.predictions.bias", "(3,)")
    edit_tensors(path, **{"cls.predictions.bias": None})
    MaskedLM.from_pretrained(folder)
    assert "no head for masked tokens; it is drawn at random" in capsys.readouterr().err


@pytest.fixture
def text(tmp_path):
    """A language of two kinds of sentence, in which the film decides the adjective."""
    lines = [f"the film is {word}" for word in GOOD[:2]] + [f"a plot is {word}" for word in BAD[:2]]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines * 30) + "\n\n")
    return path


def train(run_script, tiny, data, run, *more):
    code, out, err = run_script(mlm, *quick_run(tiny, data, run, *more))
    assert code == 0, err
    return out


@pytest.mark.parametrize("scratch", [False, True])
def test_a_run_learns_and_fills_in_what_it_has_learnt(
    tiny, data, text, tmp_path, run_script, scratch
):
    flags = ("--text", text, "--epochs", 40, *(("--from_scratch", "1x64") if scratch else ()))
    train(run_script, tiny, data, tmp_path / "run", *flags)
    result = read_json(tmp_path / "run/result.json")
    assert result["dev"]["mlm"]["loss"] < 0.7 * result["before"]["mlm"]["loss"]
    scores = [entry["score"] for entry in read_log(tmp_path / "run", "dev")]
    assert len(scores) == 40 and max(scores) == -result["dev"]["mlm"]["loss"]
    code, out, _ = run_script(evaluation, tmp_path / "run", "--text", "the film is [MASK]")
    assert code == 0 and out.startswith("[MASK] 1: ")
    flags = ("--text", "the film is [MASK]", "--device", "cuda")  # hidden from the tests
    code, _, err = run_script(evaluation, tmp_path / "run", *flags)
    assert code == 2 and "finds no such device" in err
    assert {part.split()[0] for part in out.split(": ")[1].split(", ")[:2]} == set(GOOD[:2])
    code, _, err = run_script(evaluation, tmp_path / "run", "--text", "the film")
    assert code == 2 and "no [MASK] to fill in" in err
    code, _, err = run_script(
        multitask_classifier, *quick_run(tmp_path / "run", data, tmp_path / "tasks", "--no_test")
    )
    assert code == 0, err  # its encoder starts a fine-tuning


def test_sentences_of_tasks_are_distinct_and_dev_is_their_dev_files(
    tiny, data, tmp_path, run_script
):
    out = train(run_script, tiny, data, tmp_path / "run", "--tasks", "sst,sts", "--epochs", 1)
    rows = read_json(tmp_path / "run/config.json")["rows"]
    assert f"{rows['train']['mlm']} sentences, and {rows['dev']['mlm']} others" in out
    assert 20 < rows["train"]["mlm"] <= 80


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_file_that_has_changed_is_not_resumed_with(tiny, tmp_path, run_script, split):
    data = write_data(tmp_path / "data", {"train": 20, "dev": 8})
    flags = quick_run(tiny, data, tmp_path / "run", "--tasks", "sst")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlm.Trainer, "fit", Mock(side_effect=KeyboardInterrupt))
        assert run_script(mlm, *flags)[0] == 130
    with open(data / f"ids-sst-{split}.csv", "a", encoding="utf-8") as file:
        file.write("99\tnew\ta new film\t1\n")
    code, _, err = run_script(mlm, *flags, "--resume")
    assert code == 2 and "has changed since the run began" in err


def test_bad_input_is_refused(tiny, data, tmp_path, run_script):
    (tmp_path / "empty.txt").write_text("\n \n")
    text = ("--text", tmp_path / "empty.txt")
    for flags, expected in [
        ((), "one of the arguments --tasks --text is required"),
        (text, "0 lines of text"),
        (("--text", tmp_path / "none.txt"), "no such file"),
        ((*text, "--mlm_probability", 1), "below 1"),
        ((*text, "--mlm_probability", 0), "above 0"),
        ((*text, "--from_scratch", "2x100"), "LAYERSxWIDTH"),
        (("--tasks", "quora"), "quora: no such task"),
    ]:
        code, _, err = run_script(mlm, *quick_run(tiny, data, tmp_path / "run", *flags))
        assert (code, expected in err, err.count("\n")) == (2, True, 1), err
    assert not (tmp_path / "run").exists()
