import shutil

import numpy as np
import pytest
import torch
from conftest import DATA

from recur_gpt2 import RecurGPT2LMHeadModel
from recur_gpt2.cli.main import main
from recur_gpt2.errors import InputError
from recur_gpt2.evaluation.analysis import Shown, analyze
from recur_gpt2.evaluation.analysis_page import analysis_page
from recur_gpt2.models.hub import load_tokenizer

TEXT = "<script>alert(1)</script> & \"Mr. Brice\" saw the <b>dog</b>. 'Naïve,' said Mr. Brice; the dog ran on. " * 40
W = 16


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(DATA / "gpt2-mini"))


@pytest.fixture(scope="module")
def model():
    made = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=W, last_slots=6, pointer_slots=5 * (W - 1))
    made.transformer.recurrence.pointer.log_scale.data += 0.4  # untrained, it would hardly point
    return made


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return np.array(tokenizer(TEXT)["input_ids"])[: 12 * W + 5]


@pytest.fixture(scope="module")
def found(model, tokenizer, tokens):
    return analyze(model, tokenizer, tokens, Shown(windows=3))


@torch.no_grad()
def test_gains_and_probabilities_are_those_of_reading_with_and_without_memory(found, model, tokens):
    ids = torch.from_numpy(tokens)[None]
    whole = model(ids).logits[0].softmax(dim=-1)
    assert [window["number"] for window in found["windows"]] == [1, 6, 11]
    for window in found["windows"]:
        first = window["number"] * W
        apart = model(ids[:, first : first + W]).logits[0].softmax(dim=-1)
        assert len(window["tokens"]) == W
        for position, token in enumerate(window["tokens"]):
            target = tokens[first + position + 1]
            assert token["memory"]["own"] == pytest.approx(float(whole[first + position, target]), rel=1e-3)
            assert token["removed"]["own"] == pytest.approx(float(apart[position, target]), rel=1e-3)
            gain = np.log(token["memory"]["own"] / token["removed"]["own"])
            assert token["gain"] == pytest.approx(gain, abs=1e-3)


def test_places_that_are_pointed_at_hold_what_is_predicted_from_them(found, tokenizer, tokens):
    """The likeliest place of a repeated text is the one that went on as this one does."""
    text = [tokenizer.decode([token]) for token in tokens.tolist()]
    seen = 0
    for window in found["windows"][1:]:
        for position, token in enumerate(window["tokens"]):
            here = window["number"] * W + position + 1
            shares = [each["share"] for each in token["pointed"]]
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) <= token["share"] + 1e-6
            for each in token["pointed"]:
                assert each["token"] == text[here - each["back"]]
                assert here - each["back"] < window["number"] * W
            seen += token["pointed"][0]["token"] == token["text"]
    assert seen > W


def test_last_positions_that_layers_attend_to_stand_right_before_the_window(found, tokenizer, tokens):
    text = [tokenizer.decode([token]) for token in tokens.tolist()]
    for window in found["windows"]:
        for position, token in enumerate(window["tokens"]):
            here = window["number"] * W + position + 1
            for each in token["attended"]:
                assert window["number"] * W - 6 <= here - each["back"] < window["number"] * W
                assert each["token"] == text[here - each["back"]]


def test_the_largest_gains_come_first_with_where_their_tokens_stood_last(found, tokens):
    gains = [each["gain"] for each in found["largest"]]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) == 20
    assert any("distance" in each for each in found["largest"])
    for each in found["largest"]:
        if "distance" in each:
            assert each["earlier"]["token"] == each["token"]


@pytest.mark.parametrize("options", [{"recurrence": "yoshida2020"}, {"linear_layers": "all"}, {"pointer_slots": 0}])
def test_other_memories_are_shown_as_far_as_they_hold_places(options, tokenizer, tokens):
    model = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=W, **options)
    (window,) = analyze(model, tokenizer, tokens[: 4 * W], Shown(windows=1, horizons=(0, 1)))["windows"]
    assert ("pointed" in window["tokens"][0]) == bool(model.config.pointer_slots)
    assert ("attended" in window["tokens"][0]) == bool(model.config.last_slots and not model.config.linear_layers)


def test_what_cannot_be_analyzed_is_refused(model, tokenizer, tokens):
    with pytest.raises(InputError, match="the text has 32 tokens, which is no more than two windows of 16"):
        analyze(model, tokenizer, tokens[: 2 * W], Shown())
    plain = RecurGPT2LMHeadModel.from_gpt2(DATA / "gpt2-mini", window=W, recurrence="none")
    with pytest.raises(InputError, match="the model has no memory to analyze"):
        analyze(plain, tokenizer, tokens, Shown())


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not UTF-8"])
def test_a_text_that_cannot_be_read_is_refused_by_name(content, tmp_path, capsys):
    if content is not None:
        (tmp_path / "book.txt").write_bytes(content)
    assert main(["analyze", str(tmp_path / "book.txt"), "-o", str(tmp_path / "report.html")]) == 2
    assert "book.txt could not be read" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("no chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    for flag in (*flags, "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def test_the_page_works_in_a_browser(found, browser, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(analysis_page(found, "<i>a book</i> & $more.txt"), encoding="utf-8")
    browser.get(page.as_uri())
    assert browser.title == "What the memory carries: <i>a book</i> & $more.txt"
    texts = browser.find_elements("css selector", "#windows .text")
    expected = ["".join(token["text"] for token in window["tokens"]) for window in found["windows"]]
    assert [text.get_property("textContent") for text in texts] == expected
    assert not browser.find_elements("css selector", "#windows b, #windows script, h1 i")
    assert len(browser.find_elements("css selector", "svg circle")) > len(found["by_horizon"])
    assert len(browser.find_elements("css selector", "#largest tbody tr")) == 20
    spans = browser.find_elements("css selector", "#windows .text span")
    token = found["windows"][1]["tokens"][3]
    spans[W + 3].click()
    detail = browser.find_element("css selector", "#detail").text
    assert f"{abs(token['gain']):.2f} nats" in detail
    assert f"Pointed at ({100 * token['share']:.1f}%" in detail or token["share"] < 0.1
    spans[W + 4].send_keys("\n")
    assert browser.find_element("css selector", "#detail").text != detail
    assert len(browser.find_elements("css selector", ".chosen")) == 1
    assert browser.get_log("browser") == []
